# SPDX-License-Identifier: Apache-2.0
"""The launches of the matrix kernels that `_compile` compiles."""

from __future__ import annotations

import torch


def upsample_conv2d_cases(dtype: torch.dtype) -> None:
    """Launches of `upsample_conv2d`."""
    from .upsample_conv2d import upsample_conv2d_fwd

    for n, c_in, h, w, c_out in ((1, 1280, 32, 32, 1280), (2, 5, 3, 7, 6)):
        phases = torch.empty(c_out, 4, 4, c_in, dtype=dtype, device="meta").permute(3, 0, 1, 2)
        x = torch.empty(n, c_in, h, w, dtype=dtype, device="meta")
        upsample_conv2d_fwd(x.to(memory_format=torch.channels_last), phases, phases[0, :, 0, 0].contiguous(), phases)
    upsample_conv2d_fwd(x, phases, None, phases)
