"""Changing a module's class in place, with what `fully_shard` puts in front of it kept."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def kind(module: nn.Module) -> type[nn.Module]:
    """The class of a module; of one that `fully_shard` wrapped, the class that was wrapped."""
    found = type(module)
    return found.__bases__[1] if _is_sharded(found) else found


def become(module: nn.Module, new: type[nn.Module]) -> None:
    """Gives a module another class. A sharded one stays sharded: FSDP2 keeps its state by module, not by class."""
    old: Any = type(module)
    if _is_sharded(old):
        own = {name: value for name, value in vars(old).items() if name == "__deepcopy__"}
        new = type(f"FSDP{new.__name__}", (old.__bases__[0], new), own)
    module.__class__ = new  # type: ignore[assignment]


def _is_sharded(found: type) -> bool:
    """Whether a class is one that `fully_shard` derived; where nobody has imported it there are none."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and found.__bases__[0] is fsdp.FSDPModule and len(found.__bases__) == 2
