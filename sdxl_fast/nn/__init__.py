"""Drop-in modules on the fused operations, with the stock modules' parameter names, and `fuse` to swap them in."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .attention import Attention as Attention
    from .feed_forward import GEGLU as GEGLU
    from .feed_forward import ProjectedGEGLU as ProjectedGEGLU
    from .norm import GroupNorm as GroupNorm
    from .norm import GroupNormSiLU as GroupNormSiLU
    from .norm import LayerNorm as LayerNorm
    from .products import PreparedConv2d as PreparedConv2d
    from .products import PreparedLinear as PreparedLinear
    from .report import FuseReport as FuseReport
    from .resnet import ResnetBlock2D as ResnetBlock2D
    from .sampling import PreparedUpsample2D as PreparedUpsample2D
    from .sampling import Upsample2D as Upsample2D
    from .swap import OPERATIONS as OPERATIONS
    from .swap import fuse as fuse
    from .swap import restore as restore
    from .transformer import BasicTransformerBlock as BasicTransformerBlock

# Loaded on first use: the norms need torch alone, the others subclass diffusers' modules, which take seconds to import.
_HOME = {
    "OPERATIONS": "swap",
    "Attention": "attention",
    "BasicTransformerBlock": "transformer",
    "FuseReport": "report",
    "GEGLU": "feed_forward",
    "GroupNorm": "norm",
    "GroupNormSiLU": "norm",
    "LayerNorm": "norm",
    "PreparedConv2d": "products",
    "PreparedLinear": "products",
    "PreparedUpsample2D": "sampling",
    "ProjectedGEGLU": "feed_forward",
    "ResnetBlock2D": "resnet",
    "Upsample2D": "sampling",
    "fuse": "swap",
    "restore": "swap",
}

__all__ = [
    "GEGLU",
    "OPERATIONS",
    "Attention",
    "BasicTransformerBlock",
    "FuseReport",
    "GroupNorm",
    "GroupNormSiLU",
    "LayerNorm",
    "PreparedConv2d",
    "PreparedLinear",
    "PreparedUpsample2D",
    "ProjectedGEGLU",
    "ResnetBlock2D",
    "Upsample2D",
    "fuse",
    "restore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
