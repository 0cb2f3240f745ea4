# SPDX-License-Identifier: Apache-2.0
"""``ops.to_uint8``: every backend gives the very same bytes, and they are those of diffusers' image processor."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import BACKENDS, explain
from sdxl_fast.reference import to_uint8 as reference
from sdxl_fast.testing.op_suite import DTYPES, FORMATS, device_of, require

# SDXL's three channels in whole vectors and ragged, other numbers of channels, one element, nothing.
SHAPES = [
    (2, 3, 16, 32), (1, 3, 5, 7), (3, 3, 1, 1), (2, 4, 6, 6), (2, 1, 9, 5), (1, 5, 4, 11), (1, 1, 1, 1), (1, 3, 40, 48),
    (0, 3, 4, 4), (2, 3, 0, 4), (2, 0, 3, 3),
]  # fmt: skip


def _pictures(shape, dtype):
    """Values within and beyond -1..1, ties between bytes, and what is no number."""
    x = 1.3 * torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    flat = x.flatten()
    ties = (2 * torch.arange(0, 255) + 1) / 255 - 1
    special = torch.tensor([0.0, -0.0, 1.0, -1.0, torch.inf, -torch.inf, torch.nan, 1e-30, 3e38, -3e38])
    for values in (special, ties):
        count = min(len(values), max(0, flat.numel() - 16))
        flat[flat.numel() - count : flat.numel()] = values[:count].double()
        flat = flat[: flat.numel() - count]
    return x.to(dtype)


def _run(backend, x):
    require(backend, "to_uint8", {"x": x})
    with use_backend(backend):
        return ops.to_uint8(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_all_backends_give_the_same_bytes(shape, dtype, backend):
    require(backend, "to_uint8")
    if dtype == "fp64" and backend in ("cuda", "triton"):
        pytest.skip("float64 is refused")
    x = _pictures(shape, DTYPES[dtype])
    expected = reference.fwd(x)
    n, c, h, w = shape
    assert expected.shape == (n, h, w, c)
    for name in FORMATS:
        placed = FORMATS[name](x.to(device_of(backend)))
        before = placed.clone()
        got = _run(backend, placed)
        assert got.dtype == torch.uint8 and got.is_contiguous()
        assert torch.equal(got.cpu(), expected), name
        assert torch.equal(placed.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_is_diffusers_bit_for_bit(backend):
    """A sweep of floats around every tie, through the stock processor up to the bytes of the image."""
    require(backend, "to_uint8")
    processor = pytest.importorskip("diffusers.image_processor").VaeImageProcessor()
    ties = ((2 * torch.arange(0, 256, dtype=torch.float64) + 1) / 255 - 1).float()
    near = (ties.view(torch.int32)[:, None] + torch.arange(-24, 24, dtype=torch.int32)).view(torch.float32)
    sweep = torch.cat((near.flatten(), torch.linspace(-1.5, 1.5, 3 * 64 * 256 - near.numel())))
    x = sweep.view(1, 3, 64, 256)
    stock = processor.postprocess(x, output_type="pil")[0]
    got = _run(backend, x.to(device_of(backend)))[0].cpu()
    assert np.array_equal(got.numpy(), np.asarray(stock))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_16_bit_value(dtype, backend):
    """All 65,536 of them, NaN included, as the reference has them."""
    require(backend, "to_uint8")
    x = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype).view(1, 4, 128, 128)
    assert torch.equal(_run(backend, x.to(device_of(backend))).cpu(), reference.fwd(x))


def test_bytes_of_known_values():
    x = torch.tensor([-1.0, 1.0, 0.0, -7.0, 7.0, float("nan")]).view(1, 1, 1, 6)
    assert ops.to_uint8(x).flatten().tolist() == [0, 255, 128, 0, 255, 0]  # 127.5 is a tie and goes to even


@pytest.mark.parametrize("variant", reference.WRONG)
def test_wrong_variant_is_rejected(variant):
    wrong = reference.WRONG[variant].function
    cases = [_pictures(shape, DTYPES[d]) for shape, d in itertools.product(SHAPES[:2], ("fp32", "bf16"))]
    assert any(not torch.equal(wrong(x), reference.fwd(x)) for x in cases)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_whole(dynamic, backend):
    require(backend, "to_uint8")
    torch.compiler.reset()
    x = _pictures((2, 3, 4, 5), torch.float32).to(device_of(backend))
    compiled = torch.compile(ops.to_uint8, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with use_backend(backend):
        assert torch.equal(compiled(x), ops.to_uint8(x))
        torch.library.opcheck(torch.ops.sdxl_fast.to_uint8_fwd.default, (x,))


def test_tracing_gives_shape_dtype_and_strides():
    x = torch.randn(2, 3, 4, 5)
    real = ops.to_uint8(x)
    with FakeTensorMode() as mode:
        fake = ops.to_uint8(mode.from_tensor(x))
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())
    assert ops.to_uint8(x.to("meta")).shape == real.shape


def test_gradients_stop_here():
    x = torch.randn(1, 3, 2, 2, requires_grad=True)
    assert not ops.to_uint8(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(ops.to_uint8(x.detach()), reference.fwd(x))


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_refuses_float64(backend):
    require(backend, "to_uint8")
    with use_backend(backend), pytest.raises(ValueError, match=f"{backend}.*must be .*got float64"):
        ops.to_uint8(torch.zeros(1, 3, 2, 2, dtype=torch.float64, device=device_of(backend)))


def test_the_backend_is_chosen_and_named():
    assert explain(ops.to_uint8, torch.zeros(1, 3, 2, 2)).backend in ("cpu", "eager")


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 2, 2), r"x must have 4 dimensions \[N,C,H,W\], got shape \[3, 2, 2\]"),
        (torch.zeros(1, 3, 2, 2).byte(), r"x must be float32.*got uint8"),
        ([0.0], r"x must be a tensor, got list"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(x, message):
    with pytest.raises(ValueError, match=message):
        ops.to_uint8(x)
