# SPDX-License-Identifier: Apache-2.0
"""Inception's pooled features through torch-fidelity: the network that "FID" and the papers' tables mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_fast.errors import UnavailableError
from sdxl_fast.eval.features import check_images
from sdxl_fast.eval.patches import PATCH, centre_patch
from sdxl_fast.files import file_sha256

NETWORK = "Inception v3 (torch-fidelity)"


class Inception:
    """The Inception of the original FID, 2048 features; pictures are rounded to 8 bits and resized to 299 px inside.

    Args:
        weights: file of torch-fidelity's weights; None lets it download them.
        device: where it runs.
        batch_size: pictures per pass.

    Raises:
        UnavailableError: torch-fidelity is missing (extra `eval`).
    """

    def __init__(
        self, weights: str | Path | None = None, *, device: torch.device | str = "cpu", batch_size: int = 16
    ) -> None:
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except ModuleNotFoundError as error:
            raise UnavailableError(f"{error.name} is missing; pip install 'sdxl_fast[eval]' brings it") from error
        path = None if weights is None else str(weights)
        if path is not None:
            torch.load(path, map_location="cpu", weights_only=True)  # refuses a pickle that holds more than tensors
        net: Any = FeatureExtractorInceptionV3("inception", ["2048"], feature_extractor_weights_path=path)
        self.net = net.to(device)
        self.path, self.device, self.batch_size = path, torch.device(device), batch_size

    def provenance(self) -> dict[str, str | int]:
        """What decides the features' values, for reports."""
        digest = "torch-fidelity's own"
        if self.path is not None:
            digest = file_sha256(self.path)
        return {"network": NETWORK, "weights_sha256": digest, "input_size": 299}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """float [N, 3, H, W] in 0..1 to float32 [N, 2048] on the CPU."""
        check_images(images)
        pixels = (images * 255.0).round().byte()
        return torch.cat([self.net(part.to(self.device))[0].float().cpu() for part in pixels.split(self.batch_size)])

    @property
    def patch_side(self) -> int:
        """FID-Patch's, which is the network's own input."""
        return PATCH

    def patches(self, images: Tensor) -> Tensor:
        """Features of the middle 299 pixels as they are; smaller pictures are resized as whole ones."""
        return self(centre_patch(images))
