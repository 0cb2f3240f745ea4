# SPDX-License-Identifier: Apache-2.0
"""``scale_y`` of layer_norm, group_norm_silu and geglu: float8 written by the op that computes it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.ops.geglu import _OP as GEGLU
from sdxl_fast.reference._common import FLOAT8, quantise
from sdxl_fast.testing.op_suite import device_of, require

BACKENDS = [backend.name for backend in GEGLU.backends]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A power of two, a number that is none, and two of which one pushes most of y beyond 448 and the other below 2^-6.
SCALES = (2.0**-5, 0.0371, 2.0**-11, 300.0)

Values = dict[str, Any]


def _rows(shape: tuple[int, ...], dtype: torch.dtype, residual: bool) -> Values:
    weight, bias = torch.randn(2, shape[-1]).to(dtype)
    more = {"residual": torch.randn(shape).to(dtype)} if residual else {}
    return {"x": torch.randn(shape).to(dtype), "weight": weight, "bias": bias, **more}


def _map(shape: tuple[int, ...], dtype: torch.dtype, nhwc: bool) -> Values:
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(2, shape[1]).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last) if nhwc else x
    return {"x": x, "weight": weight, "bias": bias, "num_groups": 4, "shift": torch.randn(shape[:2]).to(dtype)}


def _halves(shape: tuple[int, ...], dtype: torch.dtype, approximate: str) -> Values:
    return {"x": 3 * torch.randn(shape).to(dtype), "approximate": approximate}


# By name: the op, and what makes its arguments in a dtype. Widths of whole vectors, ragged ones, and nothing at all.
CASES: dict[str, tuple[str, Callable[[torch.dtype], Values]]] = {
    "layer_norm": ("layer_norm", lambda dtype: _rows((2, 3, 640), dtype, False)),
    "layer_norm-residual": ("layer_norm", lambda dtype: _rows((5, 64), dtype, True)),
    "layer_norm-ragged": ("layer_norm", lambda dtype: _rows((3, 7, 33), dtype, True)),
    "layer_norm-wide": ("layer_norm", lambda dtype: _rows((2, 2400), dtype, False)),
    "layer_norm-empty": ("layer_norm", lambda dtype: _rows((0, 8), dtype, True)),
    "group_norm_silu-nhwc": ("group_norm_silu", lambda dtype: _map((2, 32, 6, 5), dtype, True)),
    "group_norm_silu-nchw": ("group_norm_silu", lambda dtype: _map((2, 32, 4, 8), dtype, False)),
    "group_norm_silu-ragged-nhwc": ("group_norm_silu", lambda dtype: _map((3, 12, 7, 3), dtype, True)),
    "group_norm_silu-ragged-nchw": ("group_norm_silu", lambda dtype: _map((1, 20, 5, 5), dtype, False)),
    "group_norm_silu-none": (
        "group_norm_silu",
        lambda dtype: {**_map((1, 16, 4, 4), dtype, True), "activation": "none"},
    ),
    "group_norm_silu-empty": ("group_norm_silu", lambda dtype: _map((0, 8, 4, 4), dtype, True)),
    "geglu": ("geglu", lambda dtype: _halves((3, 5, 2 * 64), dtype, "none")),
    "geglu-ragged": ("geglu", lambda dtype: _halves((7, 2 * 33), dtype, "tanh")),
    "geglu-empty": ("geglu", lambda dtype: _halves((4, 0), dtype, "none")),
}


def _ready(backend: str, name: str, dtype: torch.dtype, scale: float) -> tuple[Callable[..., Any], Values]:
    op, make = CASES[name]
    values = {**make(dtype), "scale_y": torch.tensor([scale])}
    device = device_of(backend)
    values = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
    require(backend, op, values)
    return getattr(ops, op), values


def _same_bytes(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype == FLOAT8 and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_is_the_result_rounded_once_more(name: str, dtype: torch.dtype, backend: str) -> None:
    """Bit for bit what a pass of rounding over the op's own result gives, in the same strides, and the same sum."""
    for scale in SCALES:
        op, values = _ready(backend, name, dtype, scale)
        with use_backend(backend), torch.no_grad():
            found, plain = op(**values), op(**{**values, "scale_y": None})
        if isinstance(plain, tuple):
            assert torch.equal(found[1], plain[1])
            found, plain = found[0], plain[0]
        assert found.stride() == plain.stride() and found.device == plain.device
        assert _same_bytes(found, quantise(plain, values["scale_y"]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", [name for name in CASES if "empty" not in name])
def test_is_near_the_oracle(name: str, backend: str) -> None:
    """Half a unit of three bits of mantissa, or of the smallest subnormal number, away; what is beyond 448 is 448."""
    for scale in SCALES:
        op, values = _ready(backend, name, torch.bfloat16, scale)
        exact = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()
        }
        with use_backend(backend), torch.no_grad():
            y = op(**values)
        with use_backend("eager"), torch.no_grad():
            oracle = op(**{**exact, "scale_y": None})
            if isinstance(y, tuple):
                # The sum is rounded before it is normalised, so the oracle starts from it.
                y, total = y
                oracle = op(total.double(), exact["weight"], exact["bias"])
        wanted = (oracle / scale).clamp(-448, 448).cpu()
        unit = torch.finfo(torch.bfloat16).eps
        bound = (2.0**-4 + 4 * unit) * wanted.abs() + 2.0**-10 + 4 * unit / scale
        assert ((y.cpu().float() - wanted).abs() <= bound).all()
        assert y.float().isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_bfloat16(backend: str) -> None:
    """GELU(64) is 64, so geglu of (v, 64) over a scale of 64 rounds v itself: all signs, ties, subnormals, NaN."""
    v = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    v = v[v.float().abs() < 2.0**121]  # times 64 that stays finite
    v = torch.cat((v, torch.tensor([float("nan"), float("inf"), -float("inf")], dtype=torch.bfloat16)))
    x = torch.cat((v, torch.full_like(v, 64.0)))[None].to(device_of(backend))
    scale = torch.tensor([64.0], device=x.device)
    require(backend, "geglu", {"x": x, "scale_y": scale})
    with use_backend(backend):
        y = ops.geglu(x, scale_y=scale)[0].cpu()
    wanted = v.float().clamp(-448, 448).to(FLOAT8)
    assert torch.equal(y.isnan(), v.isnan())
    assert _same_bytes(y[~y.isnan()], wanted[~wanted.isnan()])


def test_quantise_rounds_to_even_and_saturates() -> None:
    """By hand: e4m3 has steps of 1/8 from 1, of 32 up to 448, and of 2^-9 below 2^-6."""
    given = [1.0625, 1.1875, 432.0, 448.0, 464.0, 1e9, -500.0, 2.0**-10, 3 * 2.0**-10, 2.0**-11, 0.0]
    wanted = [1.0, 1.25, 448.0, 448.0, 448.0, 448.0, -448.0, 0.0, 2.0**-8, 0.0, 0.0]
    one = torch.ones(1)
    assert quantise(torch.tensor(given), one).float().tolist() == wanted
    assert quantise(torch.tensor(given) / 8, one / 8).float().tolist() == wanted


@torch.no_grad()
@pytest.mark.parametrize("name", ["layer_norm", "geglu"])
def test_linear_takes_it(name: str) -> None:
    op, values = _ready("eager", name, torch.bfloat16, 2.0**-5)
    plain = op(**{**values, "scale_y": None})
    weight, scale_w = torch.randn(16, plain.shape[-1]).to(FLOAT8), torch.ones(1)
    scales = {"scale_x": values["scale_y"], "scale_w": scale_w}
    found = ops.linear(op(**values), weight, **scales)
    assert torch.equal(found, ops.linear(quantise(plain, values["scale_y"]), weight, **scales))


@pytest.mark.parametrize("name", ["layer_norm-residual", "group_norm_silu-nhwc", "geglu"])
def test_gradients_are_refused(name: str) -> None:
    op, values = _ready("eager", name, torch.float32, 1.0)
    for argument in ("x", "scale_y"):
        asking = {**values, argument: values[argument].clone().requires_grad_()}
        with pytest.raises(ValueError, match=r"float8 result \(scale_y\) has no derivative.*torch\.no_grad\(\)"):
            op(**asking)
        with torch.no_grad():
            op(**asking)


@pytest.mark.parametrize("name", ["layer_norm", "layer_norm-residual", "group_norm_silu-nhwc", "geglu-ragged"])
def test_library_op_and_compiled_code(name: str) -> None:
    op, values = _ready("eager", name, torch.bfloat16, 2.0**-4)
    raw = getattr(torch.ops.sdxl_fast, f"{op.__name__}_fwd").default
    arguments = {"eps": 1e-5, "residual": None, "skip": None, "activation": "silu", **values}
    named = [argument.name for argument in raw._schema.arguments]
    torch.library.opcheck(raw, tuple(arguments[n] for n in named), test_utils=("test_schema", "test_faketensor"))
    torch.compiler.reset()
    compiled = torch.compile(lambda: op(**values), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, wanted = compiled(), op(**values)
    for a, b in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, wanted)), strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a.float(), b.float())


MISTAKES = [
    (2.0, r"scale_y must be a tensor or None, got float"),
    (torch.ones(1, dtype=torch.float64), r"scale_y must be float32, got float64"),
    (torch.ones(2), r"scale_y must have one element"),
    (torch.ones(1, device="meta"), r"scale_y must be on the device of x"),
]


@pytest.mark.parametrize(
    ("name", "mistake"), list(itertools.product(["layer_norm", "group_norm_silu-nchw", "geglu"], MISTAKES)), ids=str
)
def test_bad_scales_are_named(name: str, mistake: tuple[Any, str]) -> None:
    op, values = _ready("eager", name, torch.float32, 1.0)
    scale, message = mistake
    with pytest.raises(ValueError, match=message):
        op(**{**values, "scale_y": scale})
