"""Have the weights of a network changed, moved, or been put under something else since they were last looked at?

What is derived from weights must then be made again, and a CUDA graph that reads them must not be replayed. Writing in
place is seen by autograd's version counter; a write through `.data` leaves no trace, so those who do that (peft's
merges, for one) have to say so: `Watch.touch`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import Enum
from operator import is_
from typing import Any

from torch import Tensor, nn


class Change(Enum):
    """What `Watch.look` found: nothing; other values in the same place; other memory, modules or hooks."""

    NONE = "none"
    VALUES = "values"
    STRUCTURE = "structure"


class Watch:
    """Remembers where every parameter, buffer and module of a network is, and the parameters' versions.

    Args:
        network: the module.
        facts: what else decides how the network computes, beside its modules, their hooks and attention processors; a
            change counts as one of structure.
    """

    def __init__(self, network: nn.Module, *, facts: Callable[[], Hashable] = lambda: None) -> None:
        self.network = network
        self._facts = facts
        self._touched = False
        self._remember()

    def touch(self) -> None:
        """Say that values changed without leaving a trace."""
        self._touched = True

    def look(self) -> Change:
        """What changed since the last look; the present state becomes the one to compare with."""
        found = self._compare()
        if found is Change.STRUCTURE:
            self._remember()
        elif found is Change.VALUES:
            self._versions = [t._version for t in self._tensors]
        self._touched = False
        return found

    @property
    def identity(self) -> Hashable:
        """Stands for the addresses of all weights: another one when any of them has moved."""
        return self._identity

    def _remember(self) -> None:
        self._places: list[tuple[dict[str, Any], str]] = []
        self._tensors: list[Tensor] = []
        self._slots: list[tuple[dict[str, Any], str]] = []
        self._children: list[nn.Module] = []
        modules = list(self.network.modules())
        for module in modules:
            for place in (module._parameters, module._buffers):
                self._places += [(place, name) for name, tensor in place.items() if tensor is not None]
                self._tensors += [tensor for tensor in place.values() if tensor is not None]
            self._slots += [(module._modules, name) for name, child in module._modules.items() if child is not None]
            self._children += [child for child in module._modules.values() if child is not None]
        self._inner = [module._modules for module in modules]
        self._own = [module.__dict__ for module in modules]
        self._hooks = [hooks for m in modules for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        self._attentions = [module.__dict__ for module in modules if "processor" in module.__dict__]
        self._sizes = sum(map(len, self._inner))
        self._addresses = [t.data_ptr() for t in self._tensors]
        self._versions = [t._version for t in self._tensors]
        self._calls = self._look_at_calls()
        self._identity = hash(tuple(self._addresses))

    def _compare(self) -> Change:
        # a look at every call of a network of hundreds of weights: loops that run in C, none in Python
        if not all(map(is_, [place.get(name) for place, name in self._slots], self._children)):
            return Change.STRUCTURE
        if sum(map(len, self._inner)) != self._sizes or self._look_at_calls() != self._calls:
            return Change.STRUCTURE
        if not all(map(is_, [place.get(name) for place, name in self._places], self._tensors)):
            return Change.STRUCTURE
        if [t.data_ptr() for t in self._tensors] != self._addresses:
            return Change.STRUCTURE
        changed = self._touched or [t._version for t in self._tensors] != self._versions
        return Change.VALUES if changed else Change.NONE

    def _look_at_calls(self) -> Hashable:
        """What packed code would pass by: hooks, forwards of their own, the attention processors."""
        hooks = sum(map(len, self._hooks))
        forwards = sum(["forward" in own for own in self._own])
        return hooks, forwards, tuple([type(own.get("processor")) for own in self._attentions]), self._facts()
