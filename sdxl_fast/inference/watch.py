"""Have the weights of a network changed, moved, or been put under something else since they were last looked at?

What is derived from weights must then be made again, and a CUDA graph that reads them must not be replayed. Writing in
place is seen by autograd's version counter; a write through `.data` leaves no trace, so those who do that (peft's
merges, for one) have to say so: `Watch.touch`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from enum import Enum
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
            self._versions = [t._version for _, _, t in self._tensors]
        self._touched = False
        return found

    @property
    def identity(self) -> Hashable:
        """Stands for the addresses of all weights: another one when any of them has moved."""
        return self._identity

    def _remember(self) -> None:
        self._tensors: list[tuple[dict[str, Any], str, Tensor]] = []
        self._children: list[tuple[dict[str, Any], str, nn.Module]] = []
        self._modules: list[nn.Module] = list(self.network.modules())
        for module in self._modules:
            for place in (module._parameters, module._buffers):
                self._tensors += [(place, name, tensor) for name, tensor in place.items() if tensor is not None]
            self._children += [
                (module._modules, name, child) for name, child in module._modules.items() if child is not None
            ]
        self._sizes = sum(len(module._modules) for module in self._modules)
        self._addresses = [t.data_ptr() for _, _, t in self._tensors]
        self._versions = [t._version for _, _, t in self._tensors]
        self._attentions = [module for module in self._modules if "processor" in module.__dict__]
        self._calls = self._look_at_calls()
        self._identity = hash(tuple(self._addresses))

    def _compare(self) -> Change:
        for place, name, child in self._children:
            if place.get(name) is not child:
                return Change.STRUCTURE
        if sum(len(module._modules) for module in self._modules) != self._sizes:
            return Change.STRUCTURE
        if self._look_at_calls() != self._calls:
            return Change.STRUCTURE
        changed = self._touched
        for (place, name, tensor), address, version in zip(self._tensors, self._addresses, self._versions, strict=True):
            if place.get(name) is not tensor or tensor.data_ptr() != address:
                return Change.STRUCTURE
            changed = changed or tensor._version != version
        return Change.VALUES if changed else Change.NONE

    def _look_at_calls(self) -> Hashable:
        """What packed code would pass by: how many modules carry hooks or a forward of their own; the processors."""
        hooked = sum(
            bool(module._forward_hooks or module._forward_pre_hooks or "forward" in module.__dict__)
            for module in self._modules
        )
        return hooked, tuple(type(module.__dict__.get("processor")) for module in self._attentions), self._facts()
