# SPDX-License-Identifier: Apache-2.0
"""``ops.linear_geglu``: the shared suite, what it is made of, what it saves, float8, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import explain
from sdxl_fast.ops.linear_geglu import _OP
from sdxl_fast.reference import linear_geglu as reference
from sdxl_fast.reference.linear import FLOAT8, quantise
from sdxl_fast.testing.cases import Case, draw, sdxl_cases
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import device_of, require

BACKENDS = [backend.name for backend in _OP.backends]


class TestLinearGeglu(ContractSuite):
    op = _OP
    public = staticmethod(ops.linear_geglu)
    reference = reference
    outputs = ("y",)
    inputs = ("x", "weight", "bias")
    formats = ("contiguous", "strided")
    wrong = tuple(reference.WRONG)
    cases = (
        Case("ragged", (3, 7, 33), {"out_features": 21}),
        Case("tanh", (2, 5, 45), {"out_features": 40, "approximate": "tanh"}),
        Case("no-bias", (6, 64), {"out_features": 32, "bias": False}),
        Case("float32-parameters", (4, 48), {"out_features": 16, "params": "float32"}),
        Case("one-row", (96,), {"out_features": 5}),
        Case("one-element", (1, 1), {"out_features": 1, "bias": False}),
        Case("empty-batch", (0, 8), {"out_features": 4}),
        Case("small", (8, 64), {"out_features": 24}, kind="small"),
        Case("many-rows", (150, 24), {"out_features": 17}),
    )
    # The widths of SDXL, of a few rows and output features.
    sdxl = tuple(
        Case(f"3x{c.shape[-1]}-to24", (3, c.shape[-1]), {"out_features": 24}) for c in sdxl_cases("linear_geglu")
    )
    full_size = sdxl_cases("linear_geglu")
    tiny = Case("tiny", (3, 2, 4), {"out_features": 3})

    def make(self, case, dtype, generator):
        k, n = case.shape[-1], 2 * case.options["out_features"]
        params = torch.float32 if case.options.get("params") == "float32" and dtype != torch.float64 else dtype
        bias = torch.randn(n, generator=generator).to(params)
        return {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "weight": (torch.randn(n, k, generator=generator) / k**0.5).to(params),
            "bias": bias if case.options.get("bias", True) else None,
            "approximate": case.options.get("approximate", "none"),
        }

    def rows(self, case):
        count, n = math.prod(case.shape[:-1]), case.options["out_features"]
        return {"y": case.shape[-1], "dx": 2 * n, "dweight": count, "dbias": count}


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_linear_then_geglu(backend):
    require(backend, "linear_geglu")
    x, weight, bias = (torch.randn(s, device=device_of(backend)) for s in ((5, 32), (48, 32), (48,)))
    with use_backend(backend):
        y = ops.linear_geglu(x, weight, bias)
    expected = ops.geglu(ops.linear(x, weight, bias))
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_library_gates_with_the_best_kernel_there_is():
    """The gate has no backend called library: it takes its own, and the forced one is back afterwards."""
    x, weight = torch.randn(5, 32), torch.randn(48, 32)
    with use_backend("library"):
        y = ops.linear_geglu(x, weight)
        with pytest.raises(ValueError, match="geglu: backend 'library' cannot run this call"):
            ops.geglu(ops.linear(x, weight))
    assert torch.equal(y, ops.geglu(ops.linear(x, weight)))
    assert explain("linear_geglu", x, weight).backend == "library"


def test_nothing_of_the_size_of_the_projection_is_saved():
    saved = []
    x, weight, bias = (torch.randn(s).requires_grad_() for s in ((64, 8), (96, 8), (96,)))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        ops.linear_geglu(x, weight, bias)
    assert set(saved) == {x.shape, weight.shape, bias.shape}


# ---- float8 ----


def _float8(device: str, rows: int = 24, k: int = 64, n: int = 48) -> dict[str, torch.Tensor]:
    x, weight = torch.randn(rows, k, device=device), torch.randn(2 * n, k, device=device) / k**0.5
    scale_x, scale_w = x.abs().max() / 448, weight.abs().max() / 448
    return {
        "x": quantise(x, scale_x),
        "weight": quantise(weight, scale_w),
        "bias": torch.randn(2 * n, device=device).bfloat16(),
        "scale_x": scale_x,
        "scale_w": scale_w,
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("biased", [True, False])
def test_float8_is_the_gate_of_the_dequantised(backend, biased, approximate):
    """Value and gate both with the scales: without them the gate would be open or shut."""
    values = _float8(device_of(backend)) | ({} if biased else {"bias": None})
    require(backend, "linear_geglu", values)
    with use_backend(backend), torch.no_grad():
        y = ops.linear_geglu(**values, approximate=approximate)
    h = (values["x"].double() * values["scale_x"]) @ (values["weight"].double() * values["scale_w"]).t()
    value, gate = (h + (values["bias"].double() if biased else 0)).chunk(2, -1)
    exact = value * torch.nn.functional.gelu(gate, approximate=approximate)
    assert y.dtype == torch.bfloat16
    # One rounding, or three where the library gates a projection in bfloat16.
    assert bool(((y.double() - exact).abs() <= 2**-7 * exact.abs() + 2**-8 * exact.abs().mean()).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FLOAT8], ids=str)
def test_a_float8_result_is_its_own_rounded_once_more(backend, dtype):
    """Bit for bit what a pass of rounding makes of the result, with scales that cut off and that flush to zero."""
    values = _float8(device_of(backend))
    if dtype != FLOAT8:
        values = {name: values[name].to(dtype) for name in ("x", "weight", "bias")}
    for scale in (2.0**-5, 0.0371, 300.0):
        scale_y = torch.tensor([scale], device=values["x"].device)
        require(backend, "linear_geglu", {**values, "scale_y": scale_y})
        with use_backend(backend), torch.no_grad():
            plain, found = ops.linear_geglu(**values), ops.linear_geglu(**values, scale_y=scale_y)
        assert found.dtype == FLOAT8
        assert torch.equal(found.view(torch.uint8), quantise(plain, scale_y).view(torch.uint8))


@pytest.mark.parametrize("scale_y", [False, True])
def test_float8_in_library_ops_and_compiled_code(scale_y):
    values = _float8("cpu") | ({"scale_y": torch.full((1,), 2.0**-5)} if scale_y else {})
    arguments = {"approximate": "none", "scale_y": None, **values}
    raw = torch.ops.sdxl_fast.linear_geglu_fwd.default
    args = tuple(arguments[argument.name] for argument in raw._schema.arguments)
    torch.library.opcheck(raw, args, test_utils=("test_faketensor",))  # test_schema multiplies, which float8 cannot
    torch.compiler.reset()
    compiled = torch.compile(lambda: ops.linear_geglu(**values), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, wanted = compiled(), ops.linear_geglu(**values)
    assert found.dtype == wanted.dtype and torch.equal(found.float(), wanted.float())


def test_float8_has_no_derivative():
    values = _float8("cpu")
    values["bias"].requires_grad_()
    with pytest.raises(ValueError, match="float8 products have no derivative"):
        ops.linear_geglu(**values)
    plain = {"x": torch.randn(2, 8).requires_grad_(), "weight": torch.randn(6, 8)}
    with pytest.raises(ValueError, match=r"float8 result \(scale_y\) has no derivative"):
        ops.linear_geglu(**plain, scale_y=torch.ones(1))
    with torch.no_grad():
        ops.linear_geglu(**values)
        ops.linear_geglu(**plain, scale_y=torch.ones(1))


# ---- refusals ----

X, WEIGHT, BIAS = torch.zeros(2, 3, 8), torch.zeros(10, 8), torch.zeros(10)
E4M3, ONE = X.to(FLOAT8), torch.ones(())


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X.long(), WEIGHT), {}, r"x must be float32.*or float8_e4m3fn, got int64"),
        ((torch.tensor(1.0), WEIGHT), {}, r"x must have at least 1 dimension"),
        ((X, WEIGHT[:, :7]), {}, r"weight must have shape \[2C, K\] = \[any, 8\], got \[10, 7\]"),
        ((X, WEIGHT[:9]), {}, r"weight must have an even number of rows"),
        ((X, WEIGHT, BIAS[:4]), {}, r"bias must have shape \[2C\] of weight = \[10\], got \[4\]"),
        ((X, WEIGHT.half()), {}, r"weight must have the dtype of x or be float32"),
        ((X, WEIGHT, BIAS.half()), {}, r"bias must have the dtype of the result or of weight = float32, got float16"),
        ((X, WEIGHT.to("meta")), {}, r"weight must be on the device of x"),
        ((X, WEIGHT), {"approximate": "fast"}, r"approximate must be 'none' or 'tanh', got 'fast'"),
        ((X, WEIGHT), {"scale_w": ONE}, r"scale_x and scale_w must be given for a float8_e4m3fn x, and only then"),
        ((E4M3, WEIGHT.to(FLOAT8)), {"scale_x": ONE}, r"scale_x and scale_w must be given"),
        ((E4M3, WEIGHT), {"scale_x": ONE, "scale_w": ONE}, r"weight must be float8_e4m3fn beside a float8_e4m3fn x"),
        ((E4M3, WEIGHT.to(FLOAT8), BIAS), {"scale_x": ONE, "scale_w": ONE}, r"bias must have .* = bfloat16"),
        ((E4M3, WEIGHT.to(FLOAT8)), {"scale_x": X[0], "scale_w": ONE}, r"scale_x must have one element"),
        ((X, WEIGHT), {"scale_y": ONE.double()}, r"scale_y must be float32, got float64"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_geglu(*args, **options)
