# SPDX-License-Identifier: Apache-2.0
"""``ops.upsample_conv2d``: the shared suite, the phases and what they cost in accuracy, autocast, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import explain
from sdxl_fast.ops import _convolution
from sdxl_fast.ops.upsample_conv2d import _OP, phase_weights
from sdxl_fast.reference import upsample_conv2d as reference
from sdxl_fast.testing.cases import Case, draw, sdxl_cases
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import device_of, require, runnable

BACKENDS = [backend.name for backend in _OP.backends]


class TestUpsampleConv2d(ContractSuite):
    op = _OP
    public = staticmethod(ops.upsample_conv2d)
    reference = reference
    outputs = ("y",)
    inputs = ("x", "weight", "bias")
    formats = ("contiguous", "channels_last", "nhwc_slice")
    wrong = tuple(reference.WRONG)
    cases = (
        Case("ragged", (2, 5, 3, 7), {"out_channels": 6}),
        Case("wide-enough-for-phases", (2, 17, 9, 15), {"out_channels": 19}),
        Case("phases-given", (1, 24, 4, 6), {"out_channels": 33, "phases": True}),
        Case("no-bias", (2, 8, 8, 8), {"out_channels": 4, "bias": False}),
        Case("float32-parameters", (1, 16, 12, 8), {"out_channels": 8, "params": "float32"}),
        Case("one-element", (1, 1, 1, 1), {"out_channels": 1}),
        Case("one-column", (1, 3, 5, 1), {"out_channels": 2}),
        Case("empty-batch", (0, 4, 3, 3), {"out_channels": 4}),
        Case("offset", (1, 16, 8, 9), {"out_channels": 16}, kind="offset"),
        Case("small", (1, 16, 9, 8), {"out_channels": 16}, kind="small"),
    )
    # The input channels of SDXL on a small map to a few output channels; the last goes by the phases on a CPU as well.
    # From 512 channels on the map is just large enough for Triton's interpreter to leave it out: the same tiles as of
    # 256, summed longer, would take it a minute a case.
    sdxl = (
        *(
            Case(f"1x{c}x{side}x{side}-to40", (1, c, side, side), {"out_channels": 40})
            for c, side in ((256, 2), (512, 4), (640, 4), (1280, 3))
        ),
        Case("1x256x8x8-to32", (1, 256, 8, 8), {"out_channels": 32}),
    )
    full_size = sdxl_cases("upsample_conv2d")
    tiny = Case("tiny", (1, 2, 2, 3), {"out_channels": 2})

    def make(self, case, dtype, generator):
        c_in, c_out = case.shape[1], case.options["out_channels"]
        params = torch.float32 if case.options.get("params") == "float32" and dtype != torch.float64 else dtype
        weight = (torch.randn(c_out, c_in, 3, 3, generator=generator) / (9 * max(c_in, 1)) ** 0.5).to(params)
        bias = torch.randn(c_out, generator=generator).to(params) if case.options.get("bias", True) else None
        return {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "weight": weight,
            "bias": bias,
            "phases": phase_weights(weight, dtype) if case.options.get("phases") else None,
        }

    def rows(self, case):
        n, c, h, w = case.shape
        return {
            "y": 9 * c,
            "dx": 36 * case.options["out_channels"],
            "dweight": 4 * n * h * w,
            "dbias": 4 * n * h * w,
        }

    def check_layout(self, values, got, layout):
        """y, of another shape than x, keeps the memory format of x all the same."""
        super().check_layout(values, got, layout)
        wanted = torch.contiguous_format if values["x"].is_contiguous() or layout == "strided" else torch.channels_last
        assert got["y"].is_contiguous(memory_format=wanted)


# ---- the phases ----


def test_phase_weights_are_sums_of_taps():
    """By hand in one dimension: the kernel of the transposed convolution is (w2, w1 + w2, w0 + w1, w0)."""
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, :, 1] = torch.tensor([1.0, 10.0, 100.0])
    kernel = phase_weights(weight)[0, 0]
    assert kernel.tolist() == [[0, 100, 100, 0], [0, 110, 110, 0], [0, 11, 11, 0], [0, 1, 1, 0]]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equal_in_real_arithmetic(layout):
    """Integers small enough for float32 to hold every sum give the definition's result bit for bit."""
    x = torch.randint(-4, 5, (2, 12, 9, 8)).float().contiguous(memory_format=layout)
    weight, bias = torch.randint(-4, 5, (7, 12, 3, 3)).float(), torch.randint(-4, 5, (7,)).float()
    expected = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    for backend in runnable("upsample_conv2d", {"x": x, "weight": weight, "bias": bias}):
        for phases in (None, phase_weights(weight)):
            with use_backend(backend):
                assert torch.equal(ops.upsample_conv2d(x, weight, bias, phases=phases), expected)


def test_fold_is_the_adjoint_of_the_phases():
    weight = torch.randn(3, 5, 3, 3, dtype=torch.float64, requires_grad=True)
    dkernel = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    (expected,) = torch.autograd.grad(phase_weights(weight), weight, dkernel)
    torch.testing.assert_close(reference.fold_phases(dkernel), expected)


def test_sums_are_taken_in_float32_and_rounded_once():
    weight = torch.randn(9, 11, 3, 3).bfloat16()
    exact = phase_weights(weight.double())
    assert torch.equal(phase_weights(weight), exact.float().bfloat16())
    assert torch.equal(phase_weights(weight.float(), torch.bfloat16), exact.float().bfloat16())


@pytest.mark.parametrize(
    ("backend", "dtype"), [("library", torch.bfloat16), ("triton", torch.bfloat16), ("triton", torch.float16)]
)
def test_error_of_16_bit_is_within_the_stated_bound(backend, dtype):
    """u (sum |kernel| |x| + |y|) with u half an ulp of 1; about sqrt 2 times the rounding of the output alone."""
    require(backend, "upsample_conv2d")
    unit = torch.finfo(dtype).eps / 2
    x = torch.randn(1, 64, 8, 8).to(dtype)
    weight, bias = (torch.randn(32, 64, 3, 3) / 24).to(dtype), torch.randn(32).to(dtype)
    kernel = phase_weights(weight)
    on = device_of(backend)
    with use_backend(backend):
        got = ops.upsample_conv2d(x.to(on), weight.to(on), bias.to(on), phases=kernel.to(on)).double().cpu()
    exact = reference.fwd(x.double(), weight.double(), bias.double(), None)
    terms = F.conv_transpose2d(x.double().abs(), kernel.double().abs(), bias.double().abs(), stride=2, padding=1)
    accumulation = 4 * 64 * torch.finfo(torch.float32).eps * terms
    assert bool(((got - exact).abs() <= unit * (terms + exact.abs()) + accumulation).all())
    once = (exact.to(dtype).double() - exact).square().mean().sqrt()
    assert once < (got - exact).square().mean().sqrt() < 1.7 * once


def test_phases_do_not_stop_the_gradient_of_the_weight():
    x, weight, bias = torch.randn(1, 8, 9, 9), torch.randn(6, 8, 3, 3, requires_grad=True), torch.randn(6)
    for backend in runnable("upsample_conv2d", {"x": x, "weight": weight, "bias": bias}):
        with use_backend(backend):
            plain = torch.autograd.grad(ops.upsample_conv2d(x, weight, bias).square().sum(), weight)
            given = ops.upsample_conv2d(x, weight, bias, phases=phase_weights(weight.detach()))
            torch.testing.assert_close(torch.autograd.grad(given.square().sum(), weight), plain)


# ---- which way ----


@pytest.mark.parametrize("backward", [False, True])
def test_phases_are_taken_where_they_were_measured_to_be_faster(backward):
    """Every map of SDXL goes by the phases; a handful of positions, and a GPU where nothing was prepared, do not."""
    for case in sdxl_cases("upsample_conv2d"):
        x = torch.empty(case.shape, device="meta")
        weight = torch.empty(case.options["out_channels"], case.shape[1], 3, 3, device="meta")
        assert not _convolution.by_phases(x, weight, made=False, backward=backward)
        assert _convolution.by_phases(x, weight, made=True, backward=backward)
    weight = torch.empty(144, 144, 3, 3)
    for n, made in itertools.product((1, 100), (False, True)):
        taken = _convolution.by_phases(torch.empty(n, 144, 4, 4), weight, made=made, backward=backward)
        assert taken == (n == 100 or (made and not backward))
    for dtype in (torch.float16, torch.float64):
        assert not _convolution.by_phases(torch.empty(9, 144, 9, 9, dtype=dtype), weight, made=True, backward=backward)
    large = torch.empty(1280, 1280, 3, 3)
    assert _convolution.by_phases(torch.empty(1, 1280, 32, 32), large, made=False, backward=backward)
    assert not _convolution.by_phases(torch.empty(1, 1280, 16, 16), large, made=False, backward=backward)


def test_library_is_the_choice_on_a_cpu():
    x, weight = torch.zeros(1, 4, 8, 8), torch.zeros(4, 4, 3, 3)
    assert explain("upsample_conv2d", x, weight, None).backend == "library"


# ---- autocast ----


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_obeyed(backend):
    """float32 in, autocast's dtype out; gradients come back in float32."""
    require(backend, "upsample_conv2d")
    device = device_of(backend)
    x, weight, bias = (torch.randn(s, device=device).requires_grad_() for s in ((1, 16, 8, 8), (8, 16, 3, 3), (8,)))
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        y = ops.upsample_conv2d(x, weight, bias)
        stock = F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1)
    assert y.dtype == stock.dtype == torch.bfloat16
    exact = reference.fwd(x.double(), weight.double(), bias.double(), None)
    error, stock_error = ((t.double() - exact).norm() for t in (y, stock))
    assert error < 1.3 * stock_error
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), (x, weight, bias)))


# ---- refusals ----

X, WEIGHT, BIAS = torch.zeros(1, 4, 2, 2), torch.zeros(6, 4, 3, 3), torch.zeros(6)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0], WEIGHT, BIAS), {}, r"x must have 4 dimensions \[N, C_in, H, W\]"),
        ((X[..., :0], WEIGHT, BIAS), {}, r"x must have shape .* = \[1, any, any, any\], got \[1, 4, 2, 0\]"),
        ((X.long(), WEIGHT, BIAS), {}, r"x must be float32.*got int64"),
        (([1.0], WEIGHT, BIAS), {}, r"x must be a tensor, got list"),
        (
            (X, WEIGHT[:, :3], BIAS),
            {},
            r"weight must have shape \[C_out, C_in, 3, 3\] = \[any, 4, 3, 3\], got \[6, 3, 3",
        ),
        ((X, WEIGHT[..., :1], BIAS), {}, r"weight must have shape \[C_out, C_in, 3, 3\]"),
        ((X, WEIGHT[:0], BIAS[:0]), {}, r"weight must have shape .*got \[0, 4, 3, 3\]"),
        ((X, WEIGHT, BIAS[:5]), {}, r"bias must have shape \[C_out\] of weight = \[6\], got \[5\]"),
        ((X, WEIGHT.half(), BIAS.half()), {}, r"weight must have the dtype of x or be float32"),
        ((X.bfloat16(), WEIGHT, BIAS.bfloat16()), {}, r"bias must have the dtype of weight"),
        ((X, WEIGHT, BIAS), {"phases": WEIGHT}, r"phases must have shape \[C_in, C_out, 4, 4\] = \[4, 6, 4, 4\]"),
        ((X.half(), WEIGHT, BIAS), {"phases": phase_weights(WEIGHT)}, r"phases must have the dtype of x"),
        ((X, WEIGHT.to("meta"), None), {}, r"weight must be on the device of x"),
        (
            (X, WEIGHT, BIAS),
            {"phases": phase_weights(WEIGHT.clone().requires_grad_())},
            r"no gradient is defined for phases, which requires grad; detach it",
        ),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.upsample_conv2d(*args, **options)
