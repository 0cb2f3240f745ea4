"""The card of an exported folder says what it is and shows what it draws."""

from __future__ import annotations

from pathlib import Path

import yaml
from PIL import Image

from sdxl_fast.eval.export_card import CardText, Sample, write_export_card
from sdxl_fast.models.facts import Facts

FACTS = Facts("toy", 1, "sample", "EulerDiscreteScheduler, timestep_spacing=trailing")


def _front(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_card_with_pictures(tmp_path: Path) -> None:
    samples = [Sample("red apple", 0, Image.new("RGB", (8, 8), "red")), Sample("a | b", 1, Image.new("RGB", (8, 8)))]
    text = CardText(title="A Toy", license="mit", base_model="someone/base", notes="Not for food.")
    path = write_export_card(tmp_path, FACTS, text, samples, side=32)
    card = path.read_text()
    front = _front(card)
    assert (front["license"], front["base_model"], front["library_name"]) == ("mit", "someone/base", "diffusers")
    assert front["widget"][0] == {"text": "red apple", "output": {"url": "card/sample-0.png"}}
    assert "stable-diffusion-xl" in front["tags"]
    for line in (
        "# A Toy",
        "Not for food.",
        "Draws 32 px pictures in one step without guidance. Its UNet predicts the clean latent (x0).",
        "image = pipe('red apple', num_inference_steps=1, guidance_scale=0).images[0]",
        "| red apple | 0 | ![](card/sample-0.png) |",
        "| a \\| b | 1 | ![](card/sample-1.png) |",
        "## What is in the folder",
    ):
        assert line in card
    assert Image.open(tmp_path / "card" / "sample-0.png").getpixel((3, 3)) == (255, 0, 0)


def test_nothing_is_guessed(tmp_path: Path) -> None:
    card = write_export_card(tmp_path, Facts("toy"), CardText(), [], side=32).read_text()
    assert not {"license", "base_model", "widget"} & _front(card).keys()
    assert "# toy" in card
    assert "Draws" not in card
    assert "Pictures" not in card
    assert not (tmp_path / "card").exists()
