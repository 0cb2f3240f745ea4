# SPDX-License-Identifier: Apache-2.0
"""``ops.conv2d``: the shared suite, the stock layer's numbers, autocast, float8, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import explain
from sdxl_fast.ops.conv2d import _OP
from sdxl_fast.reference import conv2d as reference
from sdxl_fast.reference.linear import FLOAT8, quantise
from sdxl_fast.testing.cases import Case, draw, sdxl_cases
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import device_of, require, runnable

BACKENDS = [backend.name for backend in _OP.backends]


def _case(name, shape, out_channels, k=3, stride=1, padding=None, kind="normal", **options):
    options |= {"out_channels": out_channels, "kernel_size": k, "stride": stride, "padding": padding}
    return Case(name, shape, options, kind=kind)


class TestConv2d(ContractSuite):
    op = _OP
    public = staticmethod(ops.conv2d)
    reference = reference
    outputs = ("y",)
    inputs = ("x", "weight", "bias", "residual")
    formats = ("contiguous", "channels_last", "nhwc_slice")
    wrong = tuple(reference.WRONG)
    cases = (
        _case("ragged-residual", (2, 5, 3, 7), 6, residual=True),
        _case("strided", (1, 17, 9, 6), 19, stride=2),
        _case("strided-unpadded", (1, 8, 9, 7), 12, stride=2, padding=0, residual=True),
        _case("pointwise-residual", (2, 33, 4, 5), 20, k=1, residual=True),
        _case("no-bias", (1, 8, 6, 6), 4, bias=False),
        _case("float32-parameters", (1, 16, 5, 4), 8, params="float32", residual=True),
        _case("one-element", (1, 1, 1, 1), 1),
        _case("empty-batch", (0, 4, 3, 3), 4, residual=True),
        _case("offset", (1, 16, 6, 5), 8, kind="offset"),
    )
    # Input channels of SDXL on a small map to a few output channels.
    sdxl = tuple(_case(f"1x{c}x3x2-to24", (1, c, 3, 2), 24, residual=True) for c in (4, 320, 1280))
    full_size = tuple(case for case in sdxl_cases("conv2d") if case.numel < 2**26)
    tiny = _case("tiny", (1, 2, 3, 2), 2, residual=True)

    def make(self, case, dtype, generator):
        options, c_in = case.options, case.shape[1]
        k, c_out = options["kernel_size"], options["out_channels"]
        params = torch.float32 if options.get("params") == "float32" and dtype != torch.float64 else dtype
        weight = (torch.randn(c_out, c_in, k, k, generator=generator) / (k * k * c_in) ** 0.5).to(params)
        bias = torch.randn(c_out, generator=generator).to(params)
        padding = (k - 1) // 2 if options["padding"] is None else options["padding"]
        p, q = (reference.output_size(size, k, options["stride"], padding) for size in case.shape[2:])
        residual = torch.randn(case.shape[0], c_out, p, q, generator=generator).to(dtype)
        return {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "weight": weight,
            "bias": bias if options.get("bias", True) else None,
            "stride": options["stride"],
            "padding": options["padding"],
            "residual": residual if options.get("residual") else None,
        }

    def rows(self, case):
        (n, c, h, w), taps = case.shape, case.options["kernel_size"] ** 2
        return {
            "y": taps * c,
            "dx": taps * case.options["out_channels"],
            "dweight": n * h * w,
            "dbias": n * h * w,
        }

    def check_layout(self, values, got, layout):
        """y, of another shape than x, keeps the memory format of x all the same."""
        super().check_layout(values, got, layout)
        wanted = torch.contiguous_format if values["x"].is_contiguous() else torch.channels_last
        assert got["y"].is_contiguous(memory_format=wanted)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("k", "stride", "padding"), [(3, 1, None), (3, 2, 0), (3, 1, 0), (1, 1, None), (1, 2, 1)])
def test_integers_come_out_exactly_everywhere(k, stride, padding, layout):
    """Small enough for float32 to hold every sum: any backend, the stock convolution bit for bit."""
    x = torch.randint(-4, 5, (2, 12, 9, 8)).float().contiguous(memory_format=layout)
    weight, bias = torch.randint(-4, 5, (7, 12, k, k)).float(), torch.randint(-4, 5, (7,)).float()
    expected = F.conv2d(x, weight, bias, stride, k // 2 if padding is None else padding)
    residual = torch.randint(-4, 5, expected.shape).float()
    values = {"x": x, "weight": weight, "bias": bias, "stride": stride, "padding": padding, "residual": residual}
    for backend in runnable("conv2d", values):
        with use_backend(backend):
            y = ops.conv2d(**values)
        assert torch.equal(y, expected + residual)


def test_library_is_the_choice_on_a_cpu():
    assert explain("conv2d", torch.zeros(1, 4, 5, 5), torch.zeros(6, 4, 3, 3)).backend == "library"


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_is_obeyed(backend):
    """float32 in, autocast's dtype out, as accurate as the stock layer; gradients come back in float32."""
    require(backend, "conv2d")
    device = device_of(backend)
    x, weight, bias = (torch.randn(s, device=device).requires_grad_() for s in ((1, 16, 8, 8), (8, 16, 3, 3), (8,)))
    with use_backend(backend), torch.autocast(device, torch.bfloat16):
        y, stock = ops.conv2d(x, weight, bias), F.conv2d(x, weight, bias, padding=1)
    assert y.dtype == stock.dtype == torch.bfloat16
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    error, stock_error = ((t.double() - exact).norm() for t in (y, stock))
    assert error < 1.1 * stock_error
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.float().sum(), (x, weight, bias)))


# ---- float8 ----


def _float8(device: str, k: int = 3, padding: int | None = None, stride: int = 1) -> dict[str, Any]:
    x = torch.randn(2, 32, 5, 6, device=device).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(24, 32, k, k, device=device)
    scale_x, scale_w = x.abs().max() / 448, weight.abs().max() / 448
    values = {"x": quantise(x, scale_x), "weight": quantise(weight, scale_w), "stride": stride, "padding": padding}
    shape = reference.output_shape(x, weight, stride, k // 2 if padding is None else padding)
    terms = {"bias": torch.randn(24, device=device), "residual": torch.randn(shape, device=device)}
    values |= {name: term.bfloat16() for name, term in terms.items()}
    return {**values, "scale_x": scale_x, "scale_w": scale_w}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("without", [(), ("bias", "residual")], ids=str)
@pytest.mark.parametrize(("k", "padding", "stride"), [(3, None, 1), (3, 0, 1), (1, None, 1), (3, None, 2)])
def test_float8_is_the_convolution_of_the_dequantised(backend, k, padding, stride, without):
    values = _float8(device_of(backend), k, padding, stride) | dict.fromkeys(without)
    require(backend, "conv2d", values)
    with use_backend(backend), torch.no_grad():
        y = ops.conv2d(**values)
    x, weight = values["x"].double() * values["scale_x"], values["weight"].double() * values["scale_w"]
    bias = None if values["bias"] is None else values["bias"].double()
    exact = F.conv2d(x, weight, bias, stride, k // 2 if padding is None else padding)
    exact = exact + (0 if values["residual"] is None else values["residual"].double())
    assert y.dtype == torch.bfloat16 and y.is_contiguous(memory_format=torch.channels_last)
    assert bool(((y.double() - exact).abs() <= 2**-8 * exact.abs() + 2**-8 * exact.abs().mean()).all())


def test_float8_keeps_either_memory_format_and_takes_a_scale_of_one_dimension():
    values = _float8("cpu")
    y = ops.conv2d(**values)
    values = {name: t.contiguous() if isinstance(t, torch.Tensor) else t for name, t in values.items()}
    again = ops.conv2d(**{**values, "scale_x": values["scale_x"].view(1)})
    assert again.is_contiguous() and torch.equal(again, y)


def test_float8_takes_what_a_norm_writes():
    x, scale = torch.randn(1, 32, 4, 4).bfloat16(), torch.full((1,), 2.0**-5)
    affine = torch.ones(32).bfloat16(), torch.zeros(32).bfloat16()
    found, plain = (ops.group_norm_silu(x, *affine, num_groups=4, scale_y=s) for s in (scale, None))
    values = _float8("cpu") | {"x": found, "scale_x": scale, "residual": None}
    assert torch.equal(ops.conv2d(**values), ops.conv2d(**{**values, "x": quantise(plain, scale)}))


def test_float8_in_library_ops_and_compiled_code():
    values = _float8("cpu") | {"padding": 1}
    raw = torch.ops.sdxl_fast.conv2d_fwd.default
    args = tuple(values[argument.name] for argument in raw._schema.arguments)
    torch.library.opcheck(raw, args, test_utils=("test_faketensor",))  # test_schema multiplies, which float8 cannot
    torch.compiler.reset()
    compiled = torch.compile(lambda: ops.conv2d(**values), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, wanted = compiled(), ops.conv2d(**values)
    assert found.dtype == wanted.dtype and found.stride() == wanted.stride() and torch.equal(found, wanted)


def test_float8_has_no_derivative():
    values = _float8("cpu")
    values["residual"].requires_grad_()
    with pytest.raises(ValueError, match="float8 products have no derivative"):
        ops.conv2d(**values)
    with torch.no_grad():
        ops.conv2d(**values)


def test_the_library_has_no_float8_convolution_and_says_so():
    values = _float8("cpu")
    with use_backend("library"), pytest.raises(ValueError, match="PyTorch's library has no convolution"):
        ops.conv2d(**values)
    assert explain("conv2d", **values).backend == "eager"


# ---- refusals ----

X, WEIGHT, BIAS = torch.zeros(1, 4, 2, 2), torch.zeros(6, 4, 3, 3), torch.zeros(6)
E4M3, ONE = X.to(FLOAT8), torch.ones(())


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0], WEIGHT), {}, r"x must have 4 dimensions \[N, C_in, H, W\]"),
        ((X.long(), WEIGHT), {}, r"x must be float32.*or float8_e4m3fn, got int64"),
        ((X[..., :0], WEIGHT), {}, r"x must have shape .* = \[1, any, any, any\], got \[1, 4, 2, 0\]"),
        ((X, WEIGHT[:, :3]), {}, r"weight must have shape .*k 1 or 3 = \[any, 4, 3, 3\], got \[6, 3, 3, 3\]"),
        ((X, WEIGHT[..., :2, :2]), {}, r"weight must have shape .* = \[any, 4, 3, 3\], got \[6, 4, 2, 2\]"),
        ((X, WEIGHT[0]), {}, r"weight must have shape"),
        ((X, WEIGHT, BIAS[:5]), {}, r"bias must have shape \[C_out\] of weight = \[6\], got \[5\]"),
        ((X, WEIGHT.half()), {}, r"weight must have the dtype of x or be float32"),
        ((X, WEIGHT, BIAS.half()), {}, r"bias must have the dtype of the result or of weight = float32, got float16"),
        ((X, WEIGHT), {"stride": 3}, r"stride must be an int >= 1 and < 3, got 3"),
        ((X, WEIGHT), {"padding": 2}, r"padding must be an int >= 0 and < 2 or None, got 2"),
        ((X, WEIGHT), {"padding": 0}, r"x must be at least as large as the kernel, padding counted"),
        (
            (X, WEIGHT),
            {"residual": X},
            r"residual must have shape \[N, C_out, P, Q\] = \[1, 6, 2, 2\], got \[1, 4, 2, 2\]",
        ),
        ((X, WEIGHT), {"residual": torch.zeros(1, 6, 2, 2).half()}, r"residual must have the dtype of the result"),
        ((X, WEIGHT.to("meta")), {}, r"weight must be on the device of x"),
        ((X, WEIGHT), {"scale_x": ONE}, r"scale_x and scale_w must be given for a float8_e4m3fn x, and only then"),
        ((E4M3, WEIGHT.to(FLOAT8)), {}, r"scale_x and scale_w must be given"),
        ((E4M3, WEIGHT), {"scale_x": ONE, "scale_w": ONE}, r"weight must be float8_e4m3fn beside a float8_e4m3fn x"),
        ((E4M3, WEIGHT.to(FLOAT8), BIAS), {"scale_x": ONE, "scale_w": ONE}, r"bias must have .* = bfloat16"),
        ((E4M3, WEIGHT.to(FLOAT8)), {"scale_x": ONE, "scale_w": BIAS}, r"scale_w must have one element"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.conv2d(*args, **options)
