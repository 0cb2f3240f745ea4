"""The card of an exported folder says what it is and shows what it draws."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from PIL import Image

from sdxl_fast.eval.export_card import CardText, Sample, Shown, check_card, write_file_card, write_folder_card
from sdxl_fast.models.facts import Facts

FACTS = Facts("toy", 1, "sample", "EulerDiscreteScheduler, timestep_spacing=trailing")


def _front(text: str) -> dict:
    assert text.startswith("---\n")
    return yaml.safe_load(text.split("---\n")[1])


def test_card_with_pictures(tmp_path: Path) -> None:
    samples = [Sample("red apple", 0, Image.new("RGB", (8, 8), "red")), Sample("a | b", 1, Image.new("RGB", (8, 8)))]
    text = CardText(title="A Toy", license="mit", base_model="someone/base", notes="Not for food.")
    path = write_folder_card(tmp_path, Shown(FACTS, 32, samples), text)
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
    card = write_folder_card(tmp_path, Shown(Facts("toy"), 32), CardText()).read_text()
    assert not {"license", "base_model", "widget"} & _front(card).keys()
    assert "# toy" in card
    assert "Draws" not in card
    assert "Pictures" not in card
    assert not (tmp_path / "card").exists()


def test_a_persons_card_is_never_replaced(tmp_path: Path) -> None:
    card = tmp_path / "README.md"
    check_card(card)  # there is none yet
    (tmp_path / "toy.safetensors").write_bytes(b"weights")
    write_file_card(card, tmp_path / "toy.safetensors", "lora", Shown(FACTS, 32), CardText())
    check_card(card)
    ours = card.read_text()
    assert "adapter" not in ours and "lora" in _front(ours)["tags"]  # there is no base model to be an adapter of
    for theirs in ("# Mine\n", ours.replace("# toy", "# My toy"), ours + "One more thing.\n", ""):
        card.write_text(theirs)
        with pytest.raises(ValueError, match=r"README\.md: not as an export left it, .* move it away"):
            check_card(card)
    for other in (tmp_path, tmp_path / "README"):
        with pytest.raises(ValueError, match=r"allowed: a file that ends in \.md"):
            check_card(other)


def test_a_file_of_sdxls_size_is_drawn_with_by_diffusers(tmp_path: Path) -> None:
    """What needs no weights of that size: the code is Python and names the file, its base and its scheduler."""
    file = tmp_path / "big_4step.safetensors"
    file.write_bytes(b"weights")
    facts = Facts("big", 4, "epsilon", "TCDScheduler, original_inference_steps=50")
    text = CardText(base_model="someone/base")
    for kind, loads in (("", 'from_single_file("big_4step.safetensors")'), ("lora", 'from_pretrained("someone/base")')):
        card = write_file_card(tmp_path / f"{kind}.md", file, kind, Shown(facts, 1024), text).read_text()
        code = card.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert loads in code and "from diffusers import StableDiffusionXLPipeline, TCDScheduler" in code
        assert "(pipe.scheduler.config, original_inference_steps=50, prediction_type='epsilon')" in code
        assert "`big_4step.safetensors` holds" in card and ": 7 bytes, sha256" in card
    card = write_file_card(tmp_path / "own.md", file, "", Shown(facts, 64), text, shrunken=True).read_text()
    assert 'OneStepPipeline.from_pretrained("big_4step.safetensors")' in card
