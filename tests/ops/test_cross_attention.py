# SPDX-License-Identifier: Apache-2.0
"""``ops.cross_attention``: the shared suites, its runs of queries, and refusals."""

from __future__ import annotations

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import explain
from sdxl_fast.ops.cross_attention import _OP
from sdxl_fast.reference import cross_attention as reference
from sdxl_fast.testing.attention_suite import AttentionSuite
from sdxl_fast.testing.cases import Case, sdxl_cases, shrunk
from sdxl_fast.testing.op_suite import device_of, require


class TestCrossAttention(AttentionSuite):
    op = _OP
    public = staticmethod(ops.cross_attention)
    reference = reference
    wrong = tuple(reference.WRONG)
    cases = (
        Case("packed", (2, 19, 2, 64)),
        Case("prompt", (1, 70, 1, 64), {"keys": 77}),
        Case("two-keys", (2, 5, 1, 16), {"keys": 2}),
        Case("most-keys", (1, 9, 1, 32), {"keys": 256}),
        Case("more-keys", (1, 9, 1, 32), {"keys": 257}),
        Case("head-24", (1, 33, 3, 24), {"keys": 24}),
        Case("head-128", (1, 17, 1, 128), {"keys": 40}),
        Case("scale", (2, 16, 1, 32), {"scale": 0.5, "keys": 7}),
        Case("uniform", (1, 24, 1, 16), {"scale": 0.0, "keys": 5}),
        Case("sharp", (1, 48, 2, 32), {"sharpness": 2.0, "keys": 20}),
        Case("empty-batch", (0, 4, 2, 16), {"keys": 7}),
        Case("no-queries", (2, 0, 2, 16), {"keys": 3}),
    )
    sdxl = shrunk(sdxl_cases("cross_attention"), longest=40, dims=(1,))
    full_size = sdxl_cases("cross_attention")
    tiny = Case("tiny", (1, 3, 2, 8), {"scale": 0.6, "keys": 4})


def _gradients(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, asked: str = "qkv") -> dict[str, torch.Tensor]:
    leaves = {n: t.detach().requires_grad_(n in asked) for n, t in (("q", q), ("k", k), ("v", v))}
    out = ops.cross_attention(*leaves.values())
    dout = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
    return dict(zip(asked, torch.autograd.grad(out, [leaves[n] for n in asked], dout), strict=True))


@pytest.mark.parametrize("queries", [300, 384], ids=["ragged", "whole"])
def test_runs_of_queries_add_up(queries):
    """With few heads the queries are divided into runs, whose shares of dk and dv are summed: none lost, none twice."""
    require("triton", "cross_attention")
    from sdxl_fast.triton_kernels._attention_config import query_runs, target_of

    device = device_of("triton")
    q, k, v = (torch.randn(1, tokens, 1, 16, device=device) for tokens in (queries, 6, 6))
    assert query_runs(1, queries, 6, target_of(q)) == 3
    with use_backend("triton"):
        found = _gradients(q, k, v)
        alone = _gradients(q, k, v, asked="k") | _gradients(q, k, v, asked="v")
    with use_backend("eager"):
        expected = _gradients(q, k, v)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(found[name], gradient) for name, gradient in alone.items())


Q, K = torch.zeros(2, 5, 3, 8), torch.zeros(2, 7, 3, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Q.long(), K, K), {}, r"q must be float32.*got int64"),
        ((Q, K, K[:1]), {}, r"v must have the shape of k \[2, 7, 3, 8\], got \[1, 7, 3, 8\]"),
        ((Q, K[:1], K[:1]), {}, r"k must have the sizes \[N,H,D\] of q; got k \[1, 7, 3, 8\] with q \[2, 5, 3, 8\]"),
        ((Q, K[:, :0], K[:, :0]), {}, r"k must have at least 1 tokens \(dimension 1\)"),
        ((Q, K, K), {"scale": float("nan")}, r"scale must be a finite number >= 0 or None, got nan"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.cross_attention(*args, **options)


def test_triton_says_how_many_keys_it_takes():
    require("triton", "cross_attention")
    q, k = (torch.zeros(1, tokens, 1, 16, device=device_of("triton")) for tokens in (4, 257))
    reasons = explain("cross_attention", q, k, k).reasons
    assert reasons["triton"] == "k must have at most 256 keys (dimension 1), got shape [1, 257, 1, 16]"
