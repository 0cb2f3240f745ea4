# SPDX-License-Identifier: Apache-2.0
"""Inception through torch-fidelity, which a stub stands for: its weights are a download."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from sdxl_fast.cli_eval import feature_network
from sdxl_fast.errors import ModelError, UnavailableError
from sdxl_fast.eval.features import PatchExtractor
from sdxl_fast.eval.inception import NETWORK, Inception
from sdxl_fast.files import file_sha256

MODULE = "torch_fidelity.feature_extractor_inceptionv3"


class Stub(nn.Module):
    """torch-fidelity's signature and its demands; keeps what it is shown, the channel means are its features."""

    def __init__(self, name: str, features_list: list[str], feature_extractor_weights_path: str | None = None) -> None:
        super().__init__()
        assert features_list == ["2048"]
        self.register_buffer("weight", torch.zeros(1))
        self.seen: list[Tensor] = []
        if feature_extractor_weights_path is None:
            raise OSError("<urlopen error>")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))

    def forward(self, x: Tensor) -> tuple[Tensor]:
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        self.seen.append(x)
        return (x.float().mean((2, 3)).repeat(1, 683)[:, :2048],)


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    module = ModuleType(MODULE)
    module.FeatureExtractorInceptionV3 = Stub  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torch_fidelity", ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, MODULE, module)
    torch.save({"weight": torch.ones(1)}, tmp_path / "inception.pth")
    yield tmp_path / "inception.pth"


def _images(*size: int) -> Tensor:
    return torch.rand(5, 3, *size, generator=torch.Generator().manual_seed(0))


def test_pictures_come_as_bytes_in_batches(weights: Path) -> None:
    extract: PatchExtractor = feature_network(f"inception:{weights}", "cpu")
    assert isinstance(extract, Inception)
    extract.batch_size = 2
    images = _images(299, 299)
    features = extract(images)
    assert features.shape == (5, 2048) and features.dtype == torch.float32
    assert [len(part) for part in extract.net.seen] == [2, 2, 1]
    assert torch.equal(torch.cat(extract.net.seen), (images * 255).round().byte())
    assert extract.provenance()["network"] == NETWORK
    assert extract.provenance()["weights_sha256"] == file_sha256(weights)


def test_whole_pictures_are_resized_as_by_clean_fid(weights: Path) -> None:
    """Channel by channel by Pillow in floating point, clipped; or left to torch-fidelity, or refused."""
    images = (_images(500, 400) * 255).round() / 255
    extract = Inception(weights)
    extract(images)
    for image, seen in zip(images, extract.net.seen[0], strict=True):
        for channel, found in zip(image, seen, strict=True):
            picture = Image.fromarray((channel * 255).round().numpy()).resize((299, 299), Image.Resampling.BICUBIC)
            assert abs(np.asarray(picture).clip(0, 255) - found.numpy()).max() < 0.51  # rounded, and float32's error
    extract = Inception(weights, resize="tf1")
    extract(images)
    assert torch.equal(extract.net.seen[0], (images * 255).round().byte())
    assert "bilinear" in str(extract.provenance()["resize"])
    with pytest.raises(ValueError, match="allowed: bicubic, tf1"):
        Inception(weights, resize="lanczos")
    with pytest.raises(ValueError, match="--resize is 'tf1'"):
        feature_network("efficientnet-lite0", "cpu", resize="tf1")


def test_patches_are_the_middle_299_pixels(weights: Path) -> None:
    extract = Inception(weights)
    images = _images(320, 301)
    assert extract.patch_side == 299
    extract.patches(images)
    assert torch.equal(extract.net.seen[0], (images[..., 10:309, 1:300] * 255).round().byte())


def test_what_is_wrong_with_the_package_or_its_weights_is_said(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UnavailableError, match="inception:FILE"):
        Inception()
    with pytest.raises(OSError, match=r"none\.pth"):
        Inception(tmp_path / "none.pth")
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    (tmp_path / "text.pth").write_text("no weights")
    for name in ("other.pth", "text.pth"):
        with pytest.raises(ModelError, match=name):
            Inception(tmp_path / name)
    monkeypatch.delitem(sys.modules, "torch_fidelity")
    monkeypatch.delitem(sys.modules, MODULE)
    package = tmp_path / "broken" / "torch_fidelity"
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(package.parent)
    for line, message in (
        ("raise RuntimeError('operator torchvision::nms does not exist')", "torchvision has to be built for torch"),
        ("import torchvision_is_missing", "torchvision_is_missing is missing; pip install"),
    ):
        (package / "__init__.py").write_text(line + "\n")
        with pytest.raises(UnavailableError, match=message):
            Inception(weights)
