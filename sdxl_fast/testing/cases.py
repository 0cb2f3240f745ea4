# SPDX-License-Identifier: Apache-2.0
"""The inputs ops are tested and timed on: every distinct SDXL shape, read off the models themselves, and odd ones.

The SDXL U-Net, VAE and text encoders are built from their published configurations on the meta device (no memory, no
arithmetic) and run once; hooks note what every GroupNorm, LayerNorm, GEGLU and attention receives. That takes several
seconds, so the shapes of a 1024 px image are kept in ``sdxl_1024.json``: ``python -m sdxl_fast.testing.cases`` writes
it, a test traces anew and compares.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

_TABLE = Path(__file__).parent / "sdxl_1024.json"

UNET_CONFIG: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "attention_head_dim": (5, 10, 20),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
VAE_CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 1024,
}

TEXT_CONFIGS: tuple[dict[str, Any], ...] = (
    {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
    {"hidden_size": 1280, "intermediate_size": 5120, "num_attention_heads": 20},
)


@dataclass(frozen=True)
class Case:
    """One set of arguments for an op.

    Attributes:
        name: readable, used as the test id.
        shape: of the lead tensor.
        options: the op's other arguments, and what the suite of the op understands beside them.
        kind: distribution of the values: ``normal``, ``small`` (1e-2), ``offset`` (mean 30), ``constant``, ``wide``
            (a few sigmas to overflow of the activation's exponential).
    """

    name: str
    shape: tuple[int, ...]
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    kind: str = "normal"

    @property
    def numel(self) -> int:
        """Elements of the lead tensor."""
        return math.prod(self.shape)

    def __str__(self) -> str:
        return self.name


def draw(shape: tuple[int, ...], kind: str, generator: torch.Generator) -> torch.Tensor:
    """Returns float32 values of the named distribution."""
    x = torch.randn(shape, generator=generator)
    if kind == "normal":
        return x
    if kind == "small":
        return 1e-2 * x
    if kind == "offset":
        return x + 30
    if kind == "constant":
        return torch.full(shape, 0.75)
    if kind == "wide":
        return 40 * x
    raise ValueError(f"unknown kind {kind!r}")


def _label(shape: Iterable[int]) -> str:
    return "x".join(str(size) for size in shape)


def _is_group_norm_with_silu(name: str) -> bool:
    return name.rpartition(".")[2] in ("norm1", "norm2", "conv_norm_out")


def _run_hooked(model: torch.nn.Module, call: Any, found: dict[tuple[Any, ...], Case]) -> None:
    """Runs ``call`` and adds the distinct inputs of the model's norms, gates and attentions to ``found``."""
    hooks = []
    modules = dict(model.named_modules())

    def note_norm(name: str, module: torch.nn.GroupNorm, x: torch.Tensor) -> None:
        shape = tuple(x.shape)
        if len(shape) == 3:  # the VAE's attention flattens a square map
            side = math.isqrt(shape[2])
            shape = (*shape[:2], side, shape[2] // side)
        owner = modules[name.rpartition(".")[0]] if "." in name else model
        options = {
            "num_groups": module.num_groups,
            "eps": module.eps,
            "activation": "silu" if _is_group_norm_with_silu(name) else "none",
            "shift": name.endswith("norm2") and getattr(owner, "time_emb_proj", None) is not None,
        }
        key = ("group_norm_silu", shape, *options.values())
        suffix = ("-silu" if options["activation"] == "silu" else "") + ("-shift" if options["shift"] else "")
        found.setdefault(key, Case(_label(shape) + suffix, shape, options))

    for name, module in modules.items():
        if isinstance(module, torch.nn.GroupNorm):
            hook = functools.partial(lambda n, m, args: note_norm(n, m, args[0]), name)
            hooks.append(module.register_forward_pre_hook(hook))
        elif isinstance(module, torch.nn.LayerNorm):

            def note_layer_norm(module: torch.nn.LayerNorm, args: Any) -> None:
                shape = tuple(args[0].shape)
                found.setdefault(("layer_norm", shape), Case(_label(shape), shape, {"eps": module.eps}))

            hooks.append(module.register_forward_pre_hook(note_layer_norm))
        elif type(module).__name__ == "GEGLU":

            def note_geglu(_module: torch.nn.Module, _args: Any, projected: torch.Tensor) -> None:
                shape = tuple(projected.shape)
                found.setdefault(("geglu", shape), Case(_label(shape), shape))

            hooks.append(module.proj.register_forward_hook(note_geglu))
        elif type(module).__name__ == "Attention":
            note_attention = functools.partial(_note_attention, found)
            hooks.append(module.register_forward_pre_hook(note_attention, with_kwargs=True))
    hooks += _hook_products(modules, found)
    try:
        with torch.no_grad():
            call()
    finally:
        for handle in hooks:
            handle.remove()


def _note_attention(found: dict[tuple[Any, ...], Case], module: Any, args: Any, kwargs: dict[str, Any]) -> None:
    """Notes the q that a module of diffusers' `Attention` makes of its input, and for other keys their number."""
    x, context = args[0], kwargs.get("encoder_hidden_states")
    tokens = x.shape[1] if x.ndim == 3 else x.shape[2] * x.shape[3]
    head_dim = module.to_q.out_features // module.heads
    op = "vae_attention" if module.heads == 1 else "self_attention" if context is None else "cross_attention"
    heads = () if module.heads == 1 else (module.heads,)
    shape = (x.shape[0], tokens, *heads, head_dim)
    options = {} if context is None else {"keys": context.shape[1]}
    suffix = "".join(f"-keys{keys}" for keys in options.values())
    found.setdefault((op, shape, *options.values()), Case(_label(shape) + suffix, shape, options))


def _hook_products(modules: dict[str, Any], found: dict[tuple[Any, ...], Case]) -> list[Any]:
    """Hooks the linear layers and convolutions: the input's shape, and in the options what the weight adds to it.

    What is added to the input of its block in the next step has the option ``residual``.
    """

    letters = {"out_channels": "to", "out_features": "to", "kernel_size": "k", "stride": "s", "padding": "p"}

    def note(op: str, options: dict[str, Any], _module: torch.nn.Module, args: Any) -> None:
        shape = tuple(args[0].shape)
        suffix = "".join(f"-{letters[key]}{value}" for key, value in options.items() if key in letters)
        suffix += "-residual" if options.get("residual") else ""
        found.setdefault((op, shape, *options.values()), Case(_label(shape) + suffix, shape, options))

    hooks, taken = [], set()
    for name, module in modules.items():
        op, options = "", {}
        if type(module).__name__ == "Upsample2D":
            op, options = "upsample_conv2d", {"out_channels": module.conv.out_channels}
            taken.add(f"{name}.conv")
        elif type(module).__name__ == "GEGLU":
            op, options = "linear_geglu", {"out_features": module.proj.out_features // 2}
            taken.add(f"{name}.proj")
        elif isinstance(module, torch.nn.Linear) and name not in taken:
            residual = name.endswith((".to_out.0", ".ff.net.2"))
            op, options = "linear", {"out_features": module.out_features, "residual": residual}
        elif isinstance(module, torch.nn.Conv2d) and name not in taken:
            options = {
                "out_channels": module.out_channels,
                "kernel_size": module.kernel_size[0],
                "stride": module.stride[0],
                "padding": module.padding[0],
                "residual": name.endswith(".conv2"),
            }
            op = "conv2d"
        if op:
            hooks.append(module.register_forward_pre_hook(functools.partial(note, op, options)))
    return hooks


def sdxl_cases(op: str, *, height: int = 1024, width: int = 1024, batch: int = 1) -> tuple[Case, ...]:
    """Returns the distinct shapes of ``op`` in SDXL's networks for one image size.

    Args:
        op: ``"group_norm_silu"``, ``"layer_norm"``, ``"geglu"``, one of the attentions, or ``"forward_diffusion"`` for
            any op on latents.
        height, width: of the image in pixels, multiples of 32. Any size but 1024 x 1024 is traced anew.
        batch: images at a time.

    Raises:
        ValueError: for an op that these models do not contain.
    """
    if op == "forward_diffusion":
        shape = (batch, 4, height // 8, width // 8)
        return (Case(_label(shape), shape),)
    found = _recorded() if (height, width) == (1024, 1024) else trace(height, width)
    if op not in found:
        raise ValueError(f"op must be {', '.join(map(repr, found))} or 'forward_diffusion', got {op!r}")
    return tuple(_with_batch(case, batch) for case in found[op])


def _with_batch(case: Case, batch: int) -> Case:
    shape = (batch, *case.shape[1:])
    return replace(case, name=_label(shape) + case.name.removeprefix(_label(case.shape)), shape=shape)


@functools.cache
def _recorded() -> dict[str, tuple[Case, ...]]:
    table = json.loads(_TABLE.read_text())
    return {op: tuple(Case(c["name"], tuple(c["shape"]), c["options"]) for c in cases) for op, cases in table.items()}


@functools.cache
def trace(height: int, width: int) -> dict[str, tuple[Case, ...]]:
    """Returns ``{op: distinct cases}`` of one image of this size, by running the models on the meta device."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    found: dict[tuple[Any, ...], Case] = {}
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNET_CONFIG)
        latents = torch.empty(1, 4, height // 8, width // 8)
        conditions = {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}
        prompt, timesteps = torch.empty(1, 77, 2048), torch.empty(1, dtype=torch.int64)
        _run_hooked(unet, lambda: unet(latents, timesteps, prompt, added_cond_kwargs=conditions), found)
        for text_config in TEXT_CONFIGS:  # every layer of an encoder sees the same shape
            encoder = CLIPTextModel(CLIPTextConfig(**text_config, num_hidden_layers=1, max_position_embeddings=77))
            tokens = torch.zeros(1, 77, dtype=torch.int64)
            _run_hooked(encoder, functools.partial(encoder, tokens), found)
        vae = AutoencoderKL.from_config(VAE_CONFIG)
        image = torch.empty(1, 3, height, width)
        _run_hooked(vae, lambda: (vae.encoder(image), vae.decoder(latents)), found)
    ops = dict.fromkeys(key[0] for key in found)
    return {op: tuple(case for key, case in found.items() if key[0] == op) for op in ops}


def shrunk(cases: Iterable[Case], *, longest: int, dims: tuple[int, ...] | None = None) -> tuple[Case, ...]:
    """Returns the cases with the dimensions ``dims`` cut to ``longest``, duplicates dropped.

    By default those of the map of [N,C,H,W], or the tokens of [N,tokens,2C]: channel counts and groups, on which the
    vector paths and the tilings depend, stay SDXL's.
    """
    kept: dict[tuple[Any, ...], Case] = {}
    for case in cases:
        spatial = dims or ((2, 3) if len(case.shape) == 4 else (1,))
        shape = tuple(min(size, longest) if dim in spatial else size for dim, size in enumerate(case.shape))
        suffix = case.name.removeprefix(_label(case.shape))
        kept.setdefault((shape, *case.options.values()), replace(case, name=_label(shape) + suffix, shape=shape))
    return tuple(kept.values())


def _write_table() -> None:
    ops = {
        op: [{"name": case.name, "shape": case.shape, "options": case.options} for case in cases]
        for op, cases in trace(1024, 1024).items()
    }
    lines = [
        f"  {json.dumps(op)}: [\n    " + ",\n    ".join(map(json.dumps, rows)) + "\n  ]" for op, rows in ops.items()
    ]
    _TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    _write_table()
