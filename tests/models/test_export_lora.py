"""LoRA files in every dialect: the same strength in stock diffusers, whatever alpha is, bit for bit there and back."""

from __future__ import annotations

import copy
import itertools
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sdxl_fast.errors import ModelError
from sdxl_fast.models.export import export_lora, find_lora
from sdxl_fast.models.facts import Facts
from sdxl_fast.models.loading import EMBEDDED
from sdxl_fast.models.lora import merge_lora, read_lora
from sdxl_fast.models.lora_file import (
    ADAPTER_KEY,
    LoraFile,
    Pair,
    folded,
    lora_tensors,
    read_lora_file,
    write_lora_file,
)
from sdxl_fast.models.original_keys import original_modules
from sdxl_fast.models.source import open_model
from sdxl_fast.models.weights import Lazy, open_weights
from sdxl_fast.testing.toy import random_lora

DIALECTS = ("kohya", "diffusers", "peft")
NETWORKS = ("unet", "text_encoder", "text_encoder_2")
_TEXT = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")


@pytest.fixture(scope="module")
def stock(toy_folder: Path) -> Any:
    """Not to be changed: copy it."""
    unet = UNet2DConditionModel.from_pretrained(toy_folder, subfolder="unet_base")
    return StableDiffusionXLPipeline.from_pretrained(toy_folder, unet=unet)


def _pairs(stock: Any, *, alpha: float = 8.0, texts: bool = True) -> dict[str, Pair]:
    torch.manual_seed(1)
    pairs = {
        f"unet.{name}": Pair(Lazy.of(down), Lazy.of(up), alpha)
        for name, (down, up) in random_lora(stock.unet, rank=4).items()
    }
    for component in NETWORKS[1:] if texts else ():
        for name, module in getattr(stock, component).named_modules():
            if name.endswith(_TEXT):
                out, width = module.weight.shape
                down, up = torch.randn(4, width) / width**0.5, 0.1 * torch.randn(out, 4)
                name = "text_model." + name.removeprefix("text_model.")
                pairs[f"{component}.{name}"] = Pair(Lazy.of(down), Lazy.of(up), alpha)
    return pairs


def _weights(pipe: Any) -> Iterator[tuple[str, torch.Tensor]]:
    for component in NETWORKS:
        for name, tensor in getattr(pipe, component).state_dict().items():
            yield f"{component}.{name.removeprefix('text_model.')}", tensor


def _merged_by_hand(stock: Any, pairs: dict[str, Pair]) -> dict[str, torch.Tensor]:
    """W + alpha / r · up · down in float64, the convolutions by einsum."""
    weights = {name: tensor.double() for name, tensor in _weights(stock)}
    for name, pair in pairs.items():
        down, up = pair.down.read().double(), pair.up.read().double()
        delta = torch.einsum("or,r...->o...", up.flatten(1), down)
        weights[name.replace(".text_model.", ".") + ".weight"] += pair.alpha / len(down) * delta
    return weights


def _merged_by_diffusers(stock: Any, path: Path) -> dict[str, torch.Tensor]:
    pipe = copy.deepcopy(stock)
    pipe.load_lora_weights(path.parent, weight_name=path.name)
    pipe.fuse_lora(components=list(NETWORKS))
    pipe.unload_lora_weights()
    return dict(_weights(pipe))


def _check(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        # a few roundings of float32 at the size of the weights: a scale off by 1 % would be 1e-3
        torch.testing.assert_close(
            found[name].double(), weight, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("alpha", [4.0, 8.0])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_base_and_lora_are_the_merged_model(
    stock: Any, toy_folder: Path, tmp_path: Path, dialect: str, alpha: float
) -> None:
    pairs = _pairs(stock, alpha=alpha)
    path = tmp_path / "l.safetensors"
    write_lora_file(path, LoraFile(pairs, {}), dialect)
    wanted = _merged_by_hand(stock, pairs)
    _check(_merged_by_diffusers(stock, path), wanted)
    _check(_merged_by_us(path, toy_folder), wanted)


ALPHAS: dict[str, Callable[[int, int], float]] = {
    "any": lambda number, rank: 3.0 + number % 5,
    "the ranks": lambda number, rank: float(rank),
    "some zero": lambda number, rank: 8.0 * (number % 2),
}


@pytest.mark.parametrize("texts", [False, True])
@pytest.mark.parametrize("alphas", ALPHAS)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_module_keeps_its_own_alpha_and_rank(
    stock: Any, toy_folder: Path, tmp_path: Path, dialect: str, alphas: str, texts: bool
) -> None:
    pairs = {}
    for number, (name, pair) in enumerate(_pairs(stock, texts=texts).items()):
        rank = 2 + number % 3
        down, up = pair.down.read()[:rank].clone(), pair.up.read()[:, :rank].clone()
        pairs[name] = Pair(Lazy.of(down), Lazy.of(up), ALPHAS[alphas](number, rank))
    path = tmp_path / "l.safetensors"
    write_lora_file(path, LoraFile(pairs, {}), dialect)
    wanted = _merged_by_hand(stock, pairs)
    _check(_merged_by_diffusers(stock, path), wanted)
    _check(_merged_by_us(path, toy_folder), wanted)
    _check(_merged_by_comfyui(stock, path) if dialect == "kohya" else wanted, wanted)


def _merged_by_us(path: Path, base: Path) -> dict[str, torch.Tensor]:
    model = open_model(path, base=base)
    return {
        f"{component}.{name.removeprefix('text_model.')}": lazy.read()
        for component in NETWORKS
        for name, lazy in model.tensors[component].items()
    }


def _merged_by_comfyui(stock: Any, path: Path) -> dict[str, torch.Tensor]:
    """Its loader's rule, module by module: alpha / rank by the file's own `.alpha`, no metadata."""
    tensors = load_file(path)
    weights = {name: tensor.double() for name, tensor in _weights(stock)}
    stems = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_text_model_"}
    for name in weights:
        component, _, module = name.removesuffix(".weight").partition(".")
        stem = stems[component] + module.replace(".", "_")
        if f"{stem}.alpha" in tensors:
            down, up = (tensors[f"{stem}.lora_{half}.weight"].double() for half in ("down", "up"))
            scale = float(tensors[f"{stem}.alpha"]) / len(down)
            weights[name] += scale * (up.flatten(1) @ down.flatten(1)).reshape(weights[name].shape)
    return weights


def test_a_true_alpha_of_each_network_is_kept_by_kohya(stock: Any) -> None:
    pairs = {n: replace(p, alpha=2.0) if n.startswith("text") else p for n, p in _pairs(stock, alpha=8.0).items()}
    tensors = lora_tensors(LoraFile(pairs, {}), "kohya")
    found = {key[:8]: float(tensor.read()) for key, tensor in tensors.items() if key.endswith(".alpha")}
    assert found == {"lora_une": 8.0, "lora_te1": 2.0, "lora_te2": 2.0}
    one = next(iter(pairs))
    tensors = lora_tensors(LoraFile(pairs | {one: replace(pairs[one], alpha=3.0)}, {}), "kohya")
    stem = "lora_" + one.replace(".", "_")
    assert float(tensors[f"{stem}.alpha"].read()) == 8.0
    assert torch.equal(tensors[f"{stem}.lora_up.weight"].read(), pairs[one].up.read() * (3.0 / 8.0))


def _same(found: LoraFile, wanted: dict[str, Pair]) -> None:
    assert found.pairs.keys() == wanted.keys()
    for name, pair in wanted.items():
        other = found.pairs[name]
        assert other.alpha == pair.alpha
        assert torch.equal(other.down.read(), pair.down.read())
        assert torch.equal(other.up.read(), pair.up.read())


@pytest.mark.parametrize("first, second", list(itertools.permutations(DIALECTS, 2)))
def test_there_and_back_is_bitwise(stock: Any, tmp_path: Path, first: str, second: str) -> None:
    pairs = _pairs(stock, alpha=0.7)
    for name in list(pairs)[::3] if "kohya" not in (first, second) else ():
        pairs[name] = replace(pairs[name], alpha=5.0)
    a, b, c = (tmp_path / f"{letter}.safetensors" for letter in "abc")
    write_lora_file(a, LoraFile(pairs, {"note": "kept"}), first)
    write_lora_file(b, read_lora_file(a), second)
    _same(read_lora_file(b), pairs)
    write_lora_file(c, read_lora_file(b), first)
    assert c.read_bytes() == a.read_bytes()


# ---- names ----


def test_names_of_the_text_encoders(stock: Any, tmp_path: Path) -> None:
    file = LoraFile(_pairs(stock), {})
    stem = "text_model_encoder_layers_1_self_attn_q_proj"
    assert {f"lora_te1_{stem}.lora_down.weight", f"lora_te2_{stem}.alpha"} <= lora_tensors(file, "kohya").keys()
    stem = "text_encoder_2.text_model.encoder.layers.0.mlp.fc2"
    assert f"{stem}.lora_A.weight" in lora_tensors(file, "peft")
    assert f"{stem}.lora_linear_layer.up.weight" in lora_tensors(file, "diffusers")


def _renamed(pairs: dict[str, Pair], how: Any) -> dict[str, torch.Tensor]:
    found = {}
    for name, pair in pairs.items():
        down, up, alpha = how(name)
        found |= {down: pair.down.read(), up: pair.up.read()}
        found |= {alpha: torch.tensor(pair.alpha)} if alpha else {}
    return found


def test_kohyas_own_names_are_those_of_a_single_file(stock: Any, tmp_path: Path) -> None:
    pairs = _pairs(stock, texts=False)
    names = {ours: theirs for theirs, ours in original_modules(n for n, _ in stock.unet.named_modules()).items()}

    def kohya(name: str) -> tuple[str, str, str]:
        stem = "lora_unet_" + names[name.removeprefix("unet.")].replace(".", "_")
        return f"{stem}.lora_down.weight", f"{stem}.lora_up.weight", f"{stem}.alpha"

    path = tmp_path / "l.safetensors"
    save_file(_renamed(pairs, kohya), path)
    assert any("input_blocks" in key for key in load_file(path))
    _same(read_lora_file(path, modules=list(names)), pairs)
    _check(_merged_by_diffusers(stock, path), _merged_by_hand(stock, pairs))


def test_older_diffusers_names(stock: Any, tmp_path: Path) -> None:
    pairs = {name: pair for name, pair in _pairs(stock, alpha=4.0).items() if ".attn" in name or "self_attn" in name}

    def old(name: str) -> tuple[str, str, None]:
        if name.startswith("unet."):
            stem, _, last = name.removesuffix(".0").rpartition(".")
            return f"{stem}.processor.{last}_lora.down.weight", f"{stem}.processor.{last}_lora.up.weight", None
        stem, _, last = name.rpartition(".")
        last = last.removesuffix("_proj")
        return f"{stem}.to_{last}_lora.down.weight", f"{stem}.to_{last}_lora.up.weight", None

    path = tmp_path / "l.safetensors"
    save_file(_renamed(pairs, old), path)
    _same(read_lora_file(path), pairs)
    _check(_merged_by_diffusers(stock, path), _merged_by_hand(stock, pairs))


def test_an_adapter_that_peft_saved(stock: Any, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=4, lora_alpha=6, target_modules=["to_q", "conv1"], init_lora_weights=False, alpha_pattern={"conv1": 3}
    )
    adapted = get_peft_model(copy.deepcopy(stock.unet), config)
    adapted.save_pretrained(tmp_path / "adapter")
    unet = copy.deepcopy(stock.unet)
    merge_lora(unet, read_lora(tmp_path / "adapter", unet))
    wanted = adapted.merge_and_unload().state_dict()
    _check(dict(unet.state_dict()), {n: t.double() for n, t in wanted.items()})


# ---- alpha ----


def _silent(stock: Any, path: Path) -> dict[str, Pair]:
    pairs = _pairs(stock, alpha=4.0, texts=False)
    write_lora_file(path, LoraFile(pairs, {}), "peft", bare=True)
    return pairs


def test_alpha_is_the_rank_unless_given(stock: Any, tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    pairs = _silent(stock, path)
    assert {pair.alpha for pair in read_lora_file(path).pairs.values()} == {4.0}
    given = read_lora_file(path, alpha=16.0)
    write_lora_file(tmp_path / "k.safetensors", given, "kohya")
    wanted = {name: Pair(pair.down, pair.up, 16.0) for name, pair in pairs.items()}
    _check(_merged_by_diffusers(stock, tmp_path / "k.safetensors"), _merged_by_hand(stock, wanted))


@pytest.mark.parametrize("alpha", [4.0, 8.0])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_alpha_that_contradicts_the_file_is_refused(stock: Any, tmp_path: Path, dialect: str, alpha: float) -> None:
    """Also one that is the rank, and could as well have been left unsaid."""
    path = tmp_path / "l.safetensors"
    write_lora_file(path, LoraFile(_pairs(stock, alpha=alpha), {}), dialect)
    assert read_lora_file(path, alpha=alpha).pairs
    with pytest.raises(ModelError, match=f"alpha is given as 16, but the file says {alpha:g}"):
        read_lora_file(path, alpha=16.0)


@pytest.mark.parametrize("folder", ["toy", "embedded"])
def test_our_own_loras_are_not_rescaled(toy_folder: Path, folder: str) -> None:
    """The embedded ones were written when an alpha that is the rank went without saying."""
    path = find_lora(toy_folder if folder == "toy" else EMBEDDED, 4)
    ((alpha, rank),) = {(pair.alpha, pair.rank) for pair in read_lora_file(path).pairs.values()}
    assert alpha == rank
    with pytest.raises(ModelError, match=f"alpha is given as 1, but the file says {rank}"):
        read_lora_file(path, alpha=1.0)


def test_a_published_alpha_is_a_scalar_of_the_files_dtype(stock: Any) -> None:
    for alpha, dtype in ((64.0, torch.float16), (2049.0, torch.float32), (0.1, torch.float64)):
        file = LoraFile(_pairs(stock, alpha=alpha, texts=False), {})
        found = {name: t for name, t in lora_tensors(file, "kohya", torch.float16).items() if name.endswith(".alpha")}
        assert {(t.dtype, t.shape, t.read().item()) for t in found.values()} == {
            (dtype, (), torch.tensor(alpha, dtype=dtype).item())
        }


def test_without_metadata_alpha_must_have_another_place(stock: Any, tmp_path: Path) -> None:
    file = LoraFile(_pairs(stock, alpha=8.0), {})
    write_lora_file(tmp_path / "k.safetensors", file, "kohya", bare=True)
    assert open_weights(tmp_path / "k.safetensors")[1] == {}
    with pytest.raises(ValueError, match="peft keeps alpha in the metadata"):
        write_lora_file(tmp_path / "p.safetensors", file, "peft", bare=True)
    assert not (tmp_path / "p.safetensors").exists()
    write_lora_file(tmp_path / "p.safetensors", folded(file), "peft", bare=True)
    _check(_merged_by_diffusers(stock, tmp_path / "p.safetensors"), _merged_by_hand(stock, file.pairs))


def test_rank_stabilised_scaling_and_dora(stock: Any, tmp_path: Path) -> None:
    path = tmp_path / "l.safetensors"
    _silent(stock, path)
    tensors = load_file(path)
    save_file(tensors, path, metadata={ADAPTER_KEY: json.dumps({"unet.lora_alpha": 6, "unet.use_rslora": True})})
    assert {pair.alpha for pair in read_lora_file(path).pairs.values()} == {6 * math.sqrt(4)}
    save_file(tensors, path, metadata={ADAPTER_KEY: json.dumps({"unet.lora_alpha": 6, "unet.use_dora": True})})
    with pytest.raises(ModelError, match="DoRA"):
        read_lora_file(path)
    save_file(tensors, path, metadata={ADAPTER_KEY: "[]"})
    with pytest.raises(ModelError, match="not what diffusers writes"):
        read_lora_file(path)


# ---- exporting ----


def test_export_says_how_to_sample_and_who_can_read_it(stock: Any, tmp_path: Path) -> None:
    file = LoraFile(_pairs(stock, alpha=8.0), {"sshs_model_hash": "stale", "note": "kept"})
    facts = Facts("toy", 1, "sample")
    path = export_lora(file, tmp_path, dialect="kohya", facts=facts)
    assert path.name == "toy_1step_x0_lora.safetensors"
    metadata = open_weights(path)[1]
    assert "sshs_model_hash" not in metadata
    assert metadata["modelspec.prediction_type"] == "x0"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base-shrunken/lora"
    wanted = {"note": "kept", "ss_network_dim": "4", "ss_network_alpha": "8", "sdxl_fast.num_inference_steps": "1"}
    assert wanted.items() <= metadata.items()
    assert metadata["modelspec.hash_sha256"].startswith("0x")
    assert Facts.of(path, metadata) == Facts("toy", 1, "sample", "EulerDiscreteScheduler, timestep_spacing=trailing")
    with pytest.raises(ValueError, match="allowed: kohya, diffusers, peft"):
        export_lora(file, path, dialect="lycoris", facts=facts)


def test_what_nothing_is_known_of_is_written_bare(stock: Any, tmp_path: Path) -> None:
    path = export_lora(
        LoraFile(_pairs(stock, alpha=4.0), {}), tmp_path / "l.safetensors", dialect="kohya", facts=Facts("l")
    )
    assert open_weights(path)[1] == {}
    with pytest.raises(ValueError, match="step count is unknown"):
        export_lora(LoraFile(_pairs(stock), {}), tmp_path, dialect="kohya", facts=Facts("l"))


def test_loras_are_found_in_a_folder(toy_folder: Path, tmp_path: Path) -> None:
    assert find_lora(toy_folder, 4).name == "toy_4step_lora.safetensors"
    assert find_lora(toy_folder / "toy_2step_lora.safetensors", None).name == "toy_2step_lora.safetensors"
    with pytest.raises(ModelError, match="LoRAs for 2, 4, 8 steps"):
        find_lora(toy_folder, 3)
    with pytest.raises(ModelError, match="extract-lora"):
        find_lora(toy_folder / "unet", None)
