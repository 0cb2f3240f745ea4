"""The norms compute what the stock modules compute, for every rank that diffusers feeds them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from sdxl_fast.nn import GroupNorm, GroupNormSiLU
from sdxl_fast.testing.compare import assert_all, compare

SHAPES = {"picture": (2, 24, 5, 7), "tokens": (2, 24, 35), "vector": (3, 24), "volume": (1, 24, 2, 3, 4)}


def _pair(kind: type[GroupNorm], dtype: torch.dtype) -> tuple[GroupNorm, nn.Module]:
    fused = kind(8, 24, eps=1e-6).to(dtype)
    with torch.no_grad():
        fused.weight.uniform_(0.5, 1.5)
        fused.bias.uniform_(-0.5, 0.5)
    norm = nn.GroupNorm(8, 24, eps=1e-6).to(dtype)
    norm.load_state_dict(fused.state_dict())
    return fused, nn.Sequential(norm, nn.SiLU()) if kind is GroupNormSiLU else norm


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("kind", [GroupNorm, GroupNormSiLU])
def test_equals_the_stock_modules(kind: type[GroupNorm], shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    fused, stock = _pair(kind, torch.float32)
    x = torch.randn(shape)
    oracle = stock.double()(x.double())
    assert_all([compare(fused(x), oracle, stock.float()(x), op=kind.__name__)])


def test_tokens_keep_their_strides() -> None:
    """The VAE's attention passes a transposed view; copying it to another layout would cost a pass over memory."""
    fused, _ = _pair(GroupNorm, torch.float32)
    tokens_NLC = torch.randn(2, 35, 24)
    assert fused(tokens_NLC.transpose(1, 2)).transpose(1, 2).is_contiguous()


def test_shift_is_added_before_the_statistics() -> None:
    torch.manual_seed(0)
    fused, stock = _pair(GroupNormSiLU, torch.float32)
    x, shift = torch.randn(2, 24, 5, 7), torch.randn(2, 24)
    shifted = x + shift[:, :, None, None]
    oracle = stock.double()(x.double() + shift.double()[:, :, None, None])
    assert_all([compare(fused(x, shift), oracle, stock.float()(shifted), op="shift")])


def test_bfloat16_beside_float32_parameters_stays_bfloat16() -> None:
    fused, _ = _pair(GroupNormSiLU, torch.float32)
    assert fused(torch.randn(1, 24, 4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16
