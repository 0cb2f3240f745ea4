# SPDX-License-Identifier: Apache-2.0
"""``ops.linear_geglu``: the shared suite, what it is made of, what it saves, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import explain
from sdxl_fast.ops.linear_geglu import _OP
from sdxl_fast.reference import linear_geglu as reference
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


X, WEIGHT, BIAS = torch.zeros(2, 3, 8), torch.zeros(10, 8), torch.zeros(10)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X.long(), WEIGHT), {}, r"x must be float32.*got int64"),
        ((torch.tensor(1.0), WEIGHT), {}, r"x must have at least 1 dimension"),
        ((X, WEIGHT[:, :7]), {}, r"weight must have shape \[2C, K\] = \[any, 8\], got \[10, 7\]"),
        ((X, WEIGHT[:9]), {}, r"weight must have an even number of rows"),
        ((X, WEIGHT, BIAS[:4]), {}, r"bias must have shape \[2C\] of weight = \[10\], got \[4\]"),
        ((X, WEIGHT.half()), {}, r"weight must have the dtype of x or be float32"),
        ((X, WEIGHT, BIAS.half()), {}, r"bias must have the dtype of weight"),
        ((X, WEIGHT.to("meta")), {}, r"weight must be on the device of x"),
        ((X, WEIGHT), {"approximate": "fast"}, r"approximate must be 'none' or 'tanh', got 'fast'"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.linear_geglu(*args, **options)
