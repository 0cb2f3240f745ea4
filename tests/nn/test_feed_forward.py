"""The gated feed-forward equals diffusers' and keeps its parameter names."""

from __future__ import annotations

import torch
from diffusers.models import activations

from sdxl_fast.nn import GEGLU
from sdxl_fast.testing.compare import assert_all, compare


def test_equals_the_stock_module_and_loads_its_weights() -> None:
    torch.manual_seed(0)
    stock, fused = activations.GEGLU(12, 20), GEGLU(12, 20)
    fused.load_state_dict(stock.state_dict())
    x = torch.randn(2, 7, 12)
    got = fused(x)
    baseline = stock(x)
    assert_all([compare(got, stock.double()(x.double()), baseline, op="geglu", rows=12)])
