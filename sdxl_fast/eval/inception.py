# SPDX-License-Identifier: Apache-2.0
"""Inception's pooled features through torch-fidelity: the network that "FID" and the papers' tables mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_fast.errors import ModelError, UnavailableError
from sdxl_fast.eval.features import check_images
from sdxl_fast.eval.patches import PATCH, centre_patch, resized
from sdxl_fast.files import file_sha256

NETWORK = "Inception v3 (torch-fidelity)"
SIDE = 299
RESIZES = {"bicubic": "bicubic, antialiased", "tf1": "bilinear of TensorFlow 1, not antialiased"}


class Inception:
    """The Inception of the original FID, 2048 features.

    Args:
        weights: file of torch-fidelity's weights; None lets it download them.
        resize: how pictures come to its 299 px. "bicubic": antialiased, as clean-fid does (Parmar et al. 2022), which
            SDXL-Lightning §4 cites; rounded to 8 bits after it, because the network takes nothing else, where clean-fid
            keeps the fractions. "tf1": torch-fidelity's own, TensorFlow 1's bilinear without antialiasing.
        device: where it runs.
        batch_size: pictures per pass.

    Raises:
        ValueError: another `resize`.
        UnavailableError: torch-fidelity is missing (extra `eval`) or cannot be imported, or its weights not be fetched.
        ModelError: a file that does not hold its weights.
        OSError: no such file.
    """

    def __init__(
        self,
        weights: str | Path | None = None,
        *,
        resize: str = "bicubic",
        device: torch.device | str = "cpu",
        batch_size: int = 16,
    ) -> None:
        if resize not in RESIZES:
            raise ValueError(f"resize is {resize!r}; allowed: {', '.join(RESIZES)}")
        self.path = None if weights is None else str(weights)
        self.net = _network(self.path).to(device)
        self.resize, self.device, self.batch_size = resize, torch.device(device), batch_size

    def provenance(self) -> dict[str, str | int]:
        """What decides the features' values, for reports."""
        digest = "torch-fidelity's own"
        if self.path is not None:
            digest = file_sha256(self.path)
        return {"network": NETWORK, "weights_sha256": digest, "input_size": SIDE, "resize": RESIZES[self.resize]}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """float [N, 3, H, W] in 0..1 to float32 [N, 2048] on the CPU."""
        check_images(images)
        return torch.cat([self._batch(part) for part in images.split(self.batch_size)])

    def _batch(self, images: Tensor) -> Tensor:
        x = images.to(self.device, torch.float32)
        if self.resize == "bicubic":
            x = resized(x, (SIDE, SIDE))
        features: Tensor = self.net((x.clamp(0.0, 1.0) * 255.0).round().byte())[0]
        return features.float().cpu()

    @property
    def patch_side(self) -> int:
        """FID-Patch's, which is the network's own input."""
        return PATCH

    def patches(self, images: Tensor) -> Tensor:
        """Features of the middle 299 pixels as they are; smaller pictures are resized as whole ones."""
        return self(centre_patch(images))


def _network(path: str | None) -> Any:
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except ModuleNotFoundError as error:
        raise UnavailableError(f"{error.name} is missing; pip install 'sdxl_fast[eval]' brings it") from error
    except (ImportError, RuntimeError, AttributeError) as error:  # what a torchvision of another torch raises
        remedy = f"its torchvision has to be built for torch {torch.__version__}"
        raise UnavailableError(f"torch-fidelity cannot be imported ({error}); {remedy}") from error
    if path is None:
        try:
            return FeatureExtractorInceptionV3("inception", ["2048"])
        except OSError as error:
            raise UnavailableError(f"Inception's weights cannot be fetched ({error}); give inception:FILE") from error
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # refuses a pickle that holds more than tensors
        return FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
    except OSError:
        raise
    except Exception as error:  # unpickling raises anything
        raise ModelError(f"{path}: does not hold the weights of torch-fidelity's Inception ({error})") from error
