# SPDX-License-Identifier: Apache-2.0
"""What is measured of sets of pictures, and the report of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdxl_fast.eval.clip_score import Clip, clip_scores
from sdxl_fast.eval.inception import NETWORK
from sdxl_fast.eval.patches import centre_patch
from sdxl_fast.eval.prompt_report import Measured, compare, measure, write_report
from sdxl_fast.eval.prompt_set import pictures_of
from sdxl_fast.eval.sheets import to_pil

PROMPTS = [f"prompt {k}" for k in range(11)]


def _noise(folder: Path, count: int, size: tuple[int, int], *, seed: int, blur: bool = False) -> list[Path]:
    """Files of white noise, height x width."""
    folder.mkdir()
    draw = torch.Generator().manual_seed(seed)
    for index in range(count):
        picture = torch.rand(1, 3, *size, generator=draw)
        picture = functional.avg_pool2d(picture, 3, 1, 1) if blur else picture
        to_pil(picture)[0].save(folder / f"{index:02d}.png")
    return pictures_of(folder)


class Mean:
    """Six features: fewer than pictures."""

    def __call__(self, images: Tensor) -> Tensor:
        edges = images.diff(dim=-1).abs().mean((2, 3))
        return torch.cat([images.mean((2, 3)), edges], dim=1)

    def provenance(self) -> dict[str, str | int]:
        return {"network": "means", "input_size": 24}

    patch_side = 16

    def patches(self, images: Tensor) -> Tensor:
        return self(centre_patch(images, self.patch_side))


def test_blur_shows_in_the_patch_and_in_sharpness(tmp_path: Path) -> None:
    real = measure(_noise(tmp_path / "real", 60, (24, 24), seed=0), Mean())
    same, soft = (_noise(tmp_path / f"{b}", 60, (24, 24), seed=1, blur=b) for b in (False, True))
    same_row, blurred = (compare(measure(files, Mean()), real, None) for files in (same, soft))
    assert 0.8 < same_row["sharpness"] < 1.2 and blurred["sharpness"] < 0.3
    assert blurred["frechet_whole"] > 3 * same_row["frechet_whole"] > 0
    assert same_row["clip_score"] is None
    few = compare(measure(same[:5], Mean()), real, None)
    assert few["frechet_whole"] is None and few["kid_whole"] is not None


def test_sharpness_is_not_compared_across_sizes(tmp_path: Path) -> None:
    """The Laplacian is per pixel: the same scene in half as many pixels has steeper edges."""
    small, large = (_noise(tmp_path / f"{side}", 4, (side, side), seed=0) for side in (24, 48))
    real = measure(small, Mean())
    assert compare(measure(small, Mean()), real, None)["sharpness"] == 1.0
    assert compare(measure(large, Mean()), real, None)["sharpness"] is None
    mixed = measure(small + large, Mean())
    assert compare(mixed, mixed, None)["sharpness"] is None


def test_clip_embeds_like_transformers(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder), batch_size=2)
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    prompts = ["red square", "green disc", "a red disc that is much longer than sixteen tokens can be by any measure"]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    tokens = clip.tokenizer(prompts, padding=True, truncation=True, max_length=16, return_tensors="pt")
    with torch.no_grad():
        whole = clip.model(pixel_values=(images - mean) / std, **tokens)
    cosines = (whole.image_embeds * whole.text_embeds).sum(1)
    found = clip_scores(clip(images), clip.texts(prompts))
    torch.testing.assert_close(found.float(), 100 * cosines.clamp_min(0), rtol=1e-4, atol=1e-3)
    assert clip(torch.rand(1, 3, 40, 64)).shape == (1, 24)
    with pytest.raises(ValueError, match="allowed"):
        clip_scores(torch.zeros(2, 3), torch.zeros(3, 3))


def test_clip_sees_the_middle_at_native_resolution(clip_folder: Path) -> None:
    clip = Clip(str(clip_folder))
    images = torch.rand(2, 3, 40, 64, generator=torch.Generator().manual_seed(1))
    assert clip.patch_side == 32 and torch.equal(clip.patches(images), clip(images[..., 4:36, 16:48]))


def test_the_report_says_what_it_measured(tmp_path: Path, clip_folder: Path) -> None:
    sets = {"1 step": _noise(tmp_path / "one", 11, (24, 32), seed=0)}
    reference = _noise(tmp_path / "real", 11, (24, 32), seed=7)
    clip = Clip(str(clip_folder))
    report = write_report(tmp_path / "out", sets, PROMPTS, extract=Mean(), reference=reference, clip=clip)
    row = report["rows"]["1 step"]
    assert row["images"] == 11 and row["clip_score"] is not None and row["frechet_patch"] is not None
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    text = (tmp_path / "out" / "report.md").read_text()
    assert "the middle 16 px at native resolution" in text
    assert f"to 11 real pictures of {tmp_path / 'real'}. Whole" in text
    assert report["inputs"]["reference"] == {"folder": str(tmp_path / "real"), "pictures": 11}
    assert row["size"] == [24, 32] and "- 1 step" not in text
    assert "| 1 step | 11 |" in text and "11 prompts" in text and str(clip_folder) in text
    assert (tmp_path / "out" / "contact_sheet.png").is_file()


def test_the_report_says_what_drew_the_pictures(tmp_path: Path) -> None:
    files = _noise(tmp_path / "one", 2, (24, 32), seed=0)
    settings = {"model": "a_lora.safetensors", "base": "sdxl", "vae": "taesdxl", "loras": {"style": 0.5}}
    digests = {"model": 64 * "1", "base": 64 * "2", "VAE": 64 * "4", "LoRA style": 64 * "3"}
    settings |= {"source": "student", "steps": 4, "weights_sha256": digests, "guidance": 0.0}
    settings |= {"scheduler": "TCDScheduler, timesteps 999 759", "dtype": "bfloat16", "device": "cuda"}
    write_report(tmp_path, {"4 steps": files}, PROMPTS[:2], extract=Mean(), about={"4 steps": settings})
    assert (
        "- 4 steps: a_lora.safetensors (sha256 111111111111) on sdxl (sha256 222222222222), VAE taesdxl (sha256 "
        "444444444444), LoRA style at 0.5 (sha256 333333333333), student, no guidance, TCDScheduler, timesteps 999 "
        "759, bfloat16 on cuda, 24 x 32 px"
    ) in (tmp_path / "report.md").read_text()


def test_fid_is_said_of_inception_alone(tmp_path: Path) -> None:
    files = _noise(tmp_path / "one", 11, (24, 32), seed=0)

    class Inception(Mean):
        def provenance(self) -> dict[str, str | int]:
            return {"network": NETWORK, "input_size": 299, "resize": "so or so"}

    for extract, title in ((Mean(), "Fréchet"), (Inception(), "FID")):
        write_report(tmp_path / title, {"1 step": files}, PROMPTS, extract=extract, reference=files)
        text = (tmp_path / title / "report.md").read_text()
        assert f"Whole: resized to {'24 px (bicubic' if title == 'Fréchet' else '299 px (so or so)'}" in text
        assert f"| {title}-Whole | {title}-Patch |" in text and ("FID" in text) == (title == "FID")


def test_patches_are_of_one_scale_if_asked_for(tmp_path: Path) -> None:
    """The middle of pictures of half the side, enlarged, shows what that of the whole side does."""
    large = [functional.interpolate(torch.rand(1, 3, 5, 5), size=(48, 64), mode="bicubic").clamp(0, 1) for _ in "abc"]
    small = [functional.interpolate(image, size=(24, 32), mode="bicubic", antialias=True) for image in large]
    files = {}
    for name, pictures in {"large": large, "small": small}.items():
        (tmp_path / name).mkdir()
        for index, picture in enumerate(pictures):
            to_pil(picture.clamp(0, 1))[0].save(tmp_path / name / f"{index}.png")
        files[name] = pictures_of(tmp_path / name)
    whole = measure(files["large"], Mean(), patch_from=48).patch
    native, scaled = (measure(files["small"], Mean(), patch_from=side).patch for side in (None, 48))
    assert (scaled - whole).abs().max() < 0.02 < (native - whole).abs().max()
    write_report(tmp_path, {"1 step": files["small"]}, PROMPTS[:3], extract=Mean(), patch_from=48)
    assert "below 48 px after enlarging them to it" in (tmp_path / "report.md").read_text()


def test_retrieval_and_diversity_within_a_prompt() -> None:
    """Two prompts of two pictures: one of the four is nearer to the other prompt, and one pair is twice the same."""
    texts = torch.eye(3)[[0, 0, 1, 1]]
    clip = torch.tensor([[1.0, 0.1, 0.0], [0.2, 0.9, 0.0], [0.0, 1.0, 0.0], [0.0, 1.0, 0.0]])
    layouts = torch.zeros(4, 3, 16, 16)
    layouts[0] = 0.5
    whole = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    found = Measured(whole, whole, clip, torch.ones(4), layouts, frozenset({(32, 32)}))
    row = compare(found, None, texts, torch.tensor([0, 0, 1, 1]))
    assert row["retrieval"] == 0.75
    assert row["content_diversity"] == pytest.approx(0.5) and row["layout_diversity"] == pytest.approx(0.25)
    once = compare(found, None, texts, torch.tensor([0, 1, 2, 3]))
    assert once["content_diversity"] is None, "of one picture a prompt nothing can be said"
    assert compare(found, None, texts, torch.zeros(4, dtype=torch.int64))["retrieval"] is None
