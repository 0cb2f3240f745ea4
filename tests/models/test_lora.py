"""LoRA files: every dialect merges to the same weights, and what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sdxl_fast.errors import ModelError
from sdxl_fast.models.config import SDXL, TOY, build_unet
from sdxl_fast.models.lora import find_loras, lora_file_name, merge_lora, read_lora, target_modules, write_lora
from sdxl_fast.testing.toy import random_lora


@pytest.fixture(scope="module")
def unet() -> Any:
    torch.manual_seed(0)
    return build_unet(TOY)


@pytest.fixture(scope="module")
def pairs(unet: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    return random_lora(unet, rank=3)


def _merged(unet: Any, path: Path) -> dict[str, torch.Tensor]:
    merged = copy.deepcopy(unet)
    merge_lora(merged, read_lora(path, merged))
    return merged.state_dict()


def _write(path: Path, pairs: dict[str, Any], alpha: float = 3.0) -> Path:
    write_lora(path, pairs, alpha=alpha, num_inference_steps=4, prediction_type="epsilon")
    return path


def test_targets_are_those_of_the_released_lightning_loras() -> None:
    with torch.device("meta"):
        assert len(target_modules(build_unet(SDXL))) == 788


def test_merging_adds_up_times_down(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    merged = _merged(unet, _write(tmp_path / "l.safetensors", pairs, alpha=6.0))
    before = unet.state_dict()
    changed = {name for name in before if not torch.equal(before[name], merged[name])}
    assert changed == {f"{name}.weight" for name in pairs}
    name = "mid_block.resnets.0.conv1"
    down, up = (t.double() for t in pairs[name])
    expected = before[f"{name}.weight"].double() + 2.0 * torch.einsum("or,rihw->oihw", up[:, :, 0, 0], down)
    torch.testing.assert_close(merged[f"{name}.weight"], expected.float())


@pytest.mark.parametrize("dialect", ["diffusers", "kohya"])
def test_dialects_agree(unet: Any, pairs: dict[str, Any], tmp_path: Path, dialect: str) -> None:
    tensors = {}
    for name, (down, up) in pairs.items():
        if dialect == "kohya":
            stem = "lora_unet_" + name.replace(".", "_")
            tensors |= {f"{stem}.lora_down.weight": down, f"{stem}.lora_up.weight": up}
            tensors[f"{stem}.alpha"] = torch.tensor(6.0)
        else:
            tensors |= {f"unet.{name}.lora.down.weight": down, f"unet.{name}.lora.up.weight": 2.0 * up}
    save_file(tensors, tmp_path / "other.safetensors")
    ours = _merged(unet, _write(tmp_path / "ours.safetensors", pairs, alpha=6.0))
    other = _merged(unet, tmp_path / "other.safetensors")
    for name, weight in ours.items():
        torch.testing.assert_close(other[name], weight)


def test_diffusers_reads_what_is_written_here_at_the_same_strength(toy_folder: Path) -> None:
    stock = StableDiffusionXLPipeline.from_pretrained(toy_folder)
    stock.unet = UNet2DConditionModel.from_pretrained(toy_folder, subfolder="unet_base")
    ours = _merged(stock.unet, toy_folder / lora_file_name("toy", 4))
    stock.load_lora_weights(toy_folder, weight_name=lora_file_name("toy", 4))
    stock.fuse_lora()
    stock.unload_lora_weights()
    for name, weight in stock.unet.state_dict().items():
        torch.testing.assert_close(ours[name], weight)


def test_what_diffusers_writes_is_read_at_the_same_strength(unet: Any, tmp_path: Path) -> None:
    """There alpha lives only in a JSON in the metadata; taking it for the rank would halve this LoRA."""
    from peft import LoraConfig, get_peft_model_state_dict

    adapted = copy.deepcopy(unet)
    adapted.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "conv1"], init_lora_weights=False))
    state = get_peft_model_state_dict(adapted)
    config = adapted.peft_config["default"].to_dict()
    config["target_modules"] = sorted(config["target_modules"])
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config)
    path = tmp_path / "pytorch_lora_weights.safetensors"
    ours = _merged(unet, path)
    adapted.fuse_lora()
    adapted.unload_lora()
    for name, weight in adapted.state_dict().items():
        torch.testing.assert_close(ours[name], weight)


def test_metadata_says_what_the_lora_is_for(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    write_lora(tmp_path / "l.safetensors", pairs, alpha=3.0, num_inference_steps=8, prediction_type="v_prediction")
    lora = read_lora(tmp_path / "l.safetensors", unet)
    assert lora.prediction_type == "v_prediction"
    assert lora.metadata["sdxl_fast.num_inference_steps"] == "8"
    assert lora.metadata["modelspec.prediction_type"] == "v"
    assert lora.metadata["sdxl_fast.scheduler"] == "EulerDiscreteScheduler, timestep_spacing=trailing"


def test_metadata_name_the_scheduler_that_is_given(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    path, config = tmp_path / "l.safetensors", {"_class_name": "LCMScheduler", "original_inference_steps": 50}
    write_lora(path, pairs, alpha=3.0, num_inference_steps=4, prediction_type="epsilon", scheduler=config)
    metadata = read_lora(path, unet).metadata
    assert metadata["sdxl_fast.scheduler"] == "LCMScheduler, original_inference_steps=50"
    assert metadata["modelspec.usage_hint"] == f"4 steps, guidance scale 0, {metadata['sdxl_fast.scheduler']}"


def test_file_names_round_trip(tmp_path: Path) -> None:
    for steps in (2, 4, 8):
        (tmp_path / lora_file_name("some_name", steps)).touch()
    (tmp_path / "style_lora.safetensors").touch()
    assert {steps: path.name for steps, path in find_loras(tmp_path).items()} == {
        steps: f"some_name_{steps}step_lora.safetensors" for steps in (2, 4, 8)
    }


def test_keys_of_another_model_are_counted_and_named(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "l.safetensors", pairs)
    tensors = load_file(path)
    tensors["unet.nowhere.lora_A.weight"] = torch.zeros(3, 4)
    save_file(tensors, path)
    with pytest.raises(ModelError, match=r"1 keys match no module of a LoRA: unet\.nowhere"):
        read_lora(path, unet)


def test_shapes_of_another_model_are_refused(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    name, (down, up) = next(iter(pairs.items()))
    path = _write(tmp_path / "l.safetensors", {name: (down, torch.cat([up, up]))})
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        read_lora(path, unet)


def test_half_a_pair_is_refused(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    name, (down, _) = next(iter(pairs.items()))
    save_file({f"unet.{name}.lora_A.weight": down}, tmp_path / "l.safetensors")
    with pytest.raises(ModelError, match="only one half"):
        read_lora(tmp_path / "l.safetensors", unet)


def test_alpha_patterns_count(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "l.safetensors", pairs)
    facts = {"unet.lora_alpha": 3, "unet.alpha_pattern": {"to_q": 6}}
    save_file(load_file(path), path, metadata={"lora_adapter_metadata": json.dumps(facts)})
    scales = read_lora(path, unet).scales
    assert {scale for name, scale in scales.items() if name.endswith("to_q")} == {2.0}
    assert {scale for name, scale in scales.items() if not name.endswith("to_q")} == {1.0}


def test_text_encoders_are_not_forgotten(unet: Any, pairs: dict[str, Any], tmp_path: Path) -> None:
    path = _write(tmp_path / "l.safetensors", pairs)
    stem = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    extra = {f"{stem}.lora_A.weight": torch.zeros(3, 32), f"{stem}.lora_B.weight": torch.zeros(128, 3)}
    save_file(load_file(path) | extra, path)
    with pytest.raises(ModelError, match=f"adapts text encoders too.*{stem}"):
        read_lora(path, unet)
