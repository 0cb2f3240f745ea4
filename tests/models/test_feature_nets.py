"""Feature networks: shapes, gradients, and the preprocessing that their weights expect."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from sdxl_fast.models.feature_nets import (
    Dinov2,
    EfficientNetLite0,
    FeatureNetwork,
    area,
    bicubic,
    feature_network,
    resampled,
)


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DINOv2 of eight thin layers with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dinov2")
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 8, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(folder)
    return folder


def test_dinov2_taps_five_layers_and_adds_the_class_token(dinov2: Path) -> None:
    network = Dinov2(str(dinov2), size=28)
    assert network.taps == [0, 2, 4, 6, 8] and network.widths == (16,) * 5 and network.embedding == 16
    pictures = torch.rand(2, 3, 40, 40) * 2 - 1
    features = network.features(pictures)
    assert [tuple(t.shape) for t in features.tokens] == [(2, 16, 4)] * 5
    assert features.embedding.shape == (2, 16)
    resized = torch.nn.functional.interpolate(pictures, (28, 28), mode="bicubic", antialias=True)
    states = network.net((resized / 2 + 0.5 - network.mean) / network.std, output_hidden_states=True).hidden_states
    torch.testing.assert_close(features.tokens[2], (states[4][:, 1:] + states[4][:, :1]).transpose(1, 2))
    with pytest.raises(ValueError, match="multiples of the patch, 14"):
        Dinov2(str(dinov2), size=30)


def test_the_size_that_dinov2_sees_is_asked_for(dinov2: Path) -> None:
    for size, tokens in ((None, 16 * 16), (42, 3 * 3)):
        seen = feature_network(str(dinov2), size).features(torch.rand(1, 3, 40, 40)).tokens
        assert [layer.shape[2] for layer in seen] == [tokens] * 5


@pytest.mark.parametrize("name", ["efficientnet-lite0", "dinov2"])
def test_features_are_frozen_and_pass_gradients_to_the_pictures(name: str, dinov2: Path) -> None:
    if name != "dinov2":
        pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    network = feature_network(str(dinov2) if name == "dinov2" else name)
    assert isinstance(network, FeatureNetwork)
    network.train()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    pictures = (torch.rand(1, 3, 64, 64) * 2 - 1).requires_grad_()
    features = network.features(pictures)
    assert [t.shape[1] for t in features.tokens] == list(network.widths)
    assert features.embedding.shape == (1, network.embedding)
    features.tokens[-1].sum().backward()
    assert pictures.grad is not None and pictures.grad.abs().max() > 0


def test_efficientnet_reads_pictures_as_its_weights_were_trained() -> None:
    """(v - 127) / 128 for bytes v; the first layer sees exactly that."""
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    network = EfficientNetLite0()
    seen: list[torch.Tensor] = []
    network.net._conv_stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    values = torch.arange(256, dtype=torch.float32)
    picture = values.repeat(16).reshape(1, 1, 64, 64).expand(1, 3, 64, 64)
    network(picture / 127.5 - 1.0)
    torch.testing.assert_close(seen[0], (picture - 127.0) / 128.0)


def _steps_back(of: torch.Tensor) -> set[str]:
    """The names of the functions that its gradient passes."""
    found, left = set(), [of.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in found:
            found.add(node)
            left += [further for further, _ in node.next_functions]
    return {type(node).__name__ for node in found}


@pytest.mark.parametrize("sides", [((37, 50), (28, 28)), ((16, 16), (28, 42)), ((28, 28), (28, 28))])
@pytest.mark.parametrize("kind", [bicubic, area])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_resampling_by_matrices_is_torchs_own(sides: Any, kind: Any, dtype: torch.dtype) -> None:
    """But for the backward, which torch refuses where algorithms are to be deterministic on a GPU."""
    torch.manual_seed(0)
    (before, after), results = sides, []
    values, weights = torch.randn(2, 3, *before, dtype=dtype), torch.randn(2, 3, *after, dtype=dtype)
    for mine in (True, False):
        x = values.clone().requires_grad_()
        if mine:
            y = resampled(x, after, kind)
            assert not any("Upsample" in name or "Pool" in name for name in _steps_back(y))
        elif kind is area:
            y = F.adaptive_avg_pool2d(x, after)
        else:
            y = F.interpolate(x, after, mode="bicubic", antialias=True, align_corners=False)
        y.backward(weights)
        results.append((y.detach(), x.grad))
    for a, b in zip(*results, strict=True):
        # torch makes its weights in float32 there, these are rounded to it: 17 eps apart were measured
        torch.testing.assert_close(a, b, rtol=0, atol=64 * torch.finfo(dtype).eps * b.abs().max().item())


def test_resampling_keeps_its_precision_under_autocast() -> None:
    x = torch.randn(1, 3, 40, 40, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        y = resampled(x, (28, 28), bicubic)
    assert y.dtype == torch.bfloat16 and torch.equal(y, resampled(x.float(), (28, 28), bicubic).bfloat16())


def test_no_step_back_through_dinov2_depends_on_timing(dinov2: Path) -> None:
    pictures = torch.randn(1, 3, 40, 40, requires_grad=True)
    features = Dinov2(str(dinov2), size=28).features(pictures)
    names = _steps_back(torch.cat([tokens.flatten() for tokens in features.tokens]))
    assert not any("Upsample" in name or "Pool" in name for name in names)
