"""`fuse`: give a stock diffusers model the fused operations, in place, and take them back with `restore`.

A module is swapped by changing its class. Parameters, buffers, names, hooks and LoRA layers stay the objects they
were, so state dicts, optimisers, adapters and exports see no difference, and there is nothing to copy back.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .norm import FusedIntoNorm, GroupNorm, GroupNormSiLU


@dataclass(slots=True)
class FuseReport:
    """What `fuse` did: module name to the operation it now runs, and module name to the reason it was left alone."""

    replaced: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        counts = Counter(self.replaced.values())
        lines = [f"{count:4d} {what}" for what, count in sorted(counts.items())] or ["nothing to fuse"]
        return "\n".join(lines + [f"  kept {name}: {reason}" for name, reason in self.kept.items()])


def fuse(model: nn.Module) -> FuseReport:
    """Swap every module of `model` that has a fused counterpart, in place.

    Swapped are diffusers' `ResnetBlock2D` (both GroupNorm+SiLU pairs, the second with the time embedding's shift),
    `Attention` with the default processor, `GEGLU`, `Upsample2D` with its convolution, the GroupNorm+SiLU before the
    output convolution of UNet, VAE encoder and decoder, and the GroupNorms that stand alone. Subclasses, modules whose
    `forward` is overridden and attention that does more (an IP-Adapter's processor, the causal mask of CLIP) are left
    as they are and listed in the report. Gradients flow; a second call changes nothing.

    Wrap in FSDP2 afterwards: `fully_shard` makes the modules it wraps subclasses of their own.

    Args:
        model: UNet2DConditionModel, ControlNetModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, or any
            module that contains their parts.

    Returns:
        what was swapped and what was not, by module name.
    """
    from diffusers.models.activations import GEGLU as StockGEGLU  # noqa: N811 (a class)
    from diffusers.models.resnet import ResnetBlock2D as StockResnetBlock2D
    from diffusers.models.upsampling import Upsample2D as StockUpsample2D

    from .feed_forward import GEGLU
    from .resnet import ResnetBlock2D
    from .sampling import Upsample2D, why_not_fused

    report = FuseReport()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        if isinstance(module, StockResnetBlock2D) and not isinstance(module, ResnetBlock2D):
            reason = _not_plain(module, StockResnetBlock2D) or _unusual_block(module)
            if reason:
                report.kept[name] = reason
            else:
                module.__class__ = ResnetBlock2D
                module.norm1.__class__ = module.norm2.__class__ = GroupNormSiLU
                report.replaced[name] = "ResnetBlock2D: two GroupNorm+SiLU, time embedding"
        elif isinstance(module, StockGEGLU) and not isinstance(module, GEGLU):
            if reason := _not_plain(module, StockGEGLU):
                report.kept[name] = reason
            else:
                module.__class__ = GEGLU
                report.replaced[name] = "GEGLU: gate"
        elif isinstance(module, StockUpsample2D) and not isinstance(module, Upsample2D):
            if reason := _not_plain(module, StockUpsample2D) or why_not_fused(module):
                report.kept[name] = reason
            else:
                module.__class__ = Upsample2D
                report.replaced[name] = "Upsample2D: with its convolution"
        elif _ends_in_norm_and_silu(module):
            norm_name = f"{name}.conv_norm_out".lstrip(".")
            if not _not_plain(module.conv_norm_out, nn.GroupNorm):
                module.conv_norm_out.__class__ = GroupNormSiLU  # type: ignore[assignment, union-attr]
                module.conv_act = FusedIntoNorm()
                report.replaced[norm_name] = "conv_norm_out: GroupNorm+SiLU"
    for name, module in modules.items():
        if isinstance(module, nn.GroupNorm) and not isinstance(module, GroupNorm) and not _inside(name, report.kept):
            if reason := _not_plain(module, nn.GroupNorm):
                report.kept[name] = reason
            else:
                module.__class__ = GroupNorm
                report.replaced[name] = "GroupNorm"
    _fuse_attention(modules, report)
    return report


def _fuse_attention(modules: dict[str, nn.Module], report: FuseReport) -> None:
    """Swaps diffusers' `Attention`; after the norms, since one that stays may keep a fused norm inside."""
    from diffusers.models.attention_processor import Attention as StockAttention

    from .attention import Attention, operation, why_not_fused

    for name, module in modules.items():
        if isinstance(module, StockAttention) and not isinstance(module, Attention):
            if reason := _not_plain(module, StockAttention) or why_not_fused(module):
                report.kept[name] = reason
            else:
                module.__class__ = Attention
                report.replaced[name] = f"Attention: {operation(module)}"
        elif type(module).__name__ == "CLIPAttention":
            report.kept[name] = "it runs transformers' attention, causal for text, which the operations are not"


def restore(model: nn.Module) -> int:
    """Undo `fuse` in place; returns how many modules went back to their stock class."""
    from diffusers.models.activations import GEGLU as StockGEGLU  # noqa: N811 (a class)
    from diffusers.models.attention_processor import Attention as StockAttention
    from diffusers.models.resnet import ResnetBlock2D as StockResnetBlock2D
    from diffusers.models.upsampling import Upsample2D as StockUpsample2D

    from .attention import Attention
    from .feed_forward import GEGLU
    from .resnet import ResnetBlock2D
    from .sampling import Upsample2D

    stock: dict[type[nn.Module], type[nn.Module]] = {
        Attention: StockAttention,
        ResnetBlock2D: StockResnetBlock2D,
        GEGLU: StockGEGLU,
        Upsample2D: StockUpsample2D,
        GroupNorm: nn.GroupNorm,
        GroupNormSiLU: nn.GroupNorm,
    }
    count = 0
    for module in model.modules():
        if type(getattr(module, "conv_act", None)) is FusedIntoNorm:
            module.conv_act = nn.SiLU()
        if type(module) in stock:
            module.__class__ = stock[type(module)]
            count += 1
    return count


def _not_plain(module: Any, stock: type) -> str | None:
    if type(module) is not stock:
        return f"{type(module).__name__} is a subclass of {stock.__name__}; its forward may differ"
    if "forward" in vars(module):
        return "its forward is overridden on the instance (an offloading hook?)"
    return None


def _unusual_block(block: Any) -> str | None:
    # the VAE decoder's blocks say "group", which is the same thing without a time embedding
    if block.time_embedding_norm != "default" and (
        block.time_embedding_norm != "group" or block.time_emb_proj is not None
    ):
        return f"time_embedding_norm is {block.time_embedding_norm!r}, only 'default' is fused"
    if type(block.nonlinearity) is not nn.SiLU:
        return f"its activation is {type(block.nonlinearity).__name__}, only SiLU is fused"
    return _not_plain(block.norm1, nn.GroupNorm) or _not_plain(block.norm2, nn.GroupNorm)


def _ends_in_norm_and_silu(module: Any) -> bool:
    """UNet2DConditionModel and the VAE's Encoder and Decoder apply `conv_norm_out`, `conv_act`, `conv_out` in turn."""
    kinds = ("UNet2DConditionModel", "Encoder", "Decoder")
    return (
        any(kind.__name__ in kinds and kind.__module__.startswith("diffusers.models.") for kind in type(module).__mro__)
        and isinstance(getattr(module, "conv_norm_out", None), nn.GroupNorm)
        and type(getattr(module, "conv_act", None)) is nn.SiLU
    )


def _inside(name: str, owners: dict[str, str]) -> bool:
    return any(name.startswith(owner + ".") for owner in owners)
