"""Names of a single-file checkpoint: the published list, and what diffusers makes of them on the way back."""

from __future__ import annotations

import dataclasses
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils as stock

from sdxl_fast.errors import ModelError
from sdxl_fast.models.config import SDXL, TOY, PipelineConfig, UNetConfig, VaeConfig, build_unet, build_vae
from sdxl_fast.models.networks import NETWORKS, parameter_shapes, sdxl_configs
from sdxl_fast.models.original_keys import (
    LOGIT_SCALE,
    POSITION_IDS,
    PREFIXES,
    check_prefixes,
    from_original,
    known_module,
    original_modules,
    table,
    to_original,
)
from sdxl_fast.models.safetensors_check import check_safetensors
from sdxl_fast.models.weights import Lazy, plan, write_weights

LIST = Path(__file__).with_name("sdxl_keys.txt")


def expand(pattern: str) -> list[str]:
    """{a,b} and {0..9}, innermost first, as a shell does."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        return [pattern]
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    parts = map(str, range(int(numbers[1]), int(numbers[2]) + 1)) if numbers else found[1].split(",")
    return [name for part in parts for name in expand(pattern[: found.start()] + part + pattern[found.end() :])]


def published() -> set[str]:
    lines = [line for line in LIST.read_text().splitlines() if not line.startswith("#")]
    names = [name for line in lines for name in expand(line)]
    # an inner brace expanded first repeats names of the outer ones that do not contain it
    return set(names)


@pytest.fixture(scope="module")
def sdxl() -> dict[str, dict[str, Lazy]]:
    """The true SDXL's tensors in float16, by network and name, without values."""

    def unreadable() -> torch.Tensor:
        raise AssertionError("no value of SDXL is needed here")

    return {
        name: {key: Lazy(torch.float16, shape, unreadable) for key, shape in parameter_shapes(name, config).items()}
        for name, config in sdxl_configs().items()
    }


def test_sdxl_gets_the_published_names(sdxl: dict[str, dict[str, Lazy]]) -> None:
    names = published()
    assert len(names) == 2515
    assert to_original(sdxl).keys() == names


def test_sizes_of_the_published_files(sdxl: dict[str, dict[str, Lazy]]) -> None:
    unet = plan(sdxl["unet"])
    assert (len(unet.names), unet.size) == (1680, 5_135_149_736)
    # 3,469,050,312 values at two bytes, 77 positions at eight, and the header
    values = plan(to_original(sdxl))
    assert values.size == 6_938_041_144


@pytest.mark.large
def test_the_true_unet_file_takes_little_memory(sdxl: dict[str, dict[str, Lazy]], tmp_path: Path) -> None:
    """Five gigabytes on disk, less than one in memory."""

    def zeros(shape: tuple[int, ...]) -> Lazy:
        return Lazy(torch.float16, shape, lambda: torch.zeros(shape, dtype=torch.float16))

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = tmp_path / "unet.safetensors"
    write_weights(path, {name: zeros(lazy.shape) for name, lazy in sdxl["unet"].items()})
    assert path.stat().st_size == 5_135_149_736
    assert len(check_safetensors(path)) == 1680
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < 1e9


def _ids(keys: Any) -> dict[str, torch.Tensor]:
    """A tensor for each key that is like no other's."""
    return {key: torch.full((1, 1), float(number)) for number, key in enumerate(keys)}


UNETS = {
    "sdxl": SDXL.unet,
    "toy": TOY.unet,
    "one layer a level": UNetConfig((32, 64), (0, 1), head_dim=16, layers_per_block=1, norm_groups=8),
    "attention everywhere": UNetConfig((32, 32, 64), (1, 1, 2), head_dim=16, layers_per_block=2, norm_groups=8),
    "four levels": UNetConfig((32, 32, 32, 64), (0, 0, 1, 0), head_dim=16, layers_per_block=2, norm_groups=8),
}


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_converts_every_unet_name_back(name: str) -> None:
    """diffusers' converter moves values about without looking at them, so names can stand for values."""
    config = dataclasses.replace(TOY, unet=UNETS[name])
    with torch.device("meta"):
        keys = list(build_unet(config).state_dict())
    checkpoint = {entry.original: entry.sources[0] for entry in table("unet", keys)}
    back = stock.convert_ldm_unet_checkpoint(checkpoint, config.unet_arguments())
    assert len(checkpoint) == len(keys)
    assert back == {key: key for key in keys}


@pytest.mark.parametrize("vae", [SDXL.vae, TOY.vae, VaeConfig((16, 16), layers_per_block=3, norm_groups=8)])
def test_diffusers_converts_every_vae_name_back(vae: VaeConfig) -> None:
    config = dataclasses.replace(TOY, vae=vae)
    with torch.device("meta"):
        keys = list(build_vae(config).state_dict())
    ids = _ids(keys)
    checkpoint = {entry.original: ids[entry.sources[0]] for entry in table("vae", keys)}
    back = stock.convert_ldm_vae_checkpoint(checkpoint, config.vae_arguments())
    assert back.keys() == ids.keys()
    assert all(torch.equal(back[key].reshape(-1), ids[key].reshape(-1)) for key in keys)


def test_shapes_survive_diffusers_converters(sdxl: dict[str, dict[str, Lazy]]) -> None:
    checkpoint = {name: torch.empty(lazy.shape, device="meta") for name, lazy in to_original(sdxl).items()}
    config = type("Config", (), {"hidden_size": 1280})()
    back = {
        "unet": stock.convert_ldm_unet_checkpoint(checkpoint, sdxl_configs()["unet"]),
        "vae": stock.convert_ldm_vae_checkpoint(checkpoint, sdxl_configs()["vae"]),
        "text_encoder": stock.convert_ldm_clip_checkpoint(checkpoint),
        "text_encoder_2": stock.convert_open_clip_checkpoint(
            type("Model", (), {"config": config})(), checkpoint, prefix=PREFIXES["text_encoder_2"]
        ),
    }
    for component, tensors in back.items():
        found = {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith("position_ids")}
        outer = "text_model." if component == "text_encoder" else ""
        wanted = {f"{outer}{name.removeprefix(outer)}": lazy.shape for name, lazy in sdxl[component].items()}
        assert found == wanted, component


def _random(config: PipelineConfig = TOY) -> dict[str, dict[str, Lazy]]:
    configs = {"unet": config.unet_arguments(), "vae": config.vae_arguments()}
    towers = {"text_encoder": config.text_encoder, "text_encoder_2": config.text_encoder_2}
    for name, tower in towers.items():
        configs[name] = {
            "hidden_size": tower.width,
            "intermediate_size": 4 * tower.width,
            "num_hidden_layers": tower.layers,
            "num_attention_heads": tower.heads,
            "projection_dim": tower.projection,
            "vocab_size": 64,
        }
    return {
        name: {key: Lazy.of(torch.randn(shape)) for key, shape in parameter_shapes(name, configs[name]).items()}
        for name in NETWORKS
    }


def test_there_and_back_is_bitwise() -> None:
    networks = _random()
    original = to_original(networks)
    back = from_original(original, networks)
    for name, tensors in networks.items():
        assert back[name].keys() == tensors.keys()
        for key, lazy in tensors.items():
            assert back[name][key].shape == lazy.shape
            assert torch.equal(back[name][key].read(), lazy.read()), key


def test_the_second_encoder_is_open_clips() -> None:
    """Query, key and value above one another, and the projection on the right."""
    networks = _random()
    original, ours = to_original(networks), networks["text_encoder_2"]
    prefix = PREFIXES["text_encoder_2"]
    fused = original[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"].read()
    layer = "text_model.encoder.layers.1.self_attn"
    for k, letter in enumerate("qkv"):
        assert torch.equal(fused[32 * k : 32 * (k + 1)], ours[f"{layer}.{letter}_proj.weight"].read())
    assert torch.equal(original[f"{prefix}text_projection"].read(), ours["text_projection.weight"].read().T)
    assert original[POSITION_IDS].read().tolist() == [list(range(77))]
    assert original[LOGIT_SCALE].read().item() == pytest.approx(4.6052, abs=1e-4)


def test_unmatched_names_are_listed() -> None:
    with pytest.raises(ModelError, match=r"unet: no name .* down_blocks\.0\.motion\.weight, strange\.weight$"):
        table("unet", ["conv_in.weight", "down_blocks.0.motion.weight", "strange.weight"])
    networks = _random()
    original = to_original(networks)
    keys = {name: list(tensors) for name, tensors in networks.items()}
    gone = original.pop("model.diffusion_model.out.2.bias")
    original["model.diffusion_model.more"] = gone
    with pytest.raises(
        ModelError, match=r"f: unet: 1 tensors are missing: \S+out\.2\.bias; 1 .* no parameter: \S+more"
    ):
        from_original(original, keys, source="f")
    with pytest.raises(ModelError, match=r"2 tensors belong to no network of SDXL: a, control_model\.b"):
        check_prefixes(["a", "control_model.b", "first_stage_model.x", "model_ema.decay"])


def test_what_merges_carry_along_is_ignored() -> None:
    networks = _random()
    idle = ("denoiser.sigmas", "alphas_cumprod", "model_ema.decay", "first_stage_model.loss.logvar")
    original = to_original(networks) | {name: Lazy.of(torch.zeros(1)) for name in idle}
    check_prefixes(original)
    assert from_original(original, networks).keys() == networks.keys()


def test_module_names() -> None:
    with torch.device("meta"):
        names = [name for name, _ in build_unet(SDXL).named_modules()]
    found = original_modules(names)
    for original, ours in {
        "input_blocks.4.1.transformer_blocks.1.attn2.to_out.0": (
            "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_out.0"
        ),
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "middle_block.2.emb_layers.1": "mid_block.resnets.1.time_emb_proj",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.8.0.skip_connection": "up_blocks.2.resnets.2.conv_shortcut",
        "label_emb.0.2": "add_embedding.linear_2",
    }.items():
        assert found[original] == ours
    assert known_module("unet", "mid_block.resnets.1.conv1")
    assert not known_module("unet", "single_blocks.0.linear1")
    assert known_module("text_encoder", "text_model.encoder.layers.3.mlp.fc1")
    assert not known_module("text_encoder_2", "text_model.encoder.layers.3.mlp.fc3")
