"""Convolutions for inference keep their weight in oneDNN's order: the same result, and never a stale weight."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from sdxl_fast.inference.packing import Conv
from sdxl_fast.nn import PreparedConv2d, fuse, restore
from sdxl_fast.ops import _convolution
from sdxl_fast.testing.compare import error_scale

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch is built without oneDNN")

# channels in and out, kernel, stride, size
SHAPES = [(4, 32, 3, 1, 8), (32, 48, 3, 2, 21), (96, 96, 3, 1, 8), (192, 64, 3, 1, 10), (24, 8, 3, 1, 31)]


def _network(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[nn.Sequential, torch.Tensor]:
    ins, outs, kernel, stride, size = shape
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(ins, outs, kernel, stride, kernel // 2)).to(dtype)
    return network, torch.randn(2, ins, size, size).to(dtype).contiguous(memory_format=torch.channels_last)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call that asked got a result."""
    answers: list[bool] = []
    ask = _convolution.KeptWeight.conv2d

    def asked(self, *args):  # type: ignore[no-untyped-def]
        y = ask(self, *args)
        answers.append(y is not None)
        return y

    monkeypatch.setattr(_convolution.KeptWeight, "conv2d", asked)
    return answers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_same_result(shape: tuple[int, ...], dtype: torch.dtype, kept: list[bool]) -> None:
    network, x = _network(shape, dtype)
    with torch.no_grad():
        stock, exact = network(x), network.double()(x.double())
        network.to(dtype)
        report = fuse(network, training=False)
        y = network(x)
    assert report.replaced == {"0": "Conv2d: its weight in oneDNN's order"} and kept == [True]
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    bound = 16 * torch.finfo(dtype).eps  # oneDNN sums up a channels_last map in one go, im2col by blocks
    assert error_scale(y, exact).relative <= max(2 * error_scale(stock, exact).relative, bound)


def test_a_weight_that_is_written_to_counts(kept: list[bool]) -> None:
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


@pytest.mark.parametrize(
    "reason", ["gradients", "layout", "large map", "small map", "large weight", "autocast", "dtype"]
)
def test_stock_runs_where_nothing_is_kept(reason: str, kept: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
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
                monkeypatch.setattr(_convolution, "KEPT_POSITIONS", (1, 100))
            elif reason == "small map":
                monkeypatch.setattr(_convolution, "KEPT_POSITIONS", (200, 2048))
            elif reason == "large weight":
                monkeypatch.setattr(_convolution, "KEPT_BYTES", 1000)
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
