# SPDX-License-Identifier: Apache-2.0
"""The matrix ops' CUDA backend on a CPU: C functions, plan, schedule, patches, epilogue; only the products are loops.

What a GPU adds, loads by TMA into swizzled tiles and products of warp groups, is CUTLASS's. See test_cuda_emulation.py.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdxl_fast.ops import _hopper
from sdxl_fast.reference import conv2d as conv2d_reference
from sdxl_fast.reference import geglu as geglu_reference
from sdxl_fast.reference import linear as linear_reference
from sdxl_fast.reference import linear_geglu as linear_geglu_reference
from sdxl_fast.reference import upsample_conv2d as upsample_reference
from sdxl_fast.reference.linear import FLOAT8, quantise
from sdxl_fast.reference.upsample_conv2d import memory_format, phase_weights
from sdxl_fast.testing.cases import Case, sdxl_cases
from sdxl_fast.testing.compare import assert_all, compare
from sdxl_fast.testing.emulation import COMPILER, channels_last, unaligned

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


@pytest.fixture
def forward(kernels: Any, library: ctypes.CDLL) -> Callable[[str], Callable[..., torch.Tensor]]:
    """The forward of an op as its adapter makes it, over the emulation."""
    from sdxl_fast.ops import _native

    return lambda op: getattr(_hopper, op)(_native.binding("cuda"))


def _normal(*shape: int, seed: int = 0, scale: float = 1.0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _check(got: torch.Tensor, reference: Callable[..., torch.Tensor], *args: Any) -> None:
    """Within the bound of the op suite of what the reference gives in float64."""
    exact = reference(*(a.double() if isinstance(a, torch.Tensor) else a for a in args))
    depth = 4096
    assert_all([compare(got, exact, reference(*args), rows=depth)])


# ---- numbers ----


# rows, in, out: whole tiles and ragged ones; few tiles and long sums, which are split; a width for each kind of tile.
@pytest.mark.parametrize(
    ("rows", "k", "n"),
    [(128, 64, 160), (130, 72, 168), (3, 264, 40), (1, 8, 8), (200, 320, 160), (260, 64, 512), (250, 40, 128)],
)
@pytest.mark.parametrize("terms", ["none", "bias", "residual", "both"])
def test_linear(forward: Any, library: ctypes.CDLL, rows: int, k: int, n: int, terms: str) -> None:
    library.sdxl_fast_emulation_configure(8, 0)
    x, weight = _normal(rows, k).bfloat16(), _normal(n, k, seed=1, scale=k**-0.5).bfloat16()
    bias = _normal(n, seed=2).bfloat16() if terms in ("bias", "both") else None
    residual = _normal(rows, n, seed=3).bfloat16() if terms in ("residual", "both") else None
    args = (x, weight, bias, residual, None, None)
    _check(forward("linear")(*args), linear_reference.fwd, *args)


def test_linear_of_stacked_rows_transposed_weights_and_odd_addresses(forward: Any) -> None:
    x, weight = _normal(2, 5, 24).bfloat16(), _normal(24, 40, seed=1).bfloat16().t()
    bias, residual = _normal(40, seed=2).bfloat16(), _normal(2, 5, 40, seed=3).bfloat16()
    args = (x, weight, bias, residual, None, None)
    expected = forward("linear")(*args)
    assert expected.shape == (2, 5, 40)
    _check(expected, linear_reference.fwd, *args)
    moved = (*(unaligned(t) for t in (x, weight.contiguous(), bias, residual)), None, None)
    assert torch.equal(forward("linear")(*moved), expected)


@pytest.mark.parametrize(("rows", "k", "n"), [(20, 64, 48), (130, 528, 168)])
def test_linear_of_float8(forward: Any, rows: int, k: int, n: int) -> None:
    x, weight = _normal(rows, k), _normal(n, k, seed=1)
    scales = x.abs().max() / 448, weight.abs().max() / 448
    residual = _normal(rows, n, seed=3).bfloat16()
    args = (quantise(x, scales[0]), quantise(weight, scales[1]), None, residual, *scales)
    got = forward("linear")(*args)
    assert got.dtype == torch.bfloat16
    exact = (args[0].double() * scales[0]) @ (args[1].double() * scales[1]).t() + residual.double()
    assert_all([compare(got, exact, linear_reference.fwd(*args), rows=k)])


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize(("rows", "k", "n"), [(128, 64, 80), (5, 40, 24), (130, 72, 168)])
def test_linear_geglu(forward: Any, rows: int, k: int, n: int, approximate: str) -> None:
    x, weight = _normal(rows, k).bfloat16(), _normal(2 * n, k, seed=1, scale=k**-0.5).bfloat16()
    for bias in (None, _normal(2 * n, seed=2).bfloat16()):
        args = (x, weight, bias, approximate)
        _check(forward("linear_geglu")(*args), linear_geglu_reference.fwd, *args)


@pytest.mark.parametrize(("rows", "k", "n"), [(20, 64, 48), (130, 272, 168)])
def test_linear_geglu_of_float8(forward: Any, rows: int, k: int, n: int) -> None:
    """Both halves with the scales; and the result in float8, bit for bit what a pass of rounding makes of it."""
    x, weight = _normal(rows, k), _normal(2 * n, k, seed=1, scale=k**-0.5)
    scales = x.abs().max() / 448, weight.abs().max() / 448
    bias = _normal(2 * n, seed=2).bfloat16()
    args = (quantise(x, scales[0]), quantise(weight, scales[1]), bias, "none", *scales)
    got = forward("linear_geglu")(*args)
    h = (args[0].double() * scales[0]) @ (args[1].double() * scales[1]).t() + bias.double()
    assert_all([compare(got, geglu_reference.fwd(h, "none"), linear_geglu_reference.fwd(*args), rows=k)])
    for scale_y in (torch.tensor([0.0371]), torch.tensor([2.0**-12]), torch.tensor([300.0])):
        for given in (args, (x.bfloat16(), weight.bfloat16(), bias, "tanh", None, None)):
            plain, rounded = forward("linear_geglu")(*given), forward("linear_geglu")(*given, scale_y)
            assert torch.equal(rounded.view(torch.uint8), quantise(plain, scale_y).view(torch.uint8))


@pytest.mark.parametrize(
    ("shape", "n", "kernel", "padding"),
    [((2, 16, 9, 18), 40, 3, 1), ((1, 144, 5, 3), 24, 3, 0), ((2, 32, 4, 5), 16, 1, 0), ((1, 272, 3, 3), 8, 3, 1)],
)
def test_conv2d_of_float8(forward: Any, shape: tuple[int, ...], n: int, kernel: int, padding: int) -> None:
    x, weight = channels_last(_normal(*shape)), _normal(n, shape[1], kernel, kernel, seed=1)
    scales = x.abs().max() / 448, weight.abs().max() / 448
    x, weight = quantise(x, scales[0]), quantise(weight, scales[1])
    bias = _normal(n, seed=2).bfloat16()
    residual = channels_last(_normal(*conv2d_reference.output_shape(x, weight, 1, padding), seed=3).bfloat16())
    args = (x, weight, bias, residual, 1, padding, *scales)
    got = forward("conv2d")(*args)
    assert got.dtype == torch.bfloat16 and got.is_contiguous(memory_format=memory_format(x))
    exact = torch.nn.functional.conv2d(
        x.double() * scales[0], weight.double() * scales[1], bias.double(), padding=padding
    ) + residual.double()  # fmt: skip
    assert_all([compare(got, exact, conv2d_reference.fwd(*args), rows=kernel * kernel * shape[1])])


@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(
    ("shape", "n", "kernel", "padding"),
    [((2, 16, 9, 18), 40, 3, 1), ((1, 72, 5, 3), 24, 3, 0), ((1, 8, 1, 1), 8, 3, 1), ((2, 24, 4, 5), 16, 1, 0),
     ((1, 8, 3, 3), 8, 1, 1), ((1, 64, 20, 33), 8, 3, 1)],
)  # fmt: skip
def test_conv2d(forward: Any, shape: tuple[int, ...], n: int, kernel: int, padding: int, layout: Any) -> None:
    x = layout(_normal(*shape).bfloat16())
    depth = kernel * kernel * shape[1]
    weight = _normal(n, shape[1], kernel, kernel, seed=1, scale=depth**-0.5).bfloat16()
    bias = _normal(n, seed=2).bfloat16()
    out = conv2d_reference.output_shape(x, weight, 1, padding)
    for residual in (None, layout(_normal(*out, seed=3).bfloat16())):
        args = (x, weight, bias, residual, 1, padding)
        got = forward("conv2d")(*args)
        assert got.is_contiguous(memory_format=memory_format(x))
        _check(got, conv2d_reference.fwd, *args)


@pytest.mark.parametrize("layout", [channels_last, torch.Tensor.contiguous], ids=["nhwc", "nchw"])
@pytest.mark.parametrize(("shape", "n"), [((2, 16, 9, 18), 40), ((1, 72, 3, 2), 24), ((1, 8, 1, 1), 8)])
def test_upsample_conv2d(forward: Any, shape: tuple[int, ...], n: int, layout: Any) -> None:
    x = layout(_normal(*shape).bfloat16())
    weight = _normal(n, shape[1], 3, 3, seed=1, scale=(9 * shape[1]) ** -0.5).bfloat16()
    bias = _normal(n, seed=2).bfloat16()
    for phases in (phase_weights(weight), phase_weights(weight).contiguous()):
        got = forward("upsample_conv2d")(x, weight, bias, phases)
        _check(got, upsample_reference.fwd, x, weight, bias, None)
        assert got.is_contiguous(memory_format=memory_format(x))


def test_integers_come_out_exactly_however_many_processors_share_them(forward: Any, library: ctypes.CDLL) -> None:
    """The same sums from one block, from a few that take tiles in turn, and from pairs that halve K."""
    x, weight = (torch.randint(-3, 4, s).bfloat16() for s in ((300, 256), (176, 256)))
    expected = (x.float() @ weight.float().t()).bfloat16()
    for processors in (1, 2, 7, 132):
        library.sdxl_fast_emulation_configure(processors, 0)
        assert torch.equal(forward("linear")(x, weight, None, None, None, None), expected)


# ---- the plan, over every product of SDXL ----


def _products() -> list[tuple[str, dict[str, int]]]:
    """(name, arguments of the plan) of everything in SDXL that the kernel can run."""
    found = []
    rows = functools.partial(dict, images=1, height=1, phases=1, gated=0)
    for case in sdxl_cases("linear"):
        positions, k, n = math.prod(case.shape[:-1]), case.shape[-1], case.options["out_features"]
        for float8 in (0, 1):
            slices = -(-k // (128 if float8 else 64))
            found.append((case.name, rows(width=positions, columns=n, slices=slices, float8=float8)))
    for case in sdxl_cases("linear_geglu"):
        positions, k, n = math.prod(case.shape[:-1]), case.shape[-1], case.options["out_features"]
        for float8 in (0, 1):
            slices = -(-k // (128 if float8 else 64))
            plan = rows(width=positions, columns=n, slices=slices, float8=float8)
            found.append((case.name, plan | {"gated": 1}))
    for case in (*sdxl_cases("conv2d"), *sdxl_cases("upsample_conv2d")):
        found.append((case.name, _map(case)))
        if "kernel_size" in case.options and case.shape[1] % 16 == 0:
            found.append((case.name, _map(case, float8=1)))
    return [(name, plan) for name, plan in found if plan["columns"] % 8 == 0]


def _map(case: Case, float8: int = 0) -> dict[str, int]:
    upsampled, (n, c, h, w) = "kernel_size" not in case.options, case.shape
    taps = 4 if upsampled else case.options["kernel_size"] ** 2
    return {
        "images": n,
        "height": h,
        "width": w,
        "columns": case.options["out_channels"],
        "slices": taps * -(-c // (128 if float8 else 64)),
        "phases": 4 if upsampled else 1,
        "gated": 0,
        "float8": float8,
    }


def _plan(library: ctypes.CDLL, sms: int, product: dict[str, int]) -> dict[str, int]:
    order = ("images", "height", "width", "columns", "slices", "phases", "gated", "float8")
    out = (ctypes.c_int64 * 7)()
    wide = {"images", "height", "width", "columns", "slices"}
    args = [(ctypes.c_int64 if name in wide else ctypes.c_int32)(product[name]) for name in order]
    library.sdxl_fast_emulation_plan(*args, ctypes.c_int32(sms), out)
    return dict(zip(("columns", "split", "tile_h", "tile_w", "tiles_m", "tiles_n", "ctas"), out, strict=True))


@pytest.mark.parametrize("sms", [1, 78, 114, 132])
def test_plans_fit_the_machine_and_cover_the_product(library: ctypes.CDLL, sms: int) -> None:
    for name, product in _products():
        plan = _plan(library, sms, product)
        wide = 80 if product["gated"] else plan["columns"]
        tiles = plan["tiles_m"] * plan["tiles_n"] * product["phases"]
        assert plan["tile_h"] * plan["tile_w"] == 128 and plan["tile_w"] & (plan["tile_w"] - 1) == 0, name
        assert plan["tiles_n"] * wide >= product["columns"] > (plan["tiles_n"] - 1) * wide, name
        patches = -(-product["height"] // plan["tile_h"]) * -(-product["width"] // plan["tile_w"])
        assert plan["tiles_m"] == product["images"] * patches, name
        assert plan["columns"] == 160 or not (product["gated"] or product["float8"]), name
        if plan["split"] == 2:  # both blocks of every pair at once, and no half of K empty
            assert plan["ctas"] == 2 * tiles <= sms and product["slices"] >= 4, name
        else:
            assert plan["ctas"] == min(tiles, sms), name


@pytest.mark.parametrize(("columns", "split"), [(128, 1), (160, 1), (160, 2), (256, 1)])
def test_stages_fit_into_shared_memory_and_no_other_would(library: ctypes.CDLL, columns: int, split: int) -> None:
    out = (ctypes.c_int32 * 2)()
    library.sdxl_fast_emulation_shared(columns, split, out)
    stages, size = out
    most, stage = 227 * 1024, (128 + columns) * 128
    assert 3 <= stages <= 8 and size <= most
    assert size + stage > most or stages == 8
    # Beside the stages: their barriers, two of 8 bytes each, and 64 rows of sums from the other block of a pair.
    assert size - stages * stage >= 1024 + 16 * stages + (64 * columns * 4 if split == 2 else 0)


def _busy(plan: dict[str, int], product: dict[str, int], sms: int = 132) -> float:
    """Share of the processors' time spent on tiles, all tiles taking as long."""
    blocks = plan["tiles_m"] * plan["tiles_n"] * product["phases"] * plan["split"]
    return blocks / (sms * -(-blocks // sms))


def test_an_h100_is_kept_busy(library: ctypes.CDLL) -> None:
    """SDXL's widths are multiples of 320: with tiles of 160, split where tiles are few, the waves come out full."""
    rows = functools.partial(dict, images=1, height=1, phases=1, gated=0, float8=0)
    out_projection = rows(width=1024, columns=1280, slices=20)
    plan = _plan(library, 132, out_projection)
    assert (plan["columns"], plan["split"], plan["ctas"]) == (160, 2, 128)
    assert _plan(library, 132, rows(width=1024, columns=1280, slices=80)) == plan  # out of the feed-forward
    assert _plan(library, 132, rows(width=4096, columns=640, slices=10))["ctas"] == 128
    assert _plan(library, 132, rows(width=1024, columns=3840, slices=20))["columns"] == 256
    gate = rows(width=1024, columns=5120, slices=20) | {"gated": 1}
    for product in (gate | {"slices": 10}, _map(sdxl_cases("conv2d")[1], float8=1)):  # half the slices, the same tiles
        product = product | {"float8": 1}
        assert _busy(_plan(library, 132, product), product) > 0.96
    for product in (out_projection, gate, rows(width=4096, columns=640, slices=10), _map(sdxl_cases("conv2d")[1])):
        assert _busy(_plan(library, 132, product), product) > 0.96
    # What is large enough to fill the machine does.
    for name, product in _products():
        plan = _plan(library, 132, product)
        if plan["tiles_m"] * plan["tiles_n"] * product["phases"] > 8 * 132:
            assert _busy(plan, product) > 0.85, name


def test_every_tile_is_one_place(library: ctypes.CDLL) -> None:
    """The schedule goes through all patches, columns and phases, none twice; neighbours share rows of x."""
    for tiles_h, tiles_w, images, tiles_n, phases in itertools.product((1, 3), (1, 5), (1, 2), (1, 4, 9), (1, 4)):
        tiles_m = images * tiles_h * tiles_w
        out = (ctypes.c_int32 * 5)()
        places = []
        for tile in range(tiles_m * tiles_n * phases):
            library.sdxl_fast_emulation_place(tiles_h, tiles_w, tiles_m, tiles_n, 8, 16, 160, phases, tile, out)
            places.append(tuple(out))
        every = itertools.product(
            range(images),
            range(0, 8 * tiles_h, 8),
            range(0, 16 * tiles_w, 16),
            range(0, 160 * tiles_n, 160),
            range(phases),
        )
        assert sorted(places) == sorted(every)
        assert [place[4] for place in places[:phases]] == list(range(phases))


# ---- the C ABI ----


def test_statuses(library: ctypes.CDLL) -> None:
    """What the tensor maps could not hold is an invalid argument; nothing at all is fine."""
    memory = torch.zeros(4096, dtype=torch.bfloat16)
    p = memory.data_ptr()
    assert p % 16 == 0
    linear = library.sdxl_fast_linear_fwd_cuda
    good = (p, p, None, None, None, None, p)
    assert linear(*good, 4, 8, 8, 2, None) == linear(*good, 0, 8, 8, 2, None) == 0
    assert linear(*good, 4, 12, 8, 2, None) == linear(*good, 4, 8, 12, 2, None) == 1
    assert linear(*good, -1, 8, 8, 2, None) == linear(*good, 4, 0, 8, 2, None) == linear(*good, 4, 8, 8, 9, None) == 1
    assert linear(p + 2, *good[1:], 4, 8, 8, 2, None) == linear(*good[:4], p, None, p, 4, 8, 8, 2, None) == 1
    assert linear(*good, 4, 16, 8, 4, None) == 1  # float8 without scales
    assert linear(*good, 4, 8, 8, 0, None) == linear(*good, 4, 8, 8, 3, None) == 2
    gate = library.sdxl_fast_linear_geglu_fwd_cuda
    ones = torch.ones(1)
    one = ones.data_ptr()
    three = (None, None, None)
    assert gate(p, p, None, *three, p, 4, 8, 8, 1, 2, None) == 0
    assert gate(p, p, None, one, one, one, p, 0, 16, 8, 1, 4, None) == 0
    assert gate(p, p, None, *three, p, 4, 8, 8, 2, 2, None) == 1
    assert gate(p, p, None, *three, p, 4, 16, 8, 0, 4, None) == 1  # float8 without scales
    assert gate(p, p, None, one, one, None, p, 4, 8, 8, 0, 4, None) == 1  # half of 16 bytes
    convolve, four = library.sdxl_fast_conv2d_fwd_cuda, (None,) * 4
    assert convolve(p, p, *four, p, 1, 8, 3, 3, 8, 3, 1, 2, None) == 0
    assert convolve(p, p, *four, p, 1, 8, 3, 3, 8, 2, 1, 2, None) == 1
    assert convolve(p, p, *four, p, 1, 8, 2, 3, 8, 3, 0, 2, None) == 1
    assert convolve(p, p, *four, p, 0, 8, 2, 3, 8, 3, 0, 2, None) == 0
    assert convolve(p, p, *four, p, 1, 16, 3, 3, 8, 3, 1, 4, None) == 1  # float8 without scales
    assert convolve(p, p, None, None, one, one, p, 1, 8, 3, 3, 8, 3, 1, 4, None) == 1
    upsample = library.sdxl_fast_upsample_conv2d_fwd_cuda
    assert upsample(p, p, None, p, 1, 8, 2, 2, 8, 2, None) == 0
    assert upsample(p, p, None, p, 1, 8, 2, 2, 4, 2, None) == 1


def test_float8_operands_have_a_dtype_code() -> None:
    from sdxl_fast.ops import _native

    assert _native.DTYPE[FLOAT8] == 4
