"""Batches are functions of their key, and captions under-determine pictures."""

from pathlib import Path

import torch

from sdxl_fast.data.captions import LatentSet, latent_set
from sdxl_fast.models.config import TOY, build_vae


def _set() -> LatentSet:
    latents = torch.arange(4 * 3, dtype=torch.float32).reshape(4, 3, 1, 1, 1)
    return LatentSet(latents, ["a", "b", "c", "d", "first", "second"], torch.tensor([4, 4, 5, 5]))


def test_a_batch_is_a_function_of_its_key() -> None:
    data = _set()
    assert torch.equal(data.batch(8, 0.3, 1, 2)[0], data.batch(8, 0.3, 1, 2)[0])
    assert torch.equal(data.batch(8, 0.3, 1, 2)[1], data.batch(8, 0.3, 1, 2)[1])
    assert not torch.equal(data.batch(64, 0.3, 1, 2)[0], data.batch(64, 0.3, 1, 3)[0])


def test_captions_fit_their_pictures_and_a_share_names_the_category_only() -> None:
    latents, captions = _set().batch(4000, 0.3, "share")
    names = (latents.flatten() // 3).long()
    by_category = captions >= 4
    assert torch.equal(captions[~by_category], names[~by_category])
    assert torch.equal(captions[by_category], torch.tensor([4, 4, 5, 5])[names[by_category]])
    assert abs(by_category.float().mean().item() - 0.3) < 0.03
    assert len(latents.unique()) == 12, "every draw of every name occurs"


def test_latents_are_made_once_and_again_when_the_settings_differ(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae(TOY)
    art = torch.randint(0, 255, (2, 4, 64, 64), dtype=torch.uint8)
    art[:, 3] = 255
    rows = [{"name": "x", "category": "k"}, {"name": "y", "category": "k"}]
    path = tmp_path / "latents.safetensors"
    settings = {"size": 32, "scale_range": (0.8, 0.9), "seed": 0}
    first = latent_set(path, vae, art, rows, draws=2, **settings)  # type: ignore[arg-type]
    assert first.latents.shape == (2, 2, 4, 8, 8) and first.shape == (4, 8, 8)
    assert first.captions == ["x", "y", "k"] and first.category_of.tolist() == [2, 2]
    written = path.stat().st_mtime_ns
    again = latent_set(path, vae, art, rows, draws=2, **settings)  # type: ignore[arg-type]
    assert path.stat().st_mtime_ns == written and torch.equal(first.latents, again.latents)
    assert latent_set(path, vae, art, rows, draws=3, **settings).latents.shape[1] == 3  # type: ignore[arg-type]


def test_latents_are_kept_for_another_decoder_and_made_again_for_another_encoder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    vae = build_vae(TOY)
    art = torch.full((1, 4, 64, 64), 255, dtype=torch.uint8)
    path = tmp_path / "latents.safetensors"

    def latents() -> torch.Tensor:
        rows = [{"name": "x", "category": "k"}]
        return latent_set(path, vae, art, rows, size=32, draws=1, scale_range=(0.8, 0.9), seed=0).latents

    first = latents()
    with torch.no_grad():
        vae.decoder.conv_in.weight.mul_(2)
    written = path.stat().st_mtime_ns
    assert torch.equal(first, latents()) and path.stat().st_mtime_ns == written
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(2)
    assert not torch.equal(first, latents())
