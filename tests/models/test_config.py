"""The configuration that makes tiny pipelines makes the published one too."""

from __future__ import annotations

import torch

from sdxl_fast.models.config import SDXL, build_unet, build_vae


def test_sdxl_has_the_published_parameter_counts() -> None:
    """2,567,463,684 and 83,653,863 are what the released UNet and VAE hold (1,680 and 248 tensors)."""
    with torch.device("meta"):
        unet, vae = build_unet(SDXL), build_vae(SDXL)
    assert sum(p.numel() for p in unet.parameters()) == 2_567_463_684
    assert len(unet.state_dict()) == 1680
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert len(vae.state_dict()) == 248
    assert SDXL.latent_size == 128
