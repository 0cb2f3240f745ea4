# SPDX-License-Identifier: Apache-2.0
"""The model card: numbers from the files, a chain that is checked, and no card about other weights."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from sdxl_fast.errors import DataError
from sdxl_fast.eval.model_card import parameters, read_chain, training_time, write_model_card
from sdxl_fast.eval.report import hash_files


def _sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _metrics(folder: Path) -> bytes:
    folder.mkdir(parents=True)
    rows = [{"images": 1000, "images_per_second": 10.0, "loss": 2.0}, {"images": 4000, "images_per_second": 1.0}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (folder / "metrics.jsonl").read_bytes()


@pytest.fixture
def distillation(tmp_path: Path) -> Path:
    """A run of two units with a true chain."""
    run, before = tmp_path / "lightning", None
    for unit in ("00-a-mse", "01-b-lora"):
        digest = _sha(_metrics(run / unit))
        (run / unit / "student.safetensors").write_bytes(unit.encode())
        sha256 = {"student.safetensors": _sha(unit.encode()), "metrics.jsonl": digest}
        line = json.dumps({"unit": unit, "steps": 8, "machine": "m", "sha256": sha256, "previous": before})
        with open(run / "chain.jsonl", "a") as chain:
            chain.write(line + "\n")
        before = _sha(line.encode())
    (run / "recipe.yaml").write_text("kind: lightning\nlora_rank: 8\n")
    return run


@pytest.fixture
def made(toy_folder: Path, distillation: Path, tmp_path: Path) -> dict[str, Any]:
    """Arguments of a complete card."""
    model, found, data, teacher = (tmp_path / name for name in ("model", "report", "data", "teacher"))
    shutil.copytree(toy_folder, model)
    row: dict[str, Any] = dict.fromkeys(("top5_of_teacher", "kid_excess", "kid_excess_error", "diversity"))
    row |= {"top1": 0.25, "top5": 0.8125, "kid": 0.0123, "kid_error": 0.001, "sharpness": 0.97}
    report = {
        "rows": {"1 step": row},
        "baseline": "VAE reconstructions",
        "targets": [],
        "settings": {"num_images": 2000, "seed": 0, "names": 420},
        "inputs": {
            "model_files_sha256": hash_files(model),
            "features": {"network": "N", "weights_sha256": "f" * 64, "input_size": 128},
        },
        "environment": {"torch": "2"},
    }
    found.mkdir()
    (found / "report.json").write_text(json.dumps(report))
    Image.new("RGB", (8, 8)).save(found / "contact_sheet.png")
    data.mkdir()
    facts = {"package": "art", "version": "1.2", "sha512": "s" * 88, "licence": "MIT (art)"}
    (data / "LICENCES.json").write_text(json.dumps({"base": facts}))
    (data / "metadata.jsonl").write_text("{}\n")
    _metrics(teacher)
    (teacher / "recipe.yaml").write_text("kind: teacher\n")
    runs = {"Teacher": teacher, "Distillation": distillation}
    return {"model_dir": model, "title": "Toy", "report_dir": found, "data_dir": data, "runs": runs}


def test_card(made: dict[str, Any]) -> None:
    text = write_model_card(**made, notes="v, not ε: see below.").read_text()
    assert text.startswith("# Toy\n\nv, not ε: see below.\n\n## Quality\n")
    assert "| 1 step | 0.250 | 0.812 |" in text
    assert "| base | art 1.2 | MIT (art) |" in text
    assert "| 01-b-lora | 4,000 | 52 min |" in text  # 1000 / 10 + 3000 / 1 = 3100 s
    assert "1 h 43 min in all" in text
    assert "lora_rank: 8" in text
    assert f"| 00-a-mse | 8 | `{_sha(b'00-a-mse')[:16]}…` | – | – | m |" in text
    for attached in ("contact_sheet.png", "teacher.png", "lightning-00-a-mse.png", "lightning-chain.jsonl"):
        assert f"(card/{attached})" in text
        assert (made["model_dir"] / "card" / attached).is_file()
    chain = made["runs"]["Distillation"] / "chain.jsonl"
    assert (made["model_dir"] / "card" / "lightning-chain.jsonl").read_bytes() == chain.read_bytes()
    # A reader can check the logs shipped with the card against the chain shipped with it.
    shipped = (made["model_dir"] / "card" / "lightning-01-b-lora.jsonl").read_bytes()
    assert _sha(shipped) == json.loads(chain.read_text().splitlines()[1])["sha256"]["metrics.jsonl"]


def test_card_twice_is_the_same(made: dict[str, Any]) -> None:
    """The card and what is attached to it do not count as files of the model."""
    first = write_model_card(**made).read_text()
    assert write_model_card(**made).read_text() == first


def test_report_about_other_weights_is_refused(made: dict[str, Any]) -> None:
    path = made["model_dir"] / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(DataError, match=r"unet/diffusion_pytorch_model.safetensors differs"):
        write_model_card(**made)
    assert not (made["model_dir"] / "README.md").exists()


@pytest.mark.parametrize(("part", "name"), [("data_dir", "LICENCES.json"), ("report_dir", "report.json")])
def test_missing_parts_are_named(made: dict[str, Any], part: str, name: str) -> None:
    (made[part] / name).unlink()
    with pytest.raises(DataError, match=f"{name} does not exist"):
        write_model_card(**made)
    assert not (made["model_dir"] / "README.md").exists()


def test_chain_holds(distillation: Path) -> None:
    assert [link["unit"] for link in read_chain(distillation)] == ["00-a-mse", "01-b-lora"]


def test_chain_notices_another_file(distillation: Path) -> None:
    (distillation / "00-a-mse" / "student.safetensors").write_bytes(b"other")
    with pytest.raises(DataError, match=r"00-a-mse/student.safetensors is missing or is not"):
        read_chain(distillation)


def test_chain_notices_an_edited_line(distillation: Path) -> None:
    path = distillation / "chain.jsonl"
    path.write_text(path.read_text().replace('"machine": "m"', '"machine": "n"', 1))
    with pytest.raises(DataError, match="01-b-lora does not follow"):
        read_chain(distillation)


def test_chain_notices_a_missing_line(distillation: Path) -> None:
    path = distillation / "chain.jsonl"
    path.write_text(path.read_text().splitlines()[1] + "\n")
    with pytest.raises(DataError, match="01-b-lora does not follow"):
        read_chain(distillation)


def test_training_time_needs_rates(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"images": 10, "loss": 1}\n')
    with pytest.raises(DataError, match="no images_per_second"):
        training_time(path)


def test_parameters_are_those_of_the_networks(toy_folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(toy_folder, subfolder="unet")
    counts = parameters(toy_folder)
    assert counts["unet"] == counts["unet_base"] == sum(p.numel() for p in unet.parameters())
    assert any("lora" in name for name in counts)
