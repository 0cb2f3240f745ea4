# SPDX-License-Identifier: Apache-2.0
"""A small picture set in the emoji set's format, and a feature network that needs no weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.nn import functional

from sdxl_fast.testing.toy import toy_pipeline

SHAPES = ("disc", "square", "triangle", "ring")
COLOURS = ("red", "green", "blue")


def _draw(shape: str, colour: str) -> Image.Image:
    picture = Image.new("RGBA", (128, 128), (0, 0, 0, 0))
    pen = ImageDraw.Draw(picture)
    if shape == "disc":
        pen.ellipse((14, 14, 114, 114), fill=colour)
    elif shape == "square":
        pen.rectangle((20, 20, 108, 108), fill=colour)
    elif shape == "triangle":
        pen.polygon(((64, 10), (118, 110), (10, 110)), fill=colour)
    else:
        pen.ellipse((14, 14, 114, 114), outline=colour, width=16)
    return picture


@pytest.fixture(scope="session")
def picture_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve training pictures and one of another split."""
    folder = tmp_path_factory.mktemp("shapes")
    rows = []
    for shape in SHAPES:
        for colour in COLOURS:
            name = f"{colour} {shape}"
            rows.append({"file_name": f"{name.replace(' ', '-')}.png", "text": name, "name": name, "split": "train"})
            _draw(shape, colour).save(folder / rows[-1]["file_name"])
    rows.append({**rows[0], "text": "left out", "name": "left out", "split": "held_out"})
    lines = [json.dumps({**row, "style": "fluent-3d", "category": "shape"}) + "\n" for row in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


class ColourGrid:
    """Pictures averaged down to 6 x 6: enough to tell coloured shapes apart, and deterministic."""

    def __call__(self, images: Tensor) -> Tensor:
        return functional.adaptive_avg_pool2d(images, 6).flatten(1)

    def provenance(self) -> dict[str, str | int]:
        return {"network": "colour grid", "input_size": 6}


@pytest.fixture
def colour_grid() -> ColourGrid:
    return ColourGrid()


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights."""
    from transformers import CLIPConfig, CLIPModel

    from sdxl_fast.models.tokenizer import save_tokenizer, train_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = train_tokenizer(["red square", "green disc"], vocab_size=520, max_tokens=16)
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**small, **ids, "vocab_size": len(tokenizer), "max_position_embeddings": 16}
    vision = {**small, "image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24))
    model.save_pretrained(folder, safe_serialization=True)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undistilled pipeline, whose scheduler says so."""
    folder = toy_pipeline(tmp_path_factory.mktemp("plain") / "plain", few_steps=(), prediction_type="epsilon")
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"trailing"', '"leading"'))
    return folder
