"""A picture set and recipes small enough to train on in a test."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

NAMES = [("red square", "shape"), ("green square", "shape"), ("blue square", "shape"), ("white cloud", "weather")]
COLOURS = [(220, 30, 30), (30, 200, 60), (40, 60, 230), (240, 240, 240)]


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder like the emoji set: four names, two categories."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for index, ((name, category), colour) in enumerate(zip(NAMES, COLOURS, strict=True)):
        pixels = np.zeros((64, 64, 4), dtype=np.uint8)
        pixels[8 + 4 * index : -8, 8:-8] = (*colour, 255)
        Image.fromarray(pixels).save(folder / f"{index}.png")
        facts = {"split": "train", "style": "fluent-3d", "name": name, "category": category}
        rows.append({"file_name": f"{index}.png", "text": name, **facts})
    folder.joinpath("metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny ε-predicting pipeline with random weights."""
    from sdxl_fast.testing.toy import toy_pipeline

    return toy_pipeline(tmp_path_factory.mktemp("teacher") / "toy", prediction_type="epsilon", few_steps=())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for the test's runs."""
    monkeypatch.setenv("SDXL_FAST_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


OPTIMIZER = {"lr": 1e-3}
PHASE: dict[str, Any] = {"condition": True, "trains": "lora", "images": 8}


@pytest.fixture(scope="session")
def lightning_recipe(pictures: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of unit once: MSE, LoRA with D, LoRA with D', full with D', conversion, re-noised D and D'."""
    few = {"loss": "adversarial"}
    relaxed = {**PHASE, "condition": False}
    tree = {
        "kind": "lightning",
        "run": "distil",
        "teacher": str(teacher_folder),
        "export_name": "toy",
        "data": {"folder": str(pictures), "resolution": 32, "art_size": 64},
        "draws": 2,
        "batch": 4,
        "precision": "fp32",
        "guidance_scale": 2.0,
        "lora_rank": 2,
        "checkpoint_every": 8,
        "log_every": 4,
        "optimizer": OPTIMIZER,
        "adversarial_optimizer": {**OPTIMIZER, "betas": [0, 0.99]},
        "discriminator_optimizer": {**OPTIMIZER, "betas": [0, 0.99]},
        "stages": [
            {"name": "32-step", "steps": 32, "loss": "mse", "images": 8},
            {
                **few,
                "name": "8-step",
                "steps": 8,
                "phases": [
                    {**PHASE, "name": "lora-d", "d_warmup": 4},
                    {**relaxed, "name": "lora-d-prime"},
                    {**relaxed, "name": "full-d-prime", "trains": "full"},
                ],
            },
            {
                **few,
                "name": "4-step",
                "steps": 4,
                "phases": [{**relaxed, "name": "lora-d-prime", "teacher": "32-step"}],
            },
            {
                **few,
                "name": "1-step",
                "steps": 1,
                "convert_images": 8,
                "timesteps": [249, 499, 749, 999],
                "phases": [
                    {**PHASE, "name": "full-d", "trains": "full", "renoise": [10, 250, 500, 750]},
                    {
                        **relaxed,
                        "name": "full-d-prime",
                        "trains": "full",
                        "teacher": "4-step",
                        "renoise": [10, 250, 500, 750],
                        "renoise_weights": [5, 1, 1, 1],
                    },
                ],
            },
        ],
    }
    path = tmp_path_factory.mktemp("recipe") / "distil.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture
def phase_task(lightning_recipe: Path, tmp_path: Path) -> Callable[..., Any]:
    """Makes the task of one adversarial phase that the base teaches; other arguments are the phase's settings."""
    from sdxl_fast.train import stages
    from sdxl_fast.train.config import LightningConfig, load_recipe
    from sdxl_fast.train.lightning import AdversarialTask

    def make(*settings: str, steps: int = 32, condition: bool = True, **phase: Any) -> AdversarialTask:
        whole = {"name": "p", "condition": condition, "trains": "full", "images": 8, **phase}
        stage = {"name": "a", "steps": steps, "loss": "adversarial", "phases": [whole]}
        config = load_recipe(lightning_recipe, [f"stages={json.dumps([stage])}", *settings])
        assert isinstance(config, LightningConfig)
        bench = stages.make_bench(config, tmp_path)
        lineage = stages.Lineage(bench, tmp_path)
        task = stages.make_task(lineage.units[0], bench, lineage)
        assert isinstance(task, AdversarialTask)
        return task

    return make
