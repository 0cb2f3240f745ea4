# SPDX-License-Identifier: Apache-2.0
"""Offsets beyond 2^31 elements, as maps of the VAE at 4096 px have, on memory of which hardly a page is touched."""

from __future__ import annotations

import pytest
import torch

conv2d = pytest.importorskip("sdxl_fast.triton_kernels.conv2d")
upsample_conv2d = pytest.importorskip("sdxl_fast.triton_kernels.upsample_conv2d")
from sdxl_fast.ops import _backends  # noqa: E402
from sdxl_fast.reference.upsample_conv2d import phase_weights  # noqa: E402

FAR = 2**30
"""Elements from one row or channel to the next, so that the third begins where 32 bits end."""

pytestmark = pytest.mark.skipif(not _backends.interpreting(), reason="memory is only reserved on a CPU")
_empty = torch.empty


def _far_apart(shape: tuple[int, ...], dim: int, dtype: torch.dtype) -> torch.Tensor:
    """Unwritten memory of a shape whose elements lie ``FAR`` apart in one dimension, and densely in the others."""
    strides, step = [0] * len(shape), 1
    for other in reversed([d for d in range(len(shape)) if d != dim]):
        strides[other], step = step, step * shape[other]
    strides[dim] = FAR
    try:
        memory = _empty((shape[dim] - 1) * FAR + step, dtype=dtype)
    except RuntimeError as error:  # no memory is used, but some systems count it all the same
        pytest.skip(f"cannot reserve the memory: {error}")
    return memory.as_strided(shape, strides)


@pytest.mark.parametrize("dim", [1, 2], ids=["channels", "rows"])
@pytest.mark.parametrize("written", [False, True], ids=["read", "written"])
@pytest.mark.parametrize("op", ["conv2d", "upsample_conv2d"])
def test_offsets_do_not_wrap(monkeypatch: pytest.MonkeyPatch, op: str, written: bool, dim: int) -> None:
    dtype = torch.float16
    x, weight = torch.randn(1, 3, 3, 2).to(dtype), torch.randn(3, 3, 3, 3).to(dtype)
    phases = phase_weights(weight)

    def run(given: torch.Tensor) -> torch.Tensor:
        if op == "conv2d":
            return conv2d.conv2d_fwd(given, weight, None, None, 1, 1)
        return upsample_conv2d.upsample_conv2d_fwd(given, weight, None, phases)

    expected = run(x)
    if written:
        with monkeypatch.context() as far:
            far.setattr(torch, "empty", lambda shape, dtype, **rest: _far_apart(tuple(shape), dim, dtype))
            found = run(x)
        assert found.stride(dim) == FAR
    else:
        found = run(_far_apart(x.shape, dim, dtype).copy_(x))
    assert torch.equal(found, expected)
