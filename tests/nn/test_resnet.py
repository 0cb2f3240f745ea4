"""The residual block equals diffusers', forward and backward, with and without time embedding and resampling."""

from __future__ import annotations

import pytest
import torch
from diffusers.models import resnet

from sdxl_fast.nn import ResnetBlock2D
from sdxl_fast.testing.compare import assert_all, compare

CASES = {
    "unet": {"in_channels": 16, "out_channels": 24, "temb_channels": 10},
    "same width": {"in_channels": 16, "temb_channels": 10},
    "vae": {"in_channels": 16, "out_channels": 24, "temb_channels": None, "eps": 1e-6},
    "up": {"in_channels": 16, "temb_channels": 10, "up": True},
    "down": {"in_channels": 16, "temb_channels": 10, "down": True},
    "plain embedding": {"in_channels": 16, "temb_channels": 10, "skip_time_act": True},
    "scaled": {"in_channels": 16, "temb_channels": 10, "output_scale_factor": 1.5},
}


def _results(block: torch.nn.Module, x: torch.Tensor, temb: torch.Tensor | None) -> dict[str, torch.Tensor]:
    block.zero_grad()
    x = x.clone().requires_grad_()
    y = block(x, temb)
    y.square().mean().backward()
    assert x.grad is not None
    found = {"y": y, "dx": x.grad}
    return found | {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("arguments", CASES.values(), ids=CASES)
def test_equals_the_stock_block(arguments: dict) -> None:
    torch.manual_seed(0)
    stock = resnet.ResnetBlock2D(groups=4, **arguments)
    fused = ResnetBlock2D(groups=4, **arguments)
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(2, 16, 8, 6)
    temb = torch.randn(2, 10) if arguments["temb_channels"] else None
    got, baseline = _results(fused, x, temb), _results(stock, x, temb)
    oracle = _results(stock.double(), x.double(), None if temb is None else temb.double())
    assert got.keys() == baseline.keys()
    rows = 2 * 8 * 6 * 16  # what a weight gradient sums over, at least
    assert_all(
        [
            compare(got[name], oracle[name], baseline[name], op="resnet", tensor=name, gradient=name != "y", rows=rows)
            for name in oracle
        ]
    )


def test_refuses_what_it_does_not_compute() -> None:
    with pytest.raises(ValueError, match="time_embedding_norm"):
        ResnetBlock2D(in_channels=16, groups=4, time_embedding_norm="scale_shift")
    with pytest.raises(ValueError, match="non_linearity"):
        ResnetBlock2D(in_channels=16, groups=4, non_linearity="gelu")
