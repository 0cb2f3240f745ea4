"""The encoders: without the UNet, in bfloat16 with float32 to fall back on."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from sdxl_fast.data.encoders import Encoders
from sdxl_fast.testing.pictures import picture


def test_what_bfloat16_overflows_is_encoded_again_in_float32(toy_folder: Path) -> None:
    encoders = Encoders(toy_folder, device="cpu", precision="bf16")
    pictures = [picture(seed, 32, 32) for seed in range(4)]
    whole = encoders.latents(pictures)
    exact = Encoders(toy_folder, device="cpu", precision="fp32").latents(pictures)
    assert not torch.equal(whole, exact)
    torch.testing.assert_close(whole, exact, rtol=0.1, atol=0.1)
    encode, calls = encoders._encode, []

    def overflowing(x: torch.Tensor, *, autocast: bool) -> torch.Tensor:
        latents = encode(x, autocast=autocast)
        if autocast:
            latents[1, 0, 0, 0] = float("nan")
            latents[3, 1, 2, 3] = float("-inf")
        calls.append((len(x), autocast))
        return latents

    encoders._encode = overflowing  # type: ignore[method-assign]
    found = encoders.latents(pictures)
    assert calls == [(4, True), (2, False)]
    assert torch.equal(found[[0, 2]], whole[[0, 2]])
    torch.testing.assert_close(found[[1, 3]], exact[[1, 3]], rtol=1e-3, atol=1e-3)


def test_the_unet_is_not_loaded(toy_folder: Path, tmp_path: Path) -> None:
    """It is three quarters of the model and of no use here."""
    copy = Path(shutil.copytree(toy_folder, tmp_path / "toy"))
    for weights in [*copy.glob("unet*/*.safetensors"), *copy.glob("*.safetensors")]:
        weights.unlink()
    encoders = Encoders(copy, device="cpu", precision="fp32")
    assert encoders.digest() == Encoders(toy_folder, device="cpu", precision="fp32").digest()
    assert encoders.latents([picture(0, 32, 32)]).shape == (1, 4, 8, 8)


def test_long_captions_are_counted_without_a_word(toy_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoders = Encoders(toy_folder, device="cpu", precision="fp32")
    assert encoders.truncated(["word " * 200, "word", "word " * 300]) == 2
    assert not caplog.records
