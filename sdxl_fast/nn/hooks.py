"""Whether a module does something around its forward, which code that reads its parameters directly would pass by."""

from __future__ import annotations

from typing import Any

from torch import nn


def has_hooks(module: nn.Module) -> bool:
    """Whether forward hooks, backward hooks or a forward of the instance's own (offloading) are there."""
    found: Any = module
    return bool(
        "forward" in vars(found)
        or found._forward_hooks
        or found._forward_pre_hooks
        or found._backward_hooks
        or found._backward_pre_hooks
    )
