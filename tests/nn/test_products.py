"""Products for inference keep their weight in the order they read it in: the same result, and never a stale weight."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.upsampling import Upsample2D
from torch import nn

from sdxl_fast import native
from sdxl_fast.dispatch import use_backend
from sdxl_fast.errors import KernelLaunchError
from sdxl_fast.inference.packing import Conv, UpsampledConv
from sdxl_fast.nn import PreparedConv2d, PreparedLinear, fuse, restore
from sdxl_fast.ops import _kept, _packed
from sdxl_fast.testing.compare import error_scale
from sdxl_fast.testing.fence import fenced

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")

# channels in and out, kernel, stride, size
SHAPES = [(4, 32, 3, 1, 8), (32, 48, 3, 2, 21), (96, 96, 3, 1, 8), (192, 64, 3, 1, 10), (24, 8, 3, 1, 31)]


@pytest.fixture(params=["own", "onednn", "winograd"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernel takes the convolutions: this package's, oneDNN's with the order kept, or Winograd's, of stride 1."""
    if request.param != "onednn" and not _packed.available():
        pytest.skip("no native library")
    monkeypatch.setattr(_kept, "OWN_POSITIONS", dict.fromkeys((1, 3), 0 if request.param == "onednn" else 4096))
    monkeypatch.setattr(_kept, "WINOGRAD_POSITIONS", 1 if request.param == "winograd" else 1 << 30)
    return str(request.param)


def _network(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, torch.Tensor]:
    ins, outs, kernel, stride, size = shape
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(ins, outs, kernel, stride, kernel // 2)).to(dtype)
    return network, torch.randn(2, ins, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that asked got a result."""
    answers: list[bool] = []
    ask = _kept.KeptWeight.conv2d

    def asked(self, *args):  # type: ignore[no-untyped-def]
        y = ask(self, *args)
        answers.append(y is not None)
        return y

    monkeypatch.setattr(_kept.KeptWeight, "conv2d", asked)
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_result(shape: tuple[int, ...], dtype: torch.dtype, kept: list[bool], kernel: str) -> None:
    network, x = _network(shape, dtype)
    with torch.no_grad():
        stock, exact = network(x), network.double()(x.double())
        network.to(dtype)
        report = fuse(network, training=False)
        y = network(x)
    assert report.replaced == {"0": "Conv2d: its weight in the order of the CPU's kernels"} and kept == [True]
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    bound = 16 * torch.finfo(dtype).eps  # the kernels sum up in one go, im2col by blocks
    assert error_scale(y, exact).relative <= max(2 * error_scale(stock, exact).relative, bound)


@pytest.fixture(params=["baseline", "avx2", "avx512"])
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Forces a vector path of the native library."""
    if not _packed.available():
        pytest.skip("no native library")
    if native.load().set_cpu_isa(request.param):
        pytest.skip(f"this CPU or build has no {request.param}")
    yield
    native.load().set_cpu_isa("auto")


# samples, channels in and out, height, width, kernel, stride, padding
RAGGED = [(1, 3, 5, 4, 4, 3, 1, 1), (2, 17, 33, 5, 7, 3, 2, 1), (3, 40, 16, 3, 9, 3, 1, 0), (1, 20, 70, 6, 6, 1, 1, 0)]


@pytest.mark.parametrize("shape", RAGGED)
def test_own_convolution_of_any_size(shape: tuple[int, ...], isa: None) -> None:
    n, ins, outs, h, w, kernel, stride, padding = shape
    torch.manual_seed(1)
    x = torch.randn(n, ins, h, w).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outs, ins, kernel, kernel), torch.randn(outs)
    for b in (bias, None):
        ordered = fenced(_packed.packed(weight))
        y = _packed.conv2d(fenced(x), ordered, b if b is None else fenced(b), outs, kernel, stride, padding)
        exact = F.conv2d(x.double(), weight.double(), None if b is None else b.double(), stride, padding)
        assert y.is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(y.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


# samples, channels in and out, height, width: ragged tiles and vectors, one position, several panels and blocks
WINOGRAD = [
    (1, 5, 3, 4, 4),
    (2, 24, 40, 3, 5),
    (1, 16, 16, 1, 1),
    (3, 130, 70, 7, 9),
    (1, 512, 17, 2, 6),
    (2, 8, 3, 33, 30),
]


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("shape", WINOGRAD)
def test_winograd_of_any_size(shape: tuple[int, ...], upsample: bool, isa: None) -> None:
    """Exact to what a float32 convolution is allowed, with bias and without, of the map and of it doubled."""
    n, ins, outs, h, w = shape
    torch.manual_seed(2)
    x = torch.randn(n, ins, h, w).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(outs, ins, 3, 3), torch.randn(outs)
    seen = F.interpolate(x, scale_factor=2.0) if upsample else x
    ordered = fenced(_packed.winograd(weight, upsample=upsample))
    for b in (bias, None):
        y = _packed.winograd_conv2d(fenced(x), ordered, b if b is None else fenced(b), outs, upsample=upsample)
        exact = F.conv2d(seen.double(), weight.double(), None if b is None else b.double(), padding=1)
        stock = F.conv2d(seen, weight, b, padding=1)
        assert y.shape == exact.shape and y.is_contiguous(memory_format=torch.channels_last)
        bound = 2 * error_scale(stock, exact).relative + 4 * torch.finfo(torch.float32).eps
        assert error_scale(y, exact).relative <= bound


@pytest.mark.parametrize("threads", [1, 3])
def test_own_product_does_not_depend_on_threads_or_batch(threads: int) -> None:
    if not _packed.available():
        pytest.skip("no native library")
    torch.manual_seed(3)
    x = torch.randn(5, 24, 6, 6).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(40, 24, 3, 3)
    ordered, transformed = _packed.packed(weight), _packed.winograd(weight)
    products = (
        lambda part: _packed.conv2d(part, ordered, None, 40, 3, 1, 1),
        lambda part: _packed.winograd_conv2d(part, transformed, None, 40),
    )
    alone = [[product(part) for part in x.split(1)] for product in products]
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        for product, parts in zip(products, alone, strict=True):
            assert torch.equal(product(x), torch.cat(parts))
    finally:
        torch.set_num_threads(before)


def test_a_linear_layer_of_few_rows_takes_the_own_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    network = nn.Sequential(nn.Linear(40, 72))
    stock = copy.deepcopy(network)
    assert fuse(network, training=False).replaced == {"0": "Linear: its weight in the order of the CPU's kernels"}
    assert type(network[0]) is PreparedLinear
    asked: list[int] = []
    run = _packed.linear
    monkeypatch.setattr(_packed, "linear", lambda x, *rest: asked.append(x.shape[-2]) or run(x, *rest))
    with torch.no_grad():
        for rows in (1, 8, 33, 512, 513):
            x = torch.randn(1, rows, 40)
            torch.testing.assert_close(network(x), stock(x), rtol=1e-5, atol=1e-5)
        network[0].weight.zero_()
        assert torch.equal(network(torch.randn(16, 40)), network[0].bias.expand(16, 72))
    assert asked == ([8, 33, 512, 16] if _packed.available() else [])
    x = torch.randn(16, 40, requires_grad=True)
    network(x).sum().backward()
    assert x.grad is not None and not x.grad.any() and len(asked) in (0, 4)
    assert restore(network) == 1 and type(network[0]) is nn.Linear


def test_own_kernel_refuses_what_it_does_not_do() -> None:
    if not _packed.available():
        pytest.skip("no native library")
    x = torch.randn(1, 4, 4, 4)
    with pytest.raises(KernelLaunchError, match=r"packed_conv2d_fwd_cpu\(float32\[1, 4, 4, 4\]"):
        _packed.conv2d(x, _packed.packed(torch.randn(4, 4, 5, 5)), None, 4, 5, 1, 1)


def test_a_weight_that_is_written_to_counts(kept: list[bool], kernel: str) -> None:
    network, x = _network(SHAPES[0])
    fuse(network, training=False)
    with torch.no_grad():
        before = network(x)
        network[0].weight.mul_(2.0)
        torch.testing.assert_close(
            network(x) - network[0].bias[:, None, None], 2 * (before - network[0].bias[:, None, None])
        )
        network.load_state_dict({name: torch.zeros_like(t) for name, t in network.state_dict().items()})
        assert not network(x).any()
        network[0].weight.data = torch.ones_like(network[0].weight)  # another address
        assert network(x).any()
    assert kept == [True] * 4


def test_a_write_through_data_counts_once_fused_again() -> None:
    network, x = _network(SHAPES[0])
    fuse(network, training=False)
    with torch.no_grad():
        network(x)
        network[0].weight.data.zero_()
        network[0].bias.data.zero_()
        fuse(network, training=False)
        assert not network(x).any()


@pytest.mark.parametrize("how", ["copied", "saved"])
def test_a_copy_keeps_a_weight_of_its_own(how: str) -> None:
    network, x = _network(SHAPES[0])
    fuse(network, training=False)
    with torch.no_grad():
        before = network(x)
        if how == "copied":
            twin = copy.deepcopy(network)
        else:
            file = io.BytesIO()
            torch.save(network, file)
            file.seek(0)
            twin = torch.load(file, weights_only=False)
        assert torch.equal(twin(x), before)
        twin[0].weight.zero_()
        assert not torch.equal(twin(x), before)
        assert torch.equal(network(x), before)


def test_packed_convolution_is_refreshed() -> None:
    network, x = _network(SHAPES[0])
    packed = Conv(network[0], "conv")
    with torch.no_grad():
        torch.testing.assert_close(packed(x), network(x))
        network[0].weight.data.zero_()
        packed.refresh()
        torch.testing.assert_close(packed(x), network(x))


@pytest.mark.parametrize("backend", ["winograd", "eager"])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_packed_upsampling_is_refreshed_where_it_is(
    backend: str, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    torch.manual_seed(0)
    module = Upsample2D(16, use_conv=True).requires_grad_(False)
    x = torch.randn(2, 16, 4, 4).contiguous(memory_format=torch.channels_last)
    packed = UpsampledConv(module, "up")
    with mode(), use_backend(backend) if backend == "eager" else nullcontext():
        torch.testing.assert_close(packed(x), module(x))
        summed = packed._phases
        assert (summed is None) == (backend == "winograd")  # what no call needs takes no memory
    module.conv.weight.data.mul_(2.0)
    packed.refresh()
    with mode(), use_backend(backend) if backend == "eager" else nullcontext():
        torch.testing.assert_close(packed(x), module(x))
    assert packed._phases is summed  # a CUDA graph reads it where it was


@pytest.mark.parametrize(
    "reason", ["gradients", "layout", "large map", "small map", "large weight", "autocast", "dtype"]
)
def test_stock_runs_where_nothing_is_kept(reason: str, kept: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    if reason.endswith("map"):
        monkeypatch.setattr(_kept, "OWN_POSITIONS", {})
        monkeypatch.setattr(_kept, "WINOGRAD_POSITIONS", 1 << 30)
    network, x = _network(SHAPES[2])
    wanted = network(x)
    fuse(network, training=False)
    if reason == "gradients":
        y = network(x)
        y.sum().backward()
        assert network[0].weight.grad is not None
    else:
        with torch.no_grad():
            if reason == "layout":
                x = x.contiguous()
            elif reason == "large map":
                monkeypatch.setattr(_kept, "KEPT_POSITIONS", (1, 100))
            elif reason == "small map":
                monkeypatch.setattr(_kept, "KEPT_POSITIONS", (200, 2048))
            elif reason == "large weight":
                monkeypatch.setattr(_kept, "KEPT_BYTES", 1000)
                monkeypatch.setattr(_kept, "WINOGRAD_BYTES", 1000)
            elif reason == "dtype":
                network.double()
                x = x.double()
            with torch.autocast("cpu", enabled=reason == "autocast"):
                y = network(x)
    assert not any(kept)
    tolerance = 2e-2 if reason == "autocast" else 1e-5
    torch.testing.assert_close(y.float(), wanted, rtol=tolerance, atol=tolerance)


def test_only_plain_convolutions_and_only_for_inference() -> None:
    others = [nn.Conv2d(4, 4, 3, groups=2), nn.Conv2d(4, 4, 3, dilation=2), nn.Conv2d(4, 4, 3, padding_mode="reflect")]
    others += [nn.Conv2d(4, 4, 3, padding="same"), nn.Conv2d(4, 4, (3, 1), stride=(2, 1))]
    network = nn.Sequential(nn.Conv2d(4, 4, 3), *others)
    fuse(network, training=False)
    assert [type(part) for part in network] == [PreparedConv2d] + [nn.Conv2d] * len(others)
    fuse(network)
    assert type(network[0]) is nn.Conv2d
    fuse(network, training=False)
    fuse(network, training=False, ops=["geglu"])
    assert type(network[0]) is nn.Conv2d
    fuse(network, training=False)
    assert restore(network) == 1 and type(network[0]) is nn.Conv2d
