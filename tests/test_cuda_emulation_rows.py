# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of layer_norm, to_uint8 and lora_merge, run on a CPU. See test_cuda_emulation.py."""

from __future__ import annotations

import ctypes
import itertools
from typing import Any

import pytest
import torch

from sdxl_fast.reference import layer_norm as layer_norm_reference
from sdxl_fast.reference import lora_merge as lora_merge_reference
from sdxl_fast.reference import to_uint8 as to_uint8_reference
from sdxl_fast.testing.emulation import COMPILER, channels_last, check, unaligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# ---- layer_norm ----

# SDXL's widths; one vector and one element; the widest that stay in registers, and wider; ragged; many rows.
SHAPES = [(5, 640), (6, 1280), (3, 768), (9, 8), (3, 1), (2, 2048), (2, 4096), (2, 4104), (7, 33), (2, 2, 45), (70, 16)]


def _norm_run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    fwd, bwd = op
    dy, dsum, x, residual, weight, bias = values
    y, *total, mean, rstd = fwd(x, weight, bias, residual, 1e-5)
    s = total[0] if total else x
    gradients = bwd(dy, dsum if total else None, s, weight, mean, rstd, (True, True, True))
    named = dict(zip(("dx", "dweight", "dbias"), gradients, strict=True))
    named |= {"y": y, "mean": mean, "rstd": rstd} | ({"sum": total[0]} if total else {})
    return {name: t for name, t in named.items() if t is not None}


def _norm_draw(shape: tuple[int, ...], dtype: torch.dtype, params: str, residual: bool) -> Any:
    def draw(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        dy, dsum, x, other = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        x = 2 * x + 3
        weight, bias = torch.randn(2, shape[-1], generator=generator).to(dtype if params == "like x" else torch.float32)
        given = params != "absent"
        return (
            dy,
            dsum,
            x,
            other if residual else None,
            weight.clone() if given else None,
            bias.clone() if given else None,
        )

    return draw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layer_norm(kernels: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    reference = (layer_norm_reference.fwd, layer_norm_reference.bwd)
    rows = torch.Size(shape[:-1]).numel()
    for params, residual in (("like x", True), ("float32", False), ("absent", True)):
        draw = _norm_draw(shape, dtype, params, residual)
        check("layer_norm", kernels("layer_norm"), reference, _norm_run, draw, dweight=rows, dbias=rows)


@pytest.mark.parametrize("shape", [(40, 64), (40, 33)], ids=str)
def test_layer_norm_on_any_number_of_multiprocessors_and_in_any_order(library: Any, kernels: Any, shape: Any) -> None:
    values = _norm_draw(shape, torch.bfloat16, "like x", True)(0)
    found = []
    for multiprocessors, backwards in ((1, 0), (3, 0), (3, 1), (300, 0)):
        library.sdxl_fast_emulation_configure(multiprocessors, backwards)
        found.append(_norm_run(kernels("layer_norm"), values))
    assert all(torch.equal(found[1][name], found[2][name]) for name in found[1]), "the order of threads shows"
    for other in found:
        for name, value in other.items():
            torch.testing.assert_close(value, found[0][name], rtol=2e-2, atol=2e-2)


def test_layer_norm_takes_unaligned_pointers(kernels: Any) -> None:
    for dtype in DTYPES:
        values = _norm_draw((5, 64), dtype, "like x", True)(0)
        aligned = _norm_run(kernels("layer_norm"), values)
        shifted = _norm_run(kernels("layer_norm"), tuple(unaligned(t) for t in values))
        for name, value in aligned.items():
            torch.testing.assert_close(shifted[name], value, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("shape", [(11, 64), (11, 33)], ids=str)
def test_layer_norm_computes_what_is_needed(kernels: Any, shape: Any) -> None:
    dy, dsum, x, residual, weight, bias = _norm_draw(shape, torch.float32, "like x", True)(0)
    fwd, bwd = kernels("layer_norm")
    _, total, mean, rstd = fwd(x, weight, bias, residual, 1e-5)
    for given in (dsum, None):
        everything = bwd(dy, given, total, weight, mean, rstd, (True, True, True))
        for needs in itertools.product([True, False], repeat=3):
            for need, gradient, full in zip(
                needs, bwd(dy, given, total, weight, mean, rstd, needs), everything, strict=True
            ):
                assert torch.equal(gradient, full) if need else gradient is None


def test_layer_norm_of_nothing(kernels: Any) -> None:
    fwd, bwd = kernels("layer_norm")
    x, weight = torch.zeros(0, 8), torch.ones(8)
    y, mean, rstd = fwd(x, weight, weight, None, 1e-5)
    assert y.shape == x.shape and mean.numel() == rstd.numel() == 0
    gradients = bwd(y, None, x, weight, mean, rstd, (True, True, True))
    assert not any(g.any() for g in gradients)
    assert fwd(torch.zeros(4, 0), None, None, None, 1e-5)[0].shape == (4, 0)


# ---- to_uint8 ----

# Whole vectors of planes and ragged ones, other numbers of channels, more pixels than a block, one element, nothing.
PICTURES = [
    (2, 3, 8, 16),
    (1, 3, 5, 7),
    (2, 4, 4, 8),
    (1, 1, 4, 8),
    (1, 5, 3, 3),
    (1, 3, 80, 80),
    (1, 1, 1, 1),
    (0, 3, 2, 2),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", PICTURES, ids=str)
def test_to_uint8_gives_the_bytes_of_the_reference(kernels: Any, shape: Any, nhwc: bool, dtype: torch.dtype) -> None:
    x = 1.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0))
    flat = x.flatten()
    special = torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 1.0, -1.0, 1 / 255, 3 / 255])
    flat[: len(special)] = special[: flat.numel()]
    x = flat.view(shape).to(dtype)
    fwd, _ = kernels("to_uint8")
    expected = to_uint8_reference.fwd(x)
    x = channels_last(x) if nhwc else x
    assert torch.equal(fwd(x), expected)
    assert torch.equal(fwd(unaligned(x)), expected)


# ---- lora_merge ----

# Weights and ranks: two tiles each way, a 3x3 convolution, ragged ones, more ranks than fit beside each other, none, no
# rows in between, one element.
MERGED = [
    ((70, 144), 16), ((8, 16, 3, 3), 8), ((7, 33), 5), ((0, 8), 3), ((66, 40), 48), ((5, 136), 0), ((3, 7), 70),
    ((1, 1), 1),
]  # fmt: skip


def _merge_run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    count = len(MERGED)
    bases, downs, ups = (list(values[i * count : (i + 1) * count]) for i in range(3))
    weights = [b.clone() for b in bases]
    scales = [0.5 + i for i in range(count)]
    op[0](weights, weights, downs, ups, scales)
    apart = [torch.full_like(b, float("nan")) for b in bases]
    op[0](apart, bases, downs, ups, scales)
    assert all(map(torch.equal, apart, weights))
    return {str(i): w for i, w in enumerate(weights)}


def _merge_draw(dtype: torch.dtype, factor_dtype: torch.dtype) -> Any:
    def draw(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        sizes = [
            ((shape, dtype), ((r, *shape[1:]), factor_dtype), ((shape[0], r), factor_dtype)) for shape, r in MERGED
        ]
        return tuple(torch.randn(s, generator=generator).to(d) for kind in zip(*sizes, strict=True) for s, d in kind)

    return draw


@pytest.mark.parametrize("factor_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lora_merge(kernels: Any, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    draw = _merge_draw(dtype, factor_dtype)
    rows = {str(i): rank for i, (_, rank) in enumerate(MERGED)}
    check("lora_merge", kernels("lora_merge"), (lora_merge_reference.fwd, None), _merge_run, draw, **rows)


@pytest.mark.parametrize("factor_dtype", [torch.bfloat16, torch.float32], ids=str)
def test_lora_merge_takes_unaligned_pointers(kernels: Any, factor_dtype: torch.dtype) -> None:
    values = _merge_draw(torch.bfloat16, factor_dtype)(0)
    aligned = _merge_run(kernels("lora_merge"), values)
    shifted = _merge_run(kernels("lora_merge"), tuple(map(unaligned, values)))
    assert all(torch.equal(aligned[name], shifted[name]) for name in aligned)


def test_lora_merge_finds_the_module_of_every_tile(kernels: Any) -> None:
    """In a table that takes a warp three looks."""
    count = 1100
    weights = [torch.zeros(i % 3, 2) for i in range(count)]
    downs, ups = [torch.full((1, 2), float(i)) for i in range(count)], [torch.ones(i % 3, 1) for i in range(count)]
    kernels("lora_merge")[0](weights, weights, downs, ups, [1.0] * count)
    assert all(w.eq(i).all() for i, w in enumerate(weights))


# ---- the C ABI ----


def test_layer_norm_statuses(library: ctypes.CDLL) -> None:
    memory = torch.zeros(64)
    p = memory.data_ptr()
    forward: dict[str, Any] = {
        "x": p, "residual": None, "weight": None, "bias": None, "y": p, "sum": None, "mean": p, "rstd": p,
        "rows": 1, "cols": 4, "eps": 1e-5, "dtype": 0, "param_dtype": 0, "stream": 0,
    }  # fmt: skip
    backward: dict[str, Any] = {
        "dy": p, "dsum": None, "s": p, "weight": None, "mean": p, "rstd": p, "dx": p, "dweight": None, "dbias": None,
        "workspace": None, "rows": 1, "cols": 4, "dtype": 0, "param_dtype": 0, "stream": 0,
    }  # fmt: skip

    def fwd(**changes: Any) -> int:
        return int(library.sdxl_fast_layer_norm_fwd_cuda(*{**forward, **changes}.values()))

    def bwd(**changes: Any) -> int:
        return int(library.sdxl_fast_layer_norm_bwd_cuda(*{**backward, **changes}.values()))

    assert fwd() == fwd(rows=0) == bwd() == bwd(rows=0) == 0
    assert fwd(weight=p) == fwd(residual=p) == fwd(sum=p) == fwd(rows=-1) == fwd(eps=-1.0) == bwd(cols=-1) == 1
    assert fwd(eps=float("nan")) == bwd(dweight=p) == 1
    assert fwd(dtype=1, param_dtype=1) == fwd(dtype=2, param_dtype=3) == bwd(dtype=1, param_dtype=1) == 2


def test_to_uint8_statuses(library: ctypes.CDLL) -> None:
    memory = torch.zeros(64)
    p = memory.data_ptr()
    convert = library.sdxl_fast_to_uint8_fwd_cuda
    assert convert(p, p, 1, 3, 4, 0, 0, 0) == convert(None, None, 0, 3, 4, 0, 0, 0) == 0
    assert convert(p, p, -1, 3, 4, 0, 0, 0) == convert(p, p, 1, 3, 4, 2, 0, 0) == convert(p, p, 1, 3, 4, 0, 9, 0) == 1
    assert convert(p, p, 1, 3, 4, 0, 1, 0) == 2


def test_lora_merge_statuses(library: ctypes.CDLL) -> None:
    merge, plan = library.sdxl_fast_lora_merge_fwd_cuda, library.sdxl_fast_lora_merge_plan_cuda
    assert merge(None, 0, 0, 0, 0, 0) == 0
    assert merge(None, 1, 1, 0, 0, 0) == merge(None, -1, 0, 0, 0, 0) == merge(None, 0, 2**31, 0, 0, 0) == 1
    assert merge(None, 0, 0, 1, 0, 0) == merge(None, 0, 0, 0, 1, 0) == 2
    assert merge(None, 0, 0, 9, 0, 0) == merge(None, 0, 0, 0, 9, 0) == 1

    def tiles(*sizes: tuple[int, int, int]) -> tuple[int, list[int]]:
        table = torch.tensor([[0, 0, 0, 0, *size, -1, 0] for size in sizes], dtype=torch.int64)
        return plan(table.data_ptr(), len(sizes)), table[:, 7].tolist()

    assert tiles((64, 128, 1), (0, 9, 1), (65, 129, 4), (1, 1, 0)) == (6, [0, 1, 1, 5])
    assert tiles((2**40, 2**40, 1))[0] == tiles((-1, 1, 1))[0] == tiles((1, 1, -1))[0] == -1
