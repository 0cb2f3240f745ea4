"""The names in LoRA files, by the lists that are published: no network of that size is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sdxl_fast.models.config import SDXL, build_unet
from sdxl_fast.models.lora import target_modules
from sdxl_fast.models.lora_file import LoraFile, Pair, lora_tensors, read_lora_file
from sdxl_fast.models.weights import Lazy, plan


def test_kohya_names_and_the_size_of_the_published_files(tmp_path: Path) -> None:
    with torch.device("meta"):
        unet = build_unet(SDXL)
    pairs = {}
    for name in target_modules(unet):
        weight: Any = unet.get_submodule(name).weight
        ones = (1,) * (weight.ndim - 2)
        down = Lazy(torch.float16, (64, *weight.shape[1:]), lambda: pytest.fail("read"))
        pairs[f"unet.{name}"] = Pair(down, Lazy(torch.float16, (weight.shape[0], 64, *ones), down.read), 64.0)
    file = LoraFile(pairs, {})
    tensors = lora_tensors(file, "kohya", torch.float16)
    layout = plan(tensors)
    assert (len(pairs), len(layout.names), layout.size) == (788, 3 * 788, 393_854_592)
    assert file.architecture == "stable-diffusion-xl-v1-base"
    for name, shape in {
        "lora_unet_down_blocks_0_downsamplers_0_conv.lora_down.weight": (64, 320, 3, 3),
        "lora_unet_down_blocks_0_downsamplers_0_conv.lora_up.weight": (320, 64, 1, 1),
        "lora_unet_down_blocks_0_resnets_0_conv1.alpha": (),
        "lora_unet_down_blocks_1_attentions_0_proj_in.lora_down.weight": (64, 640),
        "lora_unet_down_blocks_1_resnets_0_conv_shortcut.lora_up.weight": (640, 64, 1, 1),
        "lora_unet_down_blocks_2_attentions_1_transformer_blocks_9_attn2_to_k.lora_down.weight": (64, 2048),
        "lora_unet_mid_block_attentions_0_transformer_blocks_9_ff_net_0_proj.lora_up.weight": (10240, 64),
        "lora_unet_mid_block_resnets_1_time_emb_proj.lora_down.weight": (64, 1280),
        "lora_unet_up_blocks_0_attentions_2_transformer_blocks_0_attn1_to_out_0.lora_up.weight": (1280, 64),
        "lora_unet_up_blocks_1_upsamplers_0_conv.lora_down.weight": (64, 640, 3, 3),
    }.items():
        assert tensors[name].shape == shape


def test_sdxls_own_names_need_no_model(tmp_path: Path) -> None:
    keys = {
        "lora_unet_input_blocks_8_1_transformer_blocks_3_attn1_to_q": (
            "unet.down_blocks.2.attentions.1.transformer_blocks.3.attn1.to_q"
        ),
        "lora_unet_output_blocks_5_2_conv": "unet.up_blocks.1.upsamplers.0.conv",
        "lora_unet_middle_block_0_out_layers_3": "unet.mid_block.resnets.0.conv2",
        "diffusion_model.output_blocks.0.0.skip_connection": "unet.up_blocks.0.resnets.0.conv_shortcut",
    }
    tensors = {}
    for key in keys:
        tensors |= {f"{key}.lora_down.weight": torch.zeros(2, 3), f"{key}.lora_up.weight": torch.zeros(5, 2)}
    save_file(tensors, tmp_path / "l.safetensors")
    assert set(read_lora_file(tmp_path / "l.safetensors").pairs) == set(keys.values())
