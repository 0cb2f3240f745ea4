# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels and their launchers, run on a CPU: the same .cu files, built by the host compiler over an emulation.

What this shows: indices, masks, barriers, shuffles, reductions, geometry, workspace sizes, and that the Python adapters
pass what the C ABI expects. What only a GPU can show: speed, and the last bits of its own exp, log, sin and division.
Here group_norm_silu and geglu; the other ops are in the files beside this one, the fixtures in conftest.py.
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdxl_fast.reference import geglu as geglu_reference
from sdxl_fast.reference import group_norm_silu as group_norm_silu_reference
from sdxl_fast.testing.emulation import COMPILER, channels_last, check, unaligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


# ---- group_norm_silu ----

# (N, C, H, W), groups: ragged; SDXL's 320 channels; one pixel and one element; a map of several chunks; a group too
# wide for one tile; two tiles; whole and ragged vectors that straddle groups; many samples.
GROUP_NORM_CASES = [
    ((3, 15, 7, 5), 5), ((1, 320, 8, 8), 32), ((2, 12, 1, 1), 3), ((1, 1, 1, 1), 1), ((1, 32, 40, 48), 2),
    ((1, 2304, 2, 1), 1), ((1, 2560, 2, 2), 32), ((2, 40, 4, 6), 4), ((1, 1030, 3, 1), 2), ((19, 16, 2, 2), 4),
]  # fmt: skip
OPTIONS = [("silu", "like x", True), ("none", "float32", False), ("silu", "absent", True)]


def _group_norm_draw(case: Any, dtype: torch.dtype, nhwc: bool, options: Any) -> Callable[[int], tuple[Any, ...]]:
    shape, groups = case
    activation, params, shifted = options

    def draw(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        x, dy = (torch.randn(shape, generator=generator) for _ in range(2))
        x, dy = (2 * x + 3).to(dtype), dy.to(dtype)
        weight, bias = torch.randn(2, shape[1], generator=generator).to(dtype if params == "like x" else torch.float32)
        shift = torch.randn(shape[:2], generator=generator).to(dtype)
        if nhwc:
            x, dy = channels_last(x), channels_last(dy)
        given = params != "absent"
        return (
            dy, x, weight.clone() if given else None, bias.clone() if given else None, shift if shifted else None,
            groups, activation,
        )  # fmt: skip

    return draw


def _group_norm_run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    dy, x, weight, bias, shift, groups, activation = values
    fwd, bwd = op
    y, mean, rstd = fwd(x, weight, bias, shift, groups, 1e-5, activation)
    needs = (True, weight is not None, bias is not None, shift is not None)
    gradients = bwd(dy, x, weight, bias, shift, mean, rstd, groups, activation, needs)
    named = dict(zip(("dx", "dweight", "dbias", "dshift"), gradients, strict=True))
    return {"y": y, "mean": mean, "rstd": rstd} | {name: g for name, g in named.items() if g is not None}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("case", GROUP_NORM_CASES, ids=str)
def test_group_norm_silu(kernels: Any, case: Any, nhwc: bool, dtype: torch.dtype) -> None:
    shape, _ = case
    reference = (group_norm_silu_reference.fwd, group_norm_silu_reference.bwd)
    small = shape[0] * shape[1] * shape[2] * shape[3] < 1500
    for options in OPTIONS if small else OPTIONS[:1]:
        draw = _group_norm_draw(case, dtype, nhwc, options)
        rows = shape[0] * shape[2] * shape[3]
        summed = {"dweight": rows, "dbias": rows, "dshift": shape[2] * shape[3]}
        check("group_norm_silu", kernels("group_norm_silu"), reference, _group_norm_run, draw, **summed)


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_group_norm_silu_does_not_depend_on_the_order_of_threads(library: Any, kernels: Any, nhwc: bool) -> None:
    """A missing barrier would: a thread would read what another has written in one order and not in the other."""
    values = _group_norm_draw(((1, 320, 16, 8), 32), torch.bfloat16, nhwc, OPTIONS[0])(0)
    library.sdxl_fast_emulation_configure(16, 0)
    forwards = _group_norm_run(kernels("group_norm_silu"), values)
    library.sdxl_fast_emulation_configure(16, 1)
    backwards = _group_norm_run(kernels("group_norm_silu"), values)
    assert all(torch.equal(forwards[name], backwards[name]) for name in forwards)


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("multiprocessors", [1, 132, 300])
def test_group_norm_silu_on_any_number_of_multiprocessors(
    library: Any, kernels: Any, multiprocessors: int, nhwc: bool
) -> None:
    library.sdxl_fast_emulation_configure(multiprocessors, 0)
    draw = _group_norm_draw(((1, 64, 24, 20), 8), torch.float32, nhwc, OPTIONS[0])
    reference = (group_norm_silu_reference.fwd, group_norm_silu_reference.bwd)
    rows = {"dweight": 480, "dbias": 480, "dshift": 480}
    check("group_norm_silu", kernels("group_norm_silu"), reference, _group_norm_run, draw, **rows)


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_unaligned_pointers(kernels: Any, nhwc: bool) -> None:
    for dtype in DTYPES:
        dy, x, *rest = _group_norm_draw(((2, 16, 4, 4), 4), dtype, nhwc, OPTIONS[0])(0)
        aligned = _group_norm_run(kernels("group_norm_silu"), (dy, x, *rest))
        shifted = _group_norm_run(kernels("group_norm_silu"), (unaligned(dy), unaligned(x), *rest))
        for name, value in aligned.items():
            torch.testing.assert_close(shifted[name], value, rtol=2e-2, atol=2e-2)
        fwd, bwd = kernels("geglu")
        gate, dgelu = torch.randn(3, 32).to(dtype), torch.randn(3, 16).to(dtype)
        assert torch.equal(fwd(unaligned(gate), "none"), fwd(gate, "none"))
        assert torch.equal(bwd(unaligned(dgelu), gate, "tanh"), bwd(dgelu, gate, "tanh"))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=4)), ids=str)
def test_group_norm_silu_computes_what_is_needed(kernels: Any, needs: tuple[bool, ...]) -> None:
    dy, x, weight, bias, shift, groups, activation = _group_norm_draw(
        ((2, 8, 3, 4), 2), torch.float32, True, OPTIONS[0]
    )(0)
    fwd, bwd = kernels("group_norm_silu")
    _, mean, rstd = fwd(x, weight, bias, shift, groups, 1e-5, activation)
    arguments = (dy, x, weight, bias, shift, mean, rstd, groups, activation)
    everything = bwd(*arguments, (True,) * 4)
    for need, gradient, full in zip(needs, bwd(*arguments, needs), everything, strict=True):
        assert torch.equal(gradient, full) if need else gradient is None


# N, channels of x and of skip, map, groups: whole groups of each; groups that straddle them, in one tile and in more;
# groups wider than a tile; one vector of each.
SKIP_CASES = [
    (2, (64, 32), (3, 5), 3), (1, (80, 48), (6, 4), 4), (1, (1280, 640), (2, 3), 32), (1, (640, 320), (3, 3), 2),
    (3, (16, 16), (4, 4), 1),
]  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SKIP_CASES, ids=str)
def test_group_norm_silu_of_two_maps(kernels: Any, case: Any, dtype: torch.dtype) -> None:
    """Bit for bit what their concatenation gives, aligned or not, in float8 too; swapped they give something else."""
    n, channels, sides, groups = case
    draw = _group_norm_draw(((n, sum(channels), *sides), groups), dtype, True, OPTIONS[0])
    _, both, weight, bias, shift, *_ = draw(0)
    x, skip = (channels_last(t) for t in both.split(channels, 1))
    fwd, _ = kernels("group_norm_silu")
    rest = (weight, bias, shift, groups, 1e-5, "silu")

    def same(got: tuple[torch.Tensor, ...], wanted: tuple[torch.Tensor, ...]) -> bool:
        return all(
            torch.equal(a.float(), b.float()) and a.stride() == b.stride() for a, b in zip(got, wanted, strict=True)
        )

    assert same(fwd(x, *rest, None, skip), fwd(both, *rest))
    assert same(fwd(x, *rest, None, unaligned(skip)), fwd(unaligned(both), *rest))
    assert not same(fwd(channels_last(both[:, channels[1] :]), *rest, None, channels_last(both[:, : channels[1]])),
                    fwd(both, *rest))  # fmt: skip
    if dtype == torch.bfloat16:
        scale_y = torch.tensor([0.0371])
        assert same(fwd(x, *rest, scale_y, skip), fwd(both, *rest, scale_y))


def test_group_norm_silu_of_nothing(kernels: Any) -> None:
    fwd, bwd = kernels("group_norm_silu")
    for shape in ((0, 8, 4, 4), (2, 8, 0, 4)):
        x, weight = torch.zeros(shape), torch.ones(8)
        shift = torch.ones(shape[:2])
        y, mean, rstd = fwd(x, weight, weight, shift, 4, 1e-5, "silu")
        assert y.shape == x.shape and not mean.any() and not rstd.any()
        gradients = bwd(x, x, weight, weight, shift, mean, rstd, 4, "silu", (True,) * 4)
        assert not any(g.any() for g in gradients)


# ---- geglu ----


def _geglu_run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    fwd, bwd = op
    dy, x, approximate = values
    return {"y": fwd(x, approximate), "dx": bwd(dy, x, approximate)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("shape", [(5, 7, 2 * 33), (3, 2), (2, 2 * 2600), (70, 2 * 64), (1, 2 * 257)], ids=str)
def test_geglu(kernels: Any, shape: tuple[int, ...], approximate: str, dtype: torch.dtype) -> None:
    def draw(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        x = 3 * torch.randn(shape, generator=generator)
        dy = torch.randn(*shape[:-1], shape[-1] // 2, generator=generator)
        return dy.to(dtype), x.to(dtype), approximate

    check("geglu", kernels("geglu"), (geglu_reference.fwd, geglu_reference.bwd), _geglu_run, draw)


def _gelu_parts(gate: torch.Tensor, approximate: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """GELU and the two terms of its derivative in float64, by forms that do not cancel far from zero."""
    if approximate == "none":
        cdf = 0.5 * torch.special.erfc(-gate / 2**0.5)
        return gate * cdf, cdf, gate * torch.exp(-0.5 * gate**2) / (2 * torch.pi) ** 0.5
    slope = 2 * (2 / torch.pi) ** 0.5
    u2 = slope * gate * (1 + 0.044715 * gate**2)
    cdf = torch.sigmoid(u2)
    return gate * cdf, cdf, gate * cdf * torch.sigmoid(-u2) * slope * (1 + 0.134145 * gate**2)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
def test_geglu_in_the_tails(kernels: Any, approximate: str) -> None:
    """Every bfloat16 gate: no NaN, and the relative accuracy of the type down to the smallest results."""
    gate = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    gate = gate[gate.isfinite() & (gate.float().abs() < 1e30)]
    x = torch.cat((torch.ones_like(gate), gate))[None]
    fwd, bwd = kernels("geglu")
    dy = torch.ones_like(gate)[None]
    y, dx = fwd(x, approximate)[0], bwd(dy, x, approximate)[0, gate.numel() :]
    assert y.isfinite().all() and dx.isfinite().all()
    value, cdf, density = _gelu_parts(gate.double().clamp(-50, 50), approximate)
    value = torch.where(gate > 50, gate.double(), value)
    # Half a unit in the last place is 2^-9, and the terms of the derivative cancel at its zero. From 1e-33 on down the
    # argument of the exponential is so large that its own rounding shows; from 1e-38 results are subnormal.
    inside = value.abs() > 1e-33
    assert ((y.double() - value).abs() <= 2**-8 * value.abs())[inside].all()
    assert ((dx.double() - cdf - density).abs() <= 2**-8 * (cdf + density).abs() + 1e-4 * (cdf + density.abs()))[
        inside
    ].all()
    assert y[~inside].abs().max() <= 1e-32


# ---- the C ABI ----


def test_statuses(library: ctypes.CDLL) -> None:
    x = torch.zeros(64)
    p = x.data_ptr()
    geglu, norm = library.sdxl_fast_geglu_fwd_cuda, library.sdxl_fast_group_norm_silu_fwd_cuda
    assert geglu(p, p, 0, 4, 0, 0, 0) == 0
    assert geglu(p, p, 2, 4, 0, 1, 0) == 2  # float64
    assert geglu(p, p, 2, 4, 2, 0, 0) == geglu(p, p, -1, 4, 0, 0, 0) == geglu(p, p, 2, 4, 0, 9, 0) == 1
    good: dict[str, Any] = {
        "x": p, "skip": None, "weight": None, "bias": None, "shift": None, "y": p, "mean": p, "rstd": p, "workspace": p,
        "n": 1, "c": 4, "c_skip": 0, "hw": 4, "groups": 2, "eps": 1e-5,
        "layout": 0, "activation": 1, "dtype": 0, "param": 0, "stream": 0,
    }  # fmt: skip

    def changed(**changes: Any) -> int:
        return int(norm(*{**good, **changes}.values()))

    assert changed(n=0) == 0
    assert (
        changed(groups=3) == changed(groups=0) == changed(layout=2) == changed(activation=2) == changed(weight=p) == 1
    )
    assert changed(skip=p) == changed(c=32, c_skip=16) == changed(skip=p, c=32, c_skip=8) == 1
    assert changed(skip=p, c=32, c_skip=32) == changed(skip=p, c=32, c_skip=16, layout=1) == 1
    assert changed(c=2**31) == changed(c=2**31, layout=1) == 1  # channels are counted in 32 bits
    assert changed(dtype=1, param=1) == changed(dtype=2, param=3) == 2
