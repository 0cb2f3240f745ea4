"""`fuse`: give a stock diffusers model the fused operations, in place, and take them back with `restore`.

A module is swapped by changing its class. Parameters, buffers, names, hooks and LoRA layers stay the objects they
were, so state dicts, optimisers, adapters and exports see no difference, and there is nothing to copy back.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from .classes import become, kind
from .norm import FusedIntoNorm, GroupNorm, GroupNormSiLU, LayerNorm
from .norm import why_not_fused as why_not_the_norm
from .report import FuseReport

OPERATIONS = (
    "group_norm_silu",
    "layer_norm",
    "geglu",
    "linear_geglu",
    "self_attention",
    "cross_attention",
    "vae_attention",
    "upsample_conv2d",
)
"""Names that `ops=` takes: the operations that modules of diffusers and transformers can be swapped for."""


def fuse(model: nn.Module, *, ops: Iterable[str] | None = None, training: bool = True) -> FuseReport:
    """Swap every module of `model` that has a fused counterpart, in place.

    Swapped are diffusers' `ResnetBlock2D` (both GroupNorm+SiLU pairs, the second with the time embedding's shift),
    `BasicTransformerBlock` (residuals added in the LayerNorm after them), `Attention` with the default processor,
    `GEGLU`, `Upsample2D` with its convolution, the GroupNorm+SiLU before the output convolution of UNet, VAE encoder
    and decoder, and the GroupNorms and LayerNorms that stand alone. Subclasses, modules whose `forward` is overridden
    and attention that does more (an IP-Adapter's processor, the causal mask of CLIP) are left as they are and listed in
    the report. Gradients flow; a second call changes nothing but what other arguments ask for.

    `state_dict`, LoRA (before or after), gradient checkpointing, `torch.compile`, channels_last, autocast and FSDP2
    (before or after) work as with the stock modules.

    Args:
        model: UNet2DConditionModel, ControlNetModel, AutoencoderKL, CLIPTextModel, CLIPTextModelWithProjection, or any
            module that contains their parts.
        ops: names of the operations to swap in, of `OPERATIONS`; None for all. What they leave out is in the report.
        training: False takes modules made for inference: the projection inside GEGLU becomes part of the operation
            (its backward projects again), upsamplers keep the sums of their weights, and, unless `ops` chooses,
            convolutions and linear layers on a CPU keep their weights in its order. The weights are then taken as they
            are now: after a write through ``.data``, as peft's merges do, call `fuse` again. Gradients still flow.

    Returns:
        what was swapped and what was not, by module name.

    Raises:
        ValueError: `ops` has a name that is not one of `OPERATIONS`.
    """
    wanted = _checked(ops)
    report = FuseReport()
    modules = dict(model.named_modules())
    for swap in _swaps(training):
        for name, module in modules.items():
            if isinstance(module, swap.stock) and not (swap.leaf and _inside(name, report.kept)):
                _swap_one(name, module, swap, wanted, report)
    _prepare_products(modules, report, wanted=ops is None and not training)
    for name, module in modules.items():
        if _ends_in_norm_and_silu(module):
            become(module.conv_norm_out, GroupNormSiLU)
            module.conv_act = FusedIntoNorm()
            report.replaced[f"{name}.conv_norm_out".lstrip(".")] = "conv_norm_out: GroupNorm+SiLU"
        elif type(module).__name__ == "CLIPAttention":
            report.kept[name] = "it runs transformers' attention, causal for text, which the operations are not"
    return report


def restore(model: nn.Module) -> int:
    """Undo `fuse` in place; returns how many modules went back to their stock class."""
    from .products import STOCK

    stock: dict[type[nn.Module], type[nn.Module]] = {GroupNormSiLU: nn.GroupNorm}
    stock.update({fused: swap.stock for swap in _swaps(training=True) for fused in swap.family})
    stock.update(STOCK)
    count = 0
    for module in model.modules():
        if type(getattr(module, "conv_act", None)) is FusedIntoNorm:
            module.conv_act = nn.SiLU()
        if kind(module) in stock:
            _forget(module)
            become(module, stock[kind(module)])
            count += 1
    return count


@dataclass(frozen=True)
class _Swap:
    """A stock class and what may take its place.

    Attributes:
        stock: the class.
        options: for a module, the operations that do it, the best first, each with the class that runs on it.
        what: for the report; the operation is filled in.
        refuse: says why a module is not swapped, or None.
        parts: the names of the norms inside that change with it, and their new class.
        family: every class in `options`; fused modules change from one to another.
        leaf: whether it is left alone inside a module that was.
    """

    stock: type[nn.Module]
    options: Callable[[Any], dict[str, type[nn.Module]]]
    family: tuple[type[nn.Module], ...]
    what: str
    refuse: Callable[[Any], str | None] = lambda module: None
    parts: tuple[tuple[str, ...], type[nn.Module] | None] = ((), None)
    leaf: bool = False


def _swaps(training: bool) -> tuple[_Swap, ...]:
    """What can be swapped, the modules before the norms they own."""
    from diffusers.models.activations import GEGLU as StockGEGLU  # noqa: N811 (a class)
    from diffusers.models.attention import BasicTransformerBlock as StockTransformerBlock
    from diffusers.models.attention_processor import Attention as StockAttention
    from diffusers.models.resnet import ResnetBlock2D as StockResnetBlock2D
    from diffusers.models.upsampling import Upsample2D as StockUpsample2D

    from . import attention, sampling, transformer
    from .feed_forward import GEGLU, ProjectedGEGLU
    from .resnet import ResnetBlock2D

    up = sampling.Upsample2D if training else sampling.PreparedUpsample2D
    gates: dict[str, type[nn.Module]] = {"geglu": GEGLU, "linear_geglu": ProjectedGEGLU}
    gates = gates if training else dict(reversed(gates.items()))
    return (
        _Swap(
            StockResnetBlock2D,
            lambda module: {"group_norm_silu": ResnetBlock2D},
            (ResnetBlock2D,),
            "ResnetBlock2D: two GroupNorm+SiLU, time embedding",
            _unusual_block,
            (("norm1", "norm2"), GroupNormSiLU),
        ),
        _Swap(
            StockTransformerBlock,
            lambda module: {"layer_norm": transformer.BasicTransformerBlock},
            (transformer.BasicTransformerBlock,),
            "BasicTransformerBlock: residuals added in LayerNorm",
            transformer.why_not_fused,
            (("norm1", "norm2", "norm3"), LayerNorm),
        ),
        _Swap(StockGEGLU, lambda module: gates, (GEGLU, ProjectedGEGLU), "GEGLU: {}"),
        _Swap(
            StockUpsample2D,
            lambda module: {"upsample_conv2d": up},
            (sampling.Upsample2D, sampling.PreparedUpsample2D),
            "Upsample2D: with its convolution",
            sampling.why_not_fused,
        ),
        _Swap(nn.GroupNorm, lambda module: {"group_norm_silu": GroupNorm}, (GroupNorm,), "GroupNorm", leaf=True),
        _Swap(
            nn.LayerNorm,
            lambda module: {"layer_norm": LayerNorm},
            (LayerNorm,),
            "LayerNorm",
            why_not_the_norm,
            leaf=True,
        ),
        # After the norms: attention that stays may keep a fused norm inside.
        _Swap(
            StockAttention,
            lambda module: {attention.operation(module): attention.Attention},
            (attention.Attention,),
            "Attention: {}",
            attention.why_not_fused,
        ),
    )


def _swap_one(name: str, module: nn.Module, swap: _Swap, wanted: frozenset[str], report: FuseReport) -> None:
    """Swaps a module, or writes down why not."""
    _forget(module)
    now, options = kind(module), swap.options(module)
    chosen = next((operation for operation in options if operation in wanted), None)
    if chosen is not None and now in swap.family and now is not options[chosen]:
        reason = None
    elif issubclass(now, swap.family):
        return
    elif chosen is None:
        reason = f"{' or '.join(options)} was not asked for"
    else:
        reason = _not_plain(module, swap.stock) or swap.refuse(module)
    if reason is not None or chosen is None:
        report.kept[name] = str(reason)
        return
    become(module, options[chosen])
    names, norm = swap.parts
    for part in (getattr(module, n) for n in names):
        if part is not None and norm is not None and not issubclass(kind(part), norm):
            become(part, norm)
    report.replaced[name] = swap.what.format(chosen)


def _checked(ops: Iterable[str] | None) -> frozenset[str]:
    """The operations to swap in; raises ValueError for a name that is none of them."""
    if ops is None:
        return frozenset(OPERATIONS)
    if isinstance(ops, str):
        raise ValueError(f"ops is the string {ops!r}; it takes a collection of names: ops=({ops!r},)")
    found = frozenset(ops)
    for name in sorted(found - set(OPERATIONS)):
        near = difflib.get_close_matches(name, OPERATIONS, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"ops has {name!r}, which no module can be swapped for; allowed: {', '.join(OPERATIONS)}{hint}"
        )
    return found


def _prepare_products(modules: dict[str, nn.Module], report: FuseReport, *, wanted: bool) -> None:
    """Makes convolutions and linear layers keep their weight in the order of the CPU's kernels, or be stock again."""
    from .products import PREPARED, STOCK, can_prepare

    for name, module in modules.items():
        if kind(module) in STOCK:
            _forget(module)
            if not wanted:
                become(module, STOCK[kind(module)])
        elif wanted and kind(module) in PREPARED and can_prepare(module):
            report.replaced[name] = f"{kind(module).__name__}: its weight in the order of the CPU's kernels"
            become(module, PREPARED[kind(module)])


def _forget(module: nn.Module) -> None:
    """Drops what a module made for inference has made from its weights."""
    forget = getattr(module, "forget", None)
    if kind(module).__module__.startswith(__package__ or "") and forget is not None:
        forget()


def _not_plain(module: Any, stock: type) -> str | None:
    if kind(module) is not stock:
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
    norm = getattr(module, "conv_norm_out", None)
    return (
        any(base.__name__ in kinds and base.__module__.startswith("diffusers.models.") for base in type(module).__mro__)
        and isinstance(norm, nn.GroupNorm)
        and kind(norm) is GroupNorm
        and type(getattr(module, "conv_act", None)) is nn.SiLU
    )


def _inside(name: str, owners: dict[str, str]) -> bool:
    return any(name.startswith(owner + ".") for owner in owners)
