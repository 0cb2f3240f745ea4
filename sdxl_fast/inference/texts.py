"""Are the text encoders still those that the cached prompts came from?"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .watch import Change, Watch


class TextWatch:
    """Looks at text encoders before their cached results are used."""

    def __init__(self) -> None:
        self._watches: dict[int, Watch] = {}

    def changed(self, encoders: Sequence[nn.Module | None]) -> bool:
        """Whether any of them, or its weights, is another one than at the last look."""
        present = [encoder for encoder in encoders if encoder is not None]
        found = False
        for index, encoder in enumerate(present):
            watch = self._watches.get(index)
            if watch is None or watch.network is not encoder:
                found = found or watch is not None
                self._watches[index] = Watch(encoder)
            elif watch.look() is not Change.NONE:
                found = True
        return found

    def settle(self) -> None:
        """Take the present state for the one to compare with: transformers installs hooks while it first encodes."""
        for watch in self._watches.values():
            watch.look()

    def touch(self) -> None:
        """Say that weights changed without leaving a trace."""
        for watch in self._watches.values():
            watch.touch()


def adapted(encoder: Any) -> bool:
    """Whether peft's layers are in it, whose strength can change from call to call."""
    return encoder is not None and any(type(module).__module__.startswith("peft.") for module in encoder.modules())
