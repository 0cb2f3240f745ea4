# SPDX-License-Identifier: Apache-2.0
"""``ops.group_norm_silu``: the shared suite, and what is its own."""

from __future__ import annotations

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.ops.group_norm_silu import _OP
from sdxl_fast.reference import group_norm_silu as reference
from sdxl_fast.reference._common import FLOAT8, quantise
from sdxl_fast.testing.cases import Case, draw, sdxl_cases, shrunk
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import FORMATS, device_of, require


def _case(name, shape, groups, kind="normal", **options):
    return Case(name, shape, {"num_groups": groups, **options}, kind)


class TestGroupNormSilu(ContractSuite):
    op = _OP
    public = staticmethod(ops.group_norm_silu)
    reference = reference
    outputs = ("y",)
    inputs = ("x", "weight", "bias", "shift")
    wrong: tuple[str, ...] = tuple(name for name in reference.WRONG if name != "skip_before_x")
    cases = (
        _case("ragged", (3, 15, 7, 5), 5, shift=True),
        _case("one-element", (1, 1, 1, 1), 1, shift=True),
        _case("one-pixel", (2, 12, 1, 1), 3),
        _case("group-per-channel", (2, 6, 5, 3), 6),
        _case("one-group", (2, 6, 4, 4), 1, shift=True, activation="none"),
        _case("odd-width", (2, 4, 3, 37), 2),
        _case("empty-batch", (0, 8, 4, 4), 4, shift=True),
        _case("empty-map", (2, 8, 0, 4), 4, shift=True),
        _case("no-affine", (2, 8, 4, 4), 4, affine=False),
        _case("float32-parameters", (2, 8, 4, 4), 4, parameters="float32", shift=True),
        _case("small", (2, 8, 6, 6), 4, kind="small"),
        _case("offset", (2, 8, 16, 16), 2, kind="offset"),
        _case("constant", (2, 8, 4, 4), 4, kind="constant"),
        _case("wide", (2, 8, 6, 6), 4, kind="wide"),
        _case("batch", (5, 16, 3, 3), 8, shift=True),
    )
    sdxl = shrunk(sdxl_cases("group_norm_silu"), longest=4)
    full_size = sdxl_cases("group_norm_silu")
    tiny = _case("tiny", (2, 4, 2, 3), 2, shift=True)

    def make(self, case, dtype, generator):
        n, channels = case.shape[:2]
        options = case.options
        parameters = torch.float32 if "parameters" in options and dtype != torch.float64 else dtype
        weight, bias = torch.randn(2, channels, generator=generator)
        values = {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "weight": (1 + 0.5 * weight).to(parameters),
            "bias": (0.5 * bias).to(parameters),
            "shift": torch.randn(n, channels, generator=generator).to(dtype) if options.get("shift") else None,
            "num_groups": options["num_groups"],
            "eps": options.get("eps", 1e-5),
            "activation": options.get("activation", "silu"),
        }
        if not options.get("affine", True):
            values["weight"] = values["bias"] = None
        return values

    def rows(self, case):
        n, _, h, w = case.shape
        return {"dweight": n * h * w, "dbias": n * h * w, "dshift": h * w}


def _skip_case(name, shape, groups, skip, **options):
    """Of the shape's channels, ``skip`` come from a tensor of their own."""
    return _case(name, shape, groups, skip=skip, **options)


class TestSkip(TestGroupNormSilu):
    """Of two tensors: without gradients they are read where they lie, with them they are concatenated."""

    inputs = (*TestGroupNormSilu.inputs, "skip")
    wrong = ("skip_before_x",)
    cases = (
        _skip_case("straddled-group", (2, 96, 5, 4), 4, 32, shift=True),
        _skip_case("wider-skip", (1, 96, 3, 7), 3, 64, activation="none"),
        _skip_case("float32-parameters", (3, 96, 2, 5), 6, 32, parameters="float32", shift=True),
        _skip_case("no-affine", (1, 96, 4, 4), 8, 32, affine=False),
        _skip_case("offset", (2, 96, 5, 5), 2, 32, kind="offset"),
        _skip_case("odd-channels", (2, 15, 7, 5), 5, 4, shift=True),
        _skip_case("empty-batch", (0, 96, 4, 4), 4, 32, shift=True),
        _skip_case("empty-map", (2, 96, 0, 4), 4, 32),
        _skip_case("chunks", (1, 320, 32, 32), 32, 128, shift=True),
    )
    sdxl = full_size = ()
    tiny = _skip_case("tiny", (2, 4, 2, 3), 2, 1, shift=True)

    def make(self, case, dtype, generator):
        values = super().make(case, dtype, generator)
        skip = case.options["skip"]
        split = [case.shape[1] - skip, skip]
        x, second = (part.contiguous(memory_format=torch.channels_last) for part in values["x"].split(split, 1))
        return {**values, "x": x, "skip": second}

    def check_layout(self, values, got, layout):
        wanted = torch.contiguous_format if layout in ("contiguous", "strided") else torch.channels_last
        assert got["y"].numel() == 0 or got["y"].is_contiguous(memory_format=wanted)

    def test_wrong_variant_is_rejected(self, variant):
        """The outputs alone: with a skip there is no backward."""
        case = self.cases[0]
        values = self.expected(case, torch.float32).values
        bound = self.op.info.bind(**values)
        args = self.op.prepare(tuple(bound[p] for p in self.op.parameters))
        assert args[-1] is not None
        for function, right in ((reference.WRONG[variant].function, False), (reference.fwd, True)):
            found = function(*args)[0]
            (outcome,) = (c for c in self.compare(case, torch.float32, {"y": found}) if c.tensor == "y")
            assert outcome.passed == right


# Widths of SDXL's skip connections with a sixteenth of the channels; one vector of each; vectors of both formats.
@pytest.mark.parametrize("channels", [(80, 80), (80, 48), (48, 32), (16, 16), (64, 16), (16, 112), (17, 15), (8, 16)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda", "eager"])
def test_skip_is_a_concatenation_without_a_copy(backend, dtype, channels):
    """Also of maps in other layouts, and in float8."""
    device = device_of(backend)
    generator = torch.Generator().manual_seed(0)
    both = torch.randn(2, sum(channels), 3, 5, generator=generator).to(device, dtype)
    weight, bias = torch.randn(2, sum(channels), generator=generator).to(device, dtype)
    shift = torch.randn(2, sum(channels), generator=generator).to(device, dtype)
    given = {"num_groups": 2, "shift": shift, "eps": 1e-6}
    require(backend, "group_norm_silu", {"x": both, "weight": weight, "bias": bias, **given})
    with torch.no_grad(), use_backend(backend):
        pairs = (("channels_last",) * 2, ("channels_last", "contiguous"), ("strided", "nhwc_slice"))
        for formats in pairs[:1] if backend == "triton" else pairs:  # interpreted, it is slow
            x, skip = (FORMATS[f](t) for f, t in zip(formats, both.split(channels, 1), strict=True))
            expected = ops.group_norm_silu(torch.cat((x, skip), 1), weight, bias, **given)
            got = ops.group_norm_silu(x, weight, bias, skip=skip, **given)
            torch.testing.assert_close(got, expected)
            scale = torch.tensor([2.0**-5], device=device)
            if backend == "cuda" and dtype != torch.bfloat16:
                continue
            rounded = ops.group_norm_silu(x, weight, bias, skip=skip, scale_y=scale, **given)
            assert rounded.dtype == FLOAT8
            assert torch.equal(rounded.view(torch.uint8), quantise(got, scale).view(torch.uint8))


def test_skip_of_vectors_reaches_the_kernel():
    x, skip, odd = (torch.zeros(1, c, 2, 2).contiguous(memory_format=torch.channels_last) for c in (16, 32, 8))

    def reaches(x, skip):
        return _OP.prepare((x, None, None, None, 4, 1e-5, "silu", None, skip))[-1] is not None

    assert reaches(x, skip) and reaches(x, skip.contiguous())
    assert not reaches(x, odd) and not reaches(odd, x) and not reaches(x.contiguous(), skip)
    leaf = skip.clone().requires_grad_()
    assert not reaches(x, leaf)
    with torch.no_grad():
        assert reaches(x, leaf)


def _arguments(**changes):
    good = {
        "x": torch.zeros(2, 8, 4, 4),
        "weight": torch.ones(8),
        "bias": torch.zeros(8),
        "num_groups": 4,
        "shift": torch.zeros(2, 8),
    }
    return {**good, **changes}


_BARE = {"weight": None, "bias": None, "shift": None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(2, 8, 4)}, r"x must have 4 dimensions \[N,C,H,W\], got shape \[2, 8, 4\]"),
        ({"x": torch.zeros(2, 8, 4, 4, dtype=torch.int64)}, r"x must be float32.*got int64"),
        ({"num_groups": 3}, r"num_groups must be positive and divide.*num_groups=3 for 8 channels"),
        ({"num_groups": 0}, r"num_groups must be positive"),
        ({"num_groups": -4}, r"num_groups must be positive"),
        ({"num_groups": 4.0}, r"num_groups must be an int, got 4\.0"),
        ({"num_groups": True}, r"num_groups must be an int, got True"),
        ({"bias": None}, r"weight and bias must both be given or both be None, got None only for bias"),
        ({"weight": torch.ones(7)}, r"weight must have shape \[C\] of x .and skip. = \[8\], got \[7\]"),
        ({"weight": torch.ones(8).half(), "bias": torch.zeros(8).half()}, r"weight must have the dtype of x.*float16"),
        ({"bias": torch.zeros(8).bfloat16()}, r"bias must have the dtype of x"),
        ({"shift": torch.zeros(8)}, r"shift must have shape \[N,C\] of x .and skip. = \[2, 8\], got \[8\]"),
        ({"shift": torch.zeros(2, 8).double()}, r"shift must have the dtype of x.*shift\.to\(x\.dtype\)"),
        ({"shift": 1.0}, r"shift must be a tensor or None, got float"),
        ({"skip": torch.zeros(2, 8, 4, 3)}, r"skip must have shape \[N,C2,H,W\] beside x = \[2, any, 4, 4\], got"),
        ({"skip": torch.zeros(2, 8, 16)}, r"skip must have shape \[N,C2,H,W\] beside x"),
        ({"skip": torch.zeros(2, 8, 4, 4).half(), **_BARE}, r"skip must have the dtype of x.*skip\.to\(x\.dtype\)"),
        ({"skip": torch.zeros(2, 8, 4, 4)}, r"weight must have shape \[C\] of x .and skip. = \[16\], got \[8\]"),
        ({"skip": torch.zeros(2, 9, 4, 4)}, r"num_groups must be positive and divide.*num_groups=4 for 17 channels"),
        ({"eps": -1e-5}, r"eps must be a finite number >= 0, got -1e-05"),
        ({"eps": float("nan")}, r"eps must be a finite number >= 0"),
        ({"activation": "gelu"}, r"activation must be 'none' or 'silu', got 'gelu'"),
        ({"weight": torch.ones(8, device="meta")}, r"weight must be on the device of x.*meta.*cpu"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.group_norm_silu(**_arguments(**changes))


def test_float32_parameters_with_float64_are_refused():
    with pytest.raises(ValueError, match="weight must have the dtype of x"):
        ops.group_norm_silu(**_arguments(x=torch.zeros(2, 8, 4, 4).double(), shift=None))


def test_equals_torch_modules():
    """In float64 the op is nn.GroupNorm, an addition and nn.SiLU."""
    x, shift = torch.randn(2, 8, 4, 4).double(), torch.randn(2, 8).double()
    norm = torch.nn.GroupNorm(4, 8, eps=1e-6).double()
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    expected = torch.nn.functional.silu(norm(x + shift[:, :, None, None]))
    got = ops.group_norm_silu(x, norm.weight, norm.bias, num_groups=4, eps=1e-6, shift=shift)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("backend", ["cpu", "triton", "eager"])
def test_autocast_keeps_dtype(backend):
    """Under autocast a bfloat16 map meets float32 parameters, and their gradients are float32."""
    require(backend, "group_norm_silu")
    device = device_of(backend)
    weight, bias = torch.ones(8, device=device, requires_grad=True), torch.zeros(8, device=device, requires_grad=True)
    x = torch.randn(2, 8, 4, 4, device=device).bfloat16()
    with torch.autocast(device, torch.bfloat16), use_backend(backend):
        y = ops.group_norm_silu(x, weight, bias, num_groups=4)
        plain = ops.group_norm_silu(x, weight.detach(), bias.detach(), num_groups=4)
    y.sum().backward()
    assert y.dtype == torch.bfloat16 and torch.equal(y, plain)
    assert weight.grad.dtype == bias.grad.dtype == torch.float32
