"""Packed code on SDXL's own structure: three levels, transformers ten layers deep; its true size is marked large."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_fast.inference.accelerated import attach, runner_of
from sdxl_fast.models.config import SDXL, TOY, PipelineConfig, UNetConfig, VaeConfig, build_unet, build_vae

SMALL = replace(
    TOY,
    unet=UNetConfig(channels=(32, 64, 64), transformer_layers=(0, 2, 10), head_dim=16, norm_groups=8, time_id_dim=8),
    vae=VaeConfig(channels=(8, 16, 32, 32), norm_groups=8),
    image_size=128,
)


def _inputs(config: PipelineConfig, batch: int, side: int) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    width = config.text_encoder.width + config.text_encoder_2.width
    ids = torch.tensor([[8.0 * side, 8.0 * side, 0.0, 0.0, 8.0 * side, 8.0 * side]]).expand(batch, -1)
    pooled = torch.randn(batch, config.text_encoder_2.projection)
    return torch.randn(batch, 4, side, side), torch.randn(batch, 77, width), {"text_embeds": pooled, "time_ids": ids}


@torch.no_grad()
def _unet(unet: Any, dtype: torch.dtype, inputs: Any, control: tuple[Tensor, ...] = ()) -> Tensor:
    sample, text, added = inputs
    added = {name: tensor.to(dtype) for name, tensor in added.items()}
    extra: dict[str, Any] = {}
    if control:
        *down, middle = [part.to(dtype) for part in control]
        extra = {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": middle}
    y: Tensor = unet(sample.to(dtype), 999, text.to(dtype), added_cond_kwargs=added, return_dict=False, **extra)[0]
    return y.double()


def _residuals(unet: Any, inputs: Any) -> tuple[Tensor, ...]:
    """One for every map that the UNet passes over its bridge, then one for the middle."""
    shapes: list[torch.Size] = []
    modules = [unet.conv_in]
    for block in unet.down_blocks:
        pairs = block.attentions if hasattr(block, "attentions") else block.resnets
        modules += [*pairs, *(block.downsamplers or ())]

    def note(module: Any, args: Any, output: Any) -> None:
        shapes.append((output if isinstance(output, Tensor) else output[0]).shape)

    hooks = [module.register_forward_hook(note) for module in (*modules, unet.mid_block)]
    _unet(unet, torch.float32, inputs)
    for hook in hooks:
        hook.remove()
    return tuple(0.1 * torch.randn(shape) for shape in shapes)


def _check(config: PipelineConfig, side: int, *, low: torch.dtype, high: torch.dtype, controlled: bool) -> None:
    """The packed networks in `low` err at most twice as much as stock ones, against stock ones in `high`."""
    torch.manual_seed(0)
    unet, vae = build_unet(config).eval(), build_vae(config).eval()
    inputs = _inputs(config, 1, side)
    control = _residuals(unet, inputs) if controlled else ()
    wanted = _unet(unet.to(high), high, inputs, control)
    baseline = _unet(unet.to(low), low, inputs, control)
    attach(unet)
    got = _unet(unet, low, inputs, control)
    runner = runner_of(unet)
    assert runner is not None and runner.use.packed == 1
    floor = torch.finfo(low).eps * wanted.norm()
    assert (got - wanted).norm() <= 2 * (baseline - wanted).norm() + floor
    assert wanted.std() > 1e-3
    with torch.no_grad():
        latents = inputs[0]
        pictures = vae.to(high).decode(latents.to(high)).sample.double()
        stock = copy.deepcopy(vae.to(low)).decode(latents.to(low)).sample.double()
        attach(vae)
        mine = vae.decode(latents.to(low)).sample.double()
    assert (mine - pictures).norm() <= 2 * (stock - pictures).norm() + torch.finfo(low).eps * pictures.norm()


@pytest.mark.parametrize("controlled", [False, True], ids=["alone", "with ControlNet"])
@pytest.mark.parametrize("low", [torch.float32, torch.bfloat16], ids=str)
def test_three_levels(low: torch.dtype, controlled: bool) -> None:
    _check(SMALL, 16, low=low, high=torch.float64, controlled=controlled)


@pytest.mark.large
@pytest.mark.parametrize("side", [32, 64], ids=["256 px", "512 px"])
def test_the_published_size(side: int) -> None:
    _check(SDXL, side, low=torch.bfloat16, high=torch.float32, controlled=False)
