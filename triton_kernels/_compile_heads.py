# SPDX-License-Identifier: Apache-2.0
"""The cases of the discriminators' heads for `_compile`: SDXL-Lightning's at 1024 px, ADD's on a ViT, ragged ones."""

from __future__ import annotations

import torch


def disc_head_cases(dtype: torch.dtype) -> None:
    """One position of 1280 channels, several in either layout, losses of each kind."""
    from .disc_head import disc_head_bwd, disc_head_fwd

    shapes = (((8, 1280, 1, 1), 32, dtype), ((2, 1280, 3, 2), 32, torch.float32), ((3, 10, 5, 7), 2, dtype))
    for shape, groups, params in shapes:
        for channels_last, loss in ((False, "non_saturating_real"), (True, "hinge_fake"), (True, "hinge_student")):
            x = torch.empty(shape, dtype=dtype, device="meta")
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            weight = torch.empty(shape[1], dtype=params, device="meta")
            logits, losses, *rest = disc_head_fwd(x, weight, weight, weight, weight[:1], groups, 1e-5, loss)
            given = (x, weight, weight, weight, weight[:1])
            for arrived, needs in (((logits, losses), (True,) * 5), ((None, losses), (True, False, False, True, True))):
                disc_head_bwd(*given, *arrived, logits, *rest, groups, loss, needs)


def token_head_cases(dtype: torch.dtype) -> None:
    """ViT-S and ViT-L at 224 and 518 px; ragged groups; all gradients, and those of a student."""
    from .token_head import token_head_bwd, token_head_fwd

    for (n, channels, length), groups, params in (
        ((8, 384, 257), 48, dtype), ((8, 1024, 1370), 128, torch.float32), ((2, 21, 6), 3, dtype),
    ):  # fmt: skip
        hidden = torch.empty((n, channels, length), dtype=dtype, device="meta")
        weight = torch.empty(channels, dtype=params, device="meta")
        direction, offset = (torch.empty(size, dtype=params, device="meta") for size in ((n, channels), (n,)))
        given = (hidden, hidden, weight, weight, direction, offset)
        logits, mean, rstd = token_head_fwd(*given, groups, 1e-5)
        for needs in ((True,) * 6, (True, True, False, False, False, False)):
            token_head_bwd(*given, logits, mean, rstd, groups, needs)
