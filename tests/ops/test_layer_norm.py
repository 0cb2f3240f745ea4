# SPDX-License-Identifier: Apache-2.0
"""``ops.layer_norm``: the shared suite, the stock module's numbers, the two results, and refusals."""

from __future__ import annotations

import math

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import BACKENDS, explain
from sdxl_fast.ops.layer_norm import _OP
from sdxl_fast.reference import layer_norm as reference
from sdxl_fast.testing.cases import Case, draw, sdxl_cases, shrunk
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import device_of, require


class TestLayerNorm(ContractSuite):
    op = _OP
    public = staticmethod(ops.layer_norm)
    reference = reference
    outputs = ("y", "sum")
    inputs = ("x", "weight", "bias", "residual")
    formats = ("contiguous", "strided")
    wrong = tuple(reference.WRONG)
    cases = (
        Case("ragged", (3, 7, 33)),
        Case("ragged-residual", (5, 3, 45), {"residual": True}),
        Case("vectors-residual", (6, 64), {"residual": True, "eps": 1e-2}),
        Case("no-parameters", (4, 40), {"params": "none"}),
        Case("no-parameters-residual", (2, 3, 17), {"params": "none", "residual": True}),
        Case("float32-parameters", (4, 48), {"params": "float32", "residual": True}),
        Case("one-row", (96,)),
        Case("one-element", (1, 1), {"residual": True}),
        Case("one-column", (5, 1)),
        Case("empty-batch", (0, 8), {"residual": True}),
        Case("empty-rows", (4, 0)),
        Case("offset", (6, 320), {"residual": True}, kind="offset"),
        Case("small", (6, 130), kind="small"),
        Case("constant", (3, 24), kind="constant"),
        Case("many-rows", (150, 24), {"residual": True}),
        Case("wide-row", (2, 2400), {"residual": True}),
    )
    sdxl = (
        *shrunk(sdxl_cases("layer_norm"), longest=33),
        Case("33x2048-residual", (1, 33, 2048), {"residual": True}),
        Case("33x1280-residual", (1, 33, 1280), {"residual": True}),
        Case("3x4001-residual", (3, 4001), {"residual": True}),
    )
    full_size = tuple(
        Case(f"{case.name}-residual", case.shape, {**case.options, "residual": True})
        for case in sdxl_cases("layer_norm", batch=2)
    )
    tiny = Case("tiny", (3, 2, 4), {"residual": True})

    def make(self, case, dtype, generator):
        cols, params = case.shape[-1], case.options.get("params", "like x")
        param_dtype = torch.float32 if params == "float32" and dtype != torch.float64 else dtype
        weight, bias = 1 + 0.5 * torch.randn(2, cols, generator=generator)
        return {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "weight": None if params == "none" else weight.to(param_dtype),
            "bias": None if params == "none" else (bias - 1).to(param_dtype),
            "eps": case.options.get("eps", 1e-5),
            "residual": draw(case.shape, "normal", generator).to(dtype) if case.options.get("residual") else None,
        }

    def rows(self, case):
        rows = math.prod(case.shape[:-1])
        return {"dweight": rows, "dbias": rows}

    def raw(self, function):
        whole = super().raw(lambda *args: [*function(*args)])

        def call(**values):
            found = whole(**values)
            return tuple(found[: 1 if values.get("residual") is None else 2])

        return call


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_stock_layer_norm(backend):
    """Of the sum that stock PyTorch rounds too, in float32 to its last bits."""
    require(backend, "layer_norm")
    torch.manual_seed(0)
    x, residual = torch.randn(2, 5, 7, 96, device=device_of(backend))
    stock = torch.nn.LayerNorm(96, device=x.device)
    torch.nn.init.normal_(stock.weight), torch.nn.init.normal_(stock.bias)
    with use_backend(backend):
        y, total = ops.layer_norm(x, stock.weight, stock.bias, residual=residual)
        alone = ops.layer_norm(x, stock.weight, stock.bias)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, stock(x + residual), rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(alone, stock(x), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_is_normalised_is_the_sum_that_is_returned(dtype, backend):
    x, residual = (8 * torch.randn(2, 4, 64)).to(dtype).to(device_of(backend))
    require(backend, "layer_norm", {"x": x, "weight": None, "bias": None})
    with use_backend(backend):
        y, total = ops.layer_norm(x, None, None, residual=residual)
        assert torch.equal(total, x + residual)
        assert torch.equal(y, ops.layer_norm(total, None, None))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("which", ["y", "sum"])
def test_either_result_alone_has_gradients(which, backend):
    """Those of the composition; a weight that was not reached gets none or zeros."""
    require(backend, "layer_norm")
    values = [torch.randn(s, device=device_of(backend)).requires_grad_() for s in ((5, 24), (24,), (24,), (5, 24))]
    dy = torch.randn(5, 24, device=device_of(backend))
    index = ("y", "sum").index(which)
    with use_backend(backend):
        found = ops.layer_norm(*values[:3], residual=values[3])[index]
    got = torch.autograd.grad(found, values, dy, materialize_grads=True)
    x, weight, bias, residual = values
    total = x + residual
    composed = (torch.nn.functional.layer_norm(total, (24,), weight, bias), total)[index]
    expected = torch.autograd.grad(composed, values, dy, materialize_grads=True)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "eager"])
def test_leading_shape_and_strides_do_not_matter(backend):
    require(backend, "layer_norm")
    x = torch.randn(4, 6, 32)
    with use_backend(backend):
        y = ops.layer_norm(x, None, None)
        assert torch.equal(ops.layer_norm(x.view(24, 32), None, None).view_as(x), y)
        assert torch.equal(ops.layer_norm(x.transpose(0, 1), None, None).transpose(0, 1), y)
        assert torch.equal(ops.layer_norm(x[1, 2], None, None), y[1, 2])


def test_triton_says_which_rows_are_too_wide():
    require("triton", "layer_norm")
    x = torch.zeros(1, 4097, device=device_of("triton"))
    assert "last dimension of x must be at most 4096" in explain("layer_norm", x, None, None).reasons["triton"]


X, VECTOR = torch.zeros(2, 3, 8), torch.zeros(8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X.long(), None, None), {}, r"x must be float32.*got int64"),
        ((torch.tensor(1.0), None, None), {}, r"x must have at least 1 dimension \[\.\.\., C\], got shape \[\]"),
        (([1.0], None, None), {}, r"x must be a tensor, got list"),
        ((X, VECTOR, None), {}, r"weight and bias must both be given or both be None, got None only for bias"),
        ((X, VECTOR[:7], VECTOR), {}, r"weight must have shape \[C\] of x = \[8\], got \[7\]"),
        ((X, VECTOR.half(), VECTOR.half()), {}, r"weight must have the dtype of x or be float32"),
        ((X.bfloat16(), VECTOR, VECTOR.bfloat16()), {}, r"bias must have the dtype of weight"),
        ((X, None, None), {"residual": X[:1]}, r"residual must have the shape of x"),
        ((X, None, None), {"residual": X.half()}, r"residual must have the dtype of x"),
        ((X, None, None), {"residual": X.to("meta")}, r"residual must be on the device of x"),
        ((X, None, None), {"eps": -1e-5}, r"eps must be a finite number >= 0, got -1e-05"),
        ((X, None, None), {"eps": math.inf}, r"eps must be a finite number >= 0, got inf"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.layer_norm(*args, **options)
