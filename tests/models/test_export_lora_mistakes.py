"""What is no LoRA, or half of one, is refused by name."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_fast.errors import ModelError
from sdxl_fast.models.lora_file import read_lora_file


def test_foreign_keys_are_listed(tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    zeros = torch.zeros(2, 2)
    foreign = [
        "transformer.single_blocks.0.attn.to_q.lora_A.weight",
        "lora_unet_double_blocks_0_img_attn_proj.lora_down.weight",
        "lora_unet_mid_block_resnets_0_conv1.hada_w1_a",
        "lora_unet_mid_block_resnets_0_conv1.dora_scale",
        "lora_te1_text_model_encoder_layers_0_mlp_fc9.lora_up.weight",
    ]
    save_file({key: zeros.clone() for key in foreign}, path)
    with pytest.raises(ModelError) as caught:
        read_lora_file(path)
    assert all(key in str(caught.value) for key in [*foreign, "5 keys match no module"])
    save_file({}, path)
    with pytest.raises(ModelError, match="no LoRA in it"):
        read_lora_file(path)


def test_halves_that_do_not_belong_together(tmp_path: Path) -> None:
    path, stem = tmp_path / "l.safetensors", "unet.mid_block.resnets.0.time_emb_proj"
    save_file({f"{stem}.lora_A.weight": torch.zeros(2, 3)}, path)
    with pytest.raises(ModelError, match="only one half"):
        read_lora_file(path)
    save_file({f"{stem}.lora_A.weight": torch.zeros(2, 3), f"{stem}.lora_B.weight": torch.zeros(3, 4)}, path)
    with pytest.raises(ModelError, match="does not follow on"):
        read_lora_file(path)


def test_pickles_are_refused(tmp_path: Path) -> None:
    disguised, named = tmp_path / "l.safetensors", tmp_path / "l.bin"
    disguised.write_bytes(pickle.dumps({"a": 1}))
    torch.save({}, named)
    for path in (disguised, named):
        with pytest.raises(ModelError, match="pickled"):
            read_lora_file(path)
