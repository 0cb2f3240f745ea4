"""A cache that holds a number of bytes and forgets first what was not used longest."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteLru(Generic[V]):
    """Values by key, at most `budget` bytes of them; `dropped`, if given, is called with every value that leaves."""

    def __init__(self, budget: int, *, dropped: Callable[[V], None] | None = None) -> None:
        if budget < 0:
            raise ValueError(f"budget is {budget} bytes; it must be 0 or more")
        self.budget = budget
        self._dropped = dropped
        self._entries: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self.used = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def __iter__(self) -> Iterator[Hashable]:
        return iter(self._entries)

    def get(self, key: Hashable) -> V | None:
        """The value, which becomes the most recently used; None when it is not held."""
        found = self._entries.get(key)
        if found is None:
            return None
        self._entries.move_to_end(key)
        return found[0]

    def make_room(self, nbytes: int) -> bool:
        """Drop the least recently used until `nbytes` more fit; False, and nothing is dropped, if they never will."""
        if nbytes > self.budget:
            return False
        while self.used + nbytes > self.budget:
            self.evictions += 1
            self.drop(next(iter(self._entries)))
        return True

    def put(self, key: Hashable, value: V, nbytes: int) -> bool:
        """Hold a value, after making room for it; False, and it is not held, when it exceeds the whole budget."""
        self.drop(key)
        if not self.make_room(nbytes):
            return False
        self._entries[key] = (value, nbytes)
        self.used += nbytes
        return True

    def drop(self, key: Hashable) -> None:
        """Forget a key, if it is held."""
        value, nbytes = self._entries.pop(key, (None, 0))
        self.used -= nbytes
        if value is not None and self._dropped is not None:
            self._dropped(value)

    def clear(self) -> None:
        """Forget everything; not counted as evictions."""
        for key in list(self._entries):
            self.drop(key)
