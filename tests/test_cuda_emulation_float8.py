# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that write float8, on a CPU over the emulation: bit for bit what rounding their results gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdxl_fast.reference._common import FLOAT8, quantise
from sdxl_fast.testing.emulation import COMPILER, channels_last, unaligned

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# A power of two, a number that is none, and two of which one saturates most and the other leaves subnormal numbers.
SCALES = (2.0**-5, 0.0371, 2.0**-11, 300.0)


def _assert_rounded(fwd: Any, *args: Any) -> None:
    for scale in SCALES:
        scale_y = torch.tensor([scale])
        found, plain = fwd(*args, scale_y), fwd(*args)
        found, plain = ((t,) if isinstance(t, torch.Tensor) else t for t in (found, plain))
        assert found[0].dtype == FLOAT8 and found[0].stride() == plain[0].stride()
        assert torch.equal(found[0].view(torch.uint8), quantise(plain[0], scale_y).view(torch.uint8))
        assert all(torch.equal(a, b) for a, b in zip(found[1:], plain[1:], strict=True))


# Whole vectors in each number of items, a ragged row, a row wider than a warp holds, one element, nothing.
@pytest.mark.parametrize("params", [None, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("shape", [(6, 640), (3, 1280), (2, 2048), (5, 33), (2, 4096), (1, 1), (0, 8)], ids=str)
def test_layer_norm(kernels: Any, shape: tuple[int, int], params: torch.dtype | None) -> None:
    x, residual = torch.randn(2, *shape).to(torch.bfloat16)
    weight, bias = (None, None) if params is None else torch.randn(2, shape[1]).to(params)
    fwd, _ = kernels("layer_norm")
    _assert_rounded(fwd, x, weight, bias, None, 1e-5)
    _assert_rounded(fwd, unaligned(x), weight, bias, residual, 1e-5)
    _assert_rounded(fwd, x, weight, bias, residual, 1e-5)


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(
    ("shape", "groups"), [((2, 64, 6, 4), 8), ((3, 15, 7, 5), 5), ((1, 1, 1, 1), 1), ((1, 32, 16, 24), 2)], ids=str
)
def test_group_norm_silu(kernels: Any, shape: tuple[int, ...], groups: int, nhwc: bool) -> None:
    x = torch.randn(shape).to(torch.bfloat16)
    x = channels_last(x) if nhwc else x
    weight, bias = torch.randn(2, shape[1]).to(torch.bfloat16)
    shift = torch.randn(shape[:2]).to(torch.bfloat16)
    fwd, _ = kernels("group_norm_silu")
    _assert_rounded(fwd, x, weight, bias, shift, groups, 1e-5, "silu")
    _assert_rounded(fwd, x, weight.float(), bias.float(), None, groups, 1e-5, "none")


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(5, 7, 2 * 33), (3, 2), (2, 2 * 2600), (70, 2 * 64), (0, 8)], ids=str)
def test_geglu(kernels: Any, shape: tuple[int, ...], approximate: str) -> None:
    x = 3 * torch.randn(shape)
    _assert_rounded(kernels("geglu")[0], x.to(torch.bfloat16), approximate)


def test_every_number_of_bfloat16(kernels: Any) -> None:
    """GELU(64) is 64, so geglu of (v, 64) over a scale of 64 rounds v itself: all signs, ties, subnormals, NaN."""
    v = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    v = v[~(v.float().abs() >= 2.0**121) | v.isinf()]
    x = torch.cat((v, torch.full_like(v, 64.0)))[None]
    y = kernels("geglu")[0](x, "none", torch.tensor([64.0]))[0]
    assert torch.equal(y.isnan(), v.isnan()) and v.isnan().any()
    wanted = v.float().clamp(-448, 448).to(FLOAT8)
    assert torch.equal(y[~v.isnan()].view(torch.uint8), wanted[~v.isnan()].view(torch.uint8))


def test_statuses(library: Any) -> None:
    memory = torch.zeros(64)
    p = memory.data_ptr()
    geglu, layer_norm = library.sdxl_fast_geglu_e4m3_fwd_cuda, library.sdxl_fast_layer_norm_e4m3_fwd_cuda
    assert geglu(p, p, p, 0, 4, 0, 2, 0) == 0
    assert geglu(p, None, p, 2, 4, 0, 2, 0) == geglu(p, p, p, -1, 4, 0, 2, 0) == geglu(p, p, p, 2, 4, 9, 2, 0) == 1
    assert geglu(p, p, p, 2, 4, 0, 0, 0) == geglu(p, p, p, 2, 4, 0, 3, 0) == 2
    given = (p, None, None, None, p, p, None, p, p, 1, 4)
    assert layer_norm(*given, 1e-5, 2, 2, 0) == layer_norm(*given, 1e-5, 2, 0, 0) == 0
    assert layer_norm(*given[:4], None, *given[5:], 1e-5, 2, 2, 0) == layer_norm(*given, -1.0, 2, 2, 0) == 1
    assert layer_norm(*given, 1e-5, 0, 0, 0) == layer_norm(*given, 1e-5, 2, 3, 0) == 2
