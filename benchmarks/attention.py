# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks of the attention ops share: arguments, and PyTorch's own attention by each of its kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gate import Values
from sdxl_fast.testing.cases import Case


def make(case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
    """Draws the arguments of a case, whose shape is q's: as many keys as ``options["keys"]`` says, or as queries."""
    n, tokens, *channels = case.shape
    keys = case.options.get("keys", tokens)
    drawn = (
        torch.randn((n, count, *channels), generator=generator, device=generator.device).to(dtype)
        for count in (tokens, keys, keys)
    )
    return {**dict(zip("qkv", drawn, strict=True)), "scale": None}


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """``scaled_dot_product_attention`` of [N,S,H,D], out in the layout that the next projection reads."""
    heads_first = (t.transpose(1, 2) for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(*heads_first, scale=scale)
    return out.transpose(1, 2).contiguous()


def _by(kernel: SDPBackend, call: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def peer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, scale: float | None, **_: Any) -> torch.Tensor:
        with sdpa_kernel(kernel):
            return call(q, k, v, scale)

    return peer


def peers(call: Callable[..., torch.Tensor]) -> dict[str, Callable[..., torch.Tensor]]:
    """Returns PyTorch's kernels for a GPU by name, each forced; ``call`` is :func:`sdpa` or like it."""
    kernels = {
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    }
    return {name: _by(kernel, call) for name, kernel in kernels.items()}


PEERS = peers(sdpa)
