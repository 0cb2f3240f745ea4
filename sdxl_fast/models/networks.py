"""The four networks of a pipeline from their configurations: what parameters they have, and filled with weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch

from ..errors import ModelError
from .config import SDXL
from .weights import Lazy, converted, listing

NETWORKS = ("text_encoder", "text_encoder_2", "unet", "vae")

CONV_IN = "conv_in.weight"
_DEEPEST = "mid_block.attentions.0.transformer_blocks.9.attn2.to_k.weight"


class _ClipTokens:
    """As much of OpenAI's CLIP tokenizer as the text encoders' configurations need."""

    bos_token_id, eos_token_id, pad_token_id = 49406, 49407, 49407

    def __len__(self) -> int:
        return 49408


@cache
def sdxl_configs() -> dict[str, dict[str, Any]]:
    """Configurations of SDXL base 1.0's networks, enough to know every parameter's name and shape."""
    return {
        "unet": SDXL.unet_arguments(),
        "vae": SDXL.vae_arguments(),
        "text_encoder": SDXL.text_arguments(1, _ClipTokens()),
        "text_encoder_2": SDXL.text_arguments(2, _ClipTokens()),
    }


def skeleton(component: str, config: Mapping[str, Any]) -> Any:
    """The network on the meta device: structure without values."""
    with torch.device("meta"):
        if component == "unet":
            from diffusers import UNet2DConditionModel

            return UNet2DConditionModel.from_config(dict(config))
        if component == "vae":
            from diffusers import AutoencoderKL

            return AutoencoderKL.from_config(dict(config))
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

        loader = CLIPTextModelWithProjection if component == "text_encoder_2" else CLIPTextModel
        return loader(CLIPTextConfig(**config))


def parameter_shapes(component: str, config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name to shape of everything the network keeps in its file."""
    return {name: tuple(tensor.shape) for name, tensor in skeleton(component, config).state_dict().items()}


def check_shapes(tensors: Mapping[str, Lazy], shapes: Mapping[str, tuple[int, ...]], *, source: str) -> None:
    """Raises ModelError, listing names, unless the tensors are those of a network: all of them, of its shapes."""
    missing, extra = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or extra:
        texts = [
            f"{len(names)} {what}: {listing(names)}"
            for names, what in ((missing, "missing"), (extra, "too many"))
            if names
        ]
        raise ModelError(f"{source}: weights do not fit the configuration: {'; '.join(texts)}")
    other = [
        f"{name} {tensors[name].shape} for {shape}" for name, shape in shapes.items() if tensors[name].shape != shape
    ]
    if other:
        raise ModelError(
            f"{source}: {len(other)} tensors have another shape than the configuration's: {listing(other)}"
        )


def filled(
    component: str, config: Mapping[str, Any], tensors: Mapping[str, Lazy], dtype: torch.dtype, *, source: str
) -> Any:
    """The network in eval mode with these weights, which are checked against it."""
    network = skeleton(component, config)
    check_shapes(tensors, {name: tuple(t.shape) for name, t in network.state_dict().items()}, source=source)
    # cloned: what safetensors gives out may lie in the mapped file, which another export is free to replace
    values = {
        name: tensor.read().clone(memory_format=torch.contiguous_format)
        for name, tensor in converted(tensors, dtype).items()
    }
    network.load_state_dict(values, assign=True)
    for module in network.modules():
        positions = getattr(module, "position_ids", None)
        if isinstance(positions, torch.Tensor) and positions.is_meta:  # not in the file: transformers makes it anew
            module.position_ids = torch.arange(positions.shape[-1]).expand(positions.shape)
    return network.eval()


def is_sdxl(unet: Mapping[str, Lazy]) -> bool:
    """Whether a UNet's tensors, by diffusers' names, have the published model's depth and widths."""
    deepest, first = unet.get(_DEEPEST), unet.get(CONV_IN)
    return deepest is not None and deepest.shape == (1280, 2048) and first is not None and first.shape[:2] == (320, 4)
