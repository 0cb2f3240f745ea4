# SPDX-License-Identifier: Apache-2.0
"""``ops.linear``: the shared suite, float8, autocast, refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import explain
from sdxl_fast.ops.linear import _OP
from sdxl_fast.reference import linear as reference
from sdxl_fast.reference.linear import FLOAT8, quantise
from sdxl_fast.testing.cases import Case, draw, sdxl_cases
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import device_of, require

BACKENDS = [backend.name for backend in _OP.backends]


class TestLinear(ContractSuite):
    op = _OP
    public = staticmethod(ops.linear)
    reference = reference
    outputs = ("y",)
    inputs = ("x", "weight", "bias", "residual")
    formats = ("contiguous", "strided")
    wrong = tuple(reference.WRONG)
    cases = (
        Case("ragged", (3, 7, 33), {"out_features": 21}),
        Case("ragged-residual", (2, 5, 45), {"out_features": 70, "residual": True}),
        Case("no-bias", (6, 64), {"out_features": 32, "bias": False, "residual": True}),
        Case("weight-transposed", (9, 24), {"out_features": 40, "transposed": True}),
        Case("float32-parameters", (4, 48), {"out_features": 16, "params": "float32", "residual": True}),
        Case("one-row", (96,), {"out_features": 5, "residual": True}),
        Case("one-element", (1, 1), {"out_features": 1, "residual": True}),
        Case("empty-batch", (0, 8), {"out_features": 4, "residual": True}),
        Case("no-features", (4, 0), {"out_features": 3}),
        Case("offset", (8, 64), {"out_features": 24}, kind="offset"),
        Case("small", (8, 64), {"out_features": 24, "residual": True}, kind="small"),
        Case("many-rows", (150, 24), {"out_features": 17}),
    )
    # Widths of SDXL, of a few rows and output features.
    sdxl = tuple(Case(f"3x{k}-to24", (3, k), {"out_features": 24, "residual": True}) for k in (320, 1280, 5120))
    full_size = tuple(case for case in sdxl_cases("linear") if math.prod(case.shape[:-1]) >= 1024)
    tiny = Case("tiny", (3, 2, 4), {"out_features": 3, "residual": True})

    def make(self, case, dtype, generator):
        k, n = case.shape[-1], case.options["out_features"]
        params = torch.float32 if case.options.get("params") == "float32" and dtype != torch.float64 else dtype
        weight = (torch.randn(n, k, generator=generator) / max(k, 1) ** 0.5).to(params)
        bias = torch.randn(n, generator=generator).to(params)
        residual = torch.randn(*case.shape[:-1], n, generator=generator).to(dtype)
        return {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "weight": weight.t().contiguous().t() if case.options.get("transposed") else weight,
            "bias": bias if case.options.get("bias", True) else None,
            "residual": residual if case.options.get("residual") else None,
        }

    def rows(self, case):
        count = math.prod(case.shape[:-1])
        return {"y": case.shape[-1], "dx": case.options["out_features"], "dweight": count, "dbias": count}


# ---- float8 ----


def _float8(device: str, rows: int = 24, k: int = 64, n: int = 48) -> dict[str, torch.Tensor]:
    x, weight = torch.randn(rows, k, device=device), torch.randn(n, k, device=device)
    scale_x, scale_w = x.abs().max() / 448, weight.abs().max() / 448
    return {
        "x": quantise(x, scale_x),
        "weight": quantise(weight, scale_w),
        "bias": torch.randn(n, device=device).bfloat16(),
        "residual": torch.randn(rows, n, device=device).bfloat16(),
        "scale_x": scale_x,
        "scale_w": scale_w,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", [(), ("bias",), ("residual",), ("bias", "residual")], ids=str)
def test_float8_is_the_product_of_the_dequantised(backend, without):
    values = _float8(device_of(backend)) | dict.fromkeys(without)
    require(backend, "linear", values)
    with use_backend(backend), torch.no_grad():
        y = ops.linear(**values)
    exact = (values["x"].double() * values["scale_x"]) @ (values["weight"].double() * values["scale_w"]).t()
    for term in ("bias", "residual"):
        exact = exact + (0 if values[term] is None else values[term].double())
    assert y.dtype == torch.bfloat16
    # One rounding, or two where the library adds the residual to a result in bfloat16.
    assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-8 * exact.abs().mean()).all())


def test_float8_of_stacked_rows_and_a_scale_of_one_dimension():
    values = _float8("cpu")
    flat = ops.linear(**values)
    stacked = {k: values[k].view(2, 12, -1) for k in ("x", "residual")}
    again = ops.linear(**{**values, **stacked, "scale_x": values["scale_x"].view(1)})
    assert torch.equal(again.view_as(flat), flat)


def test_quantise_cuts_off_what_is_too_large():
    x = torch.tensor([0.0, 1.0, -448.0, 1e4, -torch.inf])
    assert quantise(x, torch.tensor(1.0)).tolist() == [0.0, 1.0, -448.0, 448.0, -448.0]
    assert quantise(x, torch.tensor(2.0)).tolist()[1:3] == [0.5, -224.0]


def test_float8_has_no_derivative():
    values = _float8("cpu")
    values["bias"].requires_grad_()
    with pytest.raises(ValueError, match="float8 products have no derivative"):
        ops.linear(**values)
    with torch.no_grad():
        ops.linear(**values)


# ---- which backend ----


def test_library_is_the_choice_on_a_cpu():
    assert explain("linear", torch.zeros(3, 4), torch.zeros(5, 4)).backend == "library"


def test_is_the_stock_layer():
    """In float32 to its last bits: the library's provider is the stock call."""
    x, layer = torch.randn(4, 6, 32), torch.nn.Linear(32, 24)
    with torch.no_grad():
        assert torch.equal(ops.linear(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_obeyed(backend):
    """float32 in, autocast's dtype out, as accurate as the stock layer; gradients come back in float32."""
    require(backend, "linear")
    device = device_of(backend)
    x, weight, bias = (torch.randn(s, device=device).requires_grad_() for s in ((16, 64), (8, 64), (8,)))
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        y, stock = ops.linear(x, weight, bias), F.linear(x, weight, bias)
    assert y.dtype == stock.dtype == torch.bfloat16
    exact = F.linear(x.double(), weight.double(), bias.double())
    error, stock_error = ((t.double() - exact).norm() for t in (y, stock))
    assert error < 1.1 * stock_error
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), (x, weight, bias)))


# ---- refusals ----

X, WEIGHT, BIAS = torch.zeros(2, 3, 8), torch.zeros(5, 8), torch.zeros(5)
E4M3 = X.to(FLOAT8)
ONE = torch.ones(())


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X.long(), WEIGHT), {}, r"x must be float32.*or float8_e4m3fn, got int64"),
        ((torch.tensor(1.0), WEIGHT), {}, r"x must have at least 1 dimension \[\.\.\., K\], got shape \[\]"),
        (([1.0], WEIGHT), {}, r"x must be a tensor, got list"),
        ((X, WEIGHT[:, :7]), {}, r"weight must have shape \[N, K\] = \[any, 8\], got \[5, 7\]"),
        ((X, WEIGHT[:0]), {}, r"weight must have shape \[N, K\] = \[any, 8\], got \[0, 8\]"),
        ((X, WEIGHT, BIAS[:4]), {}, r"bias must have shape \[N\] of weight = \[5\], got \[4\]"),
        ((X, WEIGHT.half()), {}, r"weight must have the dtype of x or be float32"),
        (
            (X.half(), WEIGHT.half(), BIAS.bfloat16()),
            {},
            r"bias must have the dtype of the result or of weight = float16",
        ),
        ((X, WEIGHT), {"residual": X}, r"residual must have shape \[\.\.\., N\] = \[2, 3, 5\], got \[2, 3, 8\]"),
        (
            (X, WEIGHT),
            {"residual": X[..., :5].half()},
            r"residual must have the dtype of the result = float32, got float16",
        ),
        ((X, WEIGHT), {"residual": X[..., :5].to("meta")}, r"residual must be on the device of x"),
        ((X, WEIGHT), {"scale_x": ONE}, r"scale_x and scale_w must be given for a float8_e4m3fn x, and only then"),
        ((E4M3, WEIGHT.to(FLOAT8)), {"scale_x": ONE}, r"scale_x and scale_w must be given"),
        ((E4M3, WEIGHT), {"scale_x": ONE, "scale_w": ONE}, r"weight must be float8_e4m3fn beside a float8_e4m3fn x"),
        ((E4M3, WEIGHT.to(FLOAT8)), {"scale_x": ONE.double(), "scale_w": ONE}, r"scale_x must be float32, got float64"),
        ((E4M3, WEIGHT.to(FLOAT8)), {"scale_x": X[0], "scale_w": ONE}, r"scale_x must have one element"),
        (
            (E4M3, WEIGHT.to(FLOAT8), BIAS),
            {"scale_x": ONE, "scale_w": ONE},
            r"bias must have .* = bfloat16, got float32",
        ),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.linear(*args, **options)
