# SPDX-License-Identifier: Apache-2.0
"""``ops.vae_attention``: the shared suites, and refusals."""

from __future__ import annotations

import pytest
import torch

from sdxl_fast import ops
from sdxl_fast.dispatch import explain
from sdxl_fast.ops.vae_attention import _OP
from sdxl_fast.reference import vae_attention as reference
from sdxl_fast.testing.attention_suite import AttentionSuite
from sdxl_fast.testing.cases import Case, sdxl_cases
from sdxl_fast.testing.op_suite import device_of, require


class TestVaeAttention(AttentionSuite):
    op = _OP
    public = staticmethod(ops.vae_attention)
    reference = reference
    wrong = tuple(reference.WRONG)
    cases = (
        Case("packed", (2, 21, 64)),
        Case("one-query", (2, 1, 16), {"keys": 2}),
        Case("head-512", (1, 11, 512)),
        Case("head-512-whole-blocks", (1, 5, 512), {"keys": 64}),
        Case("head-256", (1, 20, 256), {"keys": 33}),
        Case("head-384", (1, 9, 384), {"keys": 40}),
        Case("head-128", (1, 17, 128)),
        Case("head-5", (2, 6, 5)),
        Case("scale", (2, 16, 32), {"scale": 0.5}),
        Case("uniform", (1, 4, 200), {"scale": 0.0, "keys": 5}),
        Case("sharp", (1, 24, 160), {"sharpness": 1.5}),
        Case("empty-batch", (0, 4, 256)),
        Case("no-queries", (2, 0, 256), {"keys": 3}),
    )
    sdxl = (Case("1x100x512", (1, 100, 512)),)
    full_size = sdxl_cases("vae_attention")
    tiny = Case("tiny", (1, 3, 8), {"scale": 0.6})


Q = torch.zeros(2, 5, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Q.unsqueeze(2), Q, Q), {}, r"q must have 3 dimensions \[N,S,D\], got shape \[2, 5, 1, 8\]"),
        ((Q, Q[..., :4], Q), {}, r"k must have the sizes \[N,D\] of q; got k \[2, 5, 4\] with q \[2, 5, 8\]"),
        ((Q, Q.half(), Q.half()), {}, r"k must have the dtype of q"),
        ((Q, Q, Q), {"scale": "big"}, r"scale must be a finite number >= 0 or None, got 'big'"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.vae_attention(*args, **options)


@pytest.mark.parametrize(("channels", "message"), [(150, "multiple of 8, got shape"), (520, "at most 512, got shape")])
def test_triton_says_which_heads_it_takes(channels, message):
    require("triton", "vae_attention")
    q = torch.zeros(1, 4, channels, device=device_of("triton"))
    assert message in explain("vae_attention", q, q, q).reasons["triton"]
