# SPDX-License-Identifier: Apache-2.0
"""``ops.self_attention``: the shared suites, and refusals."""

from __future__ import annotations

import pytest
import torch

from sdxl_fast import ops
from sdxl_fast.dispatch import explain
from sdxl_fast.ops import _native, _sdpa
from sdxl_fast.ops.self_attention import _OP
from sdxl_fast.reference import self_attention as reference
from sdxl_fast.testing.attention_suite import AttentionSuite
from sdxl_fast.testing.cases import Case, sdxl_cases, shrunk
from sdxl_fast.testing.op_suite import device_of, require


class TestSelfAttention(AttentionSuite):
    op = _OP
    public = staticmethod(ops.self_attention)
    reference = reference
    wrong = tuple(reference.WRONG)
    cases = (
        Case("packed", (2, 19, 2, 64)),
        Case("one-channel", (1, 1, 1, 1), {"keys": 2}),
        Case("one-query", (2, 1, 3, 16), {"keys": 2}),
        Case("blocks", (1, 90, 1, 64)),
        Case("more-keys", (1, 20, 2, 64), {"keys": 150}),
        Case("fewer-keys", (1, 70, 1, 64), {"keys": 5}),
        Case("head-24", (1, 33, 3, 24)),
        Case("head-128", (2, 17, 1, 128)),
        Case("head-5", (2, 6, 2, 5)),
        Case("scale", (2, 16, 1, 32), {"scale": 0.5}),
        Case("uniform", (1, 24, 1, 16), {"scale": 0.0}),
        Case("sharp", (1, 48, 2, 32), {"sharpness": 2.0}),
        Case("even-blocks", (1, 64, 1, 32), {"keys": 128}),
        Case("empty-batch", (0, 4, 2, 16)),
        Case("no-queries", (2, 0, 2, 16), {"keys": 3}),
    )
    sdxl = shrunk(sdxl_cases("self_attention"), longest=72, dims=(1,))
    full_size = sdxl_cases("self_attention")
    tiny = Case("tiny", (1, 3, 2, 8), {"scale": 0.6})


Q = torch.zeros(2, 5, 3, 8)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((Q.long(), Q, Q), {}, r"q must be float32.*got int64"),
        ((Q[0], Q, Q), {}, r"q must have 4 dimensions \[N,S,H,D\], got shape \[5, 3, 8\]"),
        ((Q, Q.half(), Q), {}, r"k must have the dtype of q"),
        ((Q, Q, Q.to("meta")), {}, r"v must be on the device of q"),
        ((Q, Q[:, :, :2], Q), {}, r"k must have the sizes \[N,H,D\] of q; got k \[2, 5, 2, 8\] with q \[2, 5, 3, 8\]"),
        ((Q, Q, Q[:, :4]), {}, r"v must have the shape of k \[2, 5, 3, 8\], got \[2, 4, 3, 8\]"),
        ((Q, Q[:, :0], Q[:, :0]), {}, r"k must have at least 1 tokens \(dimension 1\)"),
        ((Q[..., :0], Q[..., :0], Q[..., :0]), {}, r"q must have at least 1 channels \(dimension 3\)"),
        ((Q, Q, Q), {"scale": -1.0}, r"scale must be a finite number >= 0 or None, got -1.0"),
        (([1.0], Q, Q), {}, r"q must be a tensor, got list"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.self_attention(*args, **options)


def test_known_values():
    """Two keys with scores ln 3 and 0 share the weight 3 to 1."""
    q = torch.tensor([1.0986122886681098], dtype=torch.float64).reshape(1, 1, 1, 1)
    k, v = (torch.tensor(t, dtype=torch.float64).reshape(1, 2, 1, 1) for t in ([1.0, 0.0], [4.0, 8.0]))
    torch.testing.assert_close(ops.self_attention(q, k, v).flatten(), torch.tensor([5.0], dtype=torch.float64))


@pytest.mark.parametrize(
    ("shape", "message"),
    [((1, 4, 1, 12), "multiple of 8, got shape"), ((1, 4, 1, 136), "at most 128, got shape")],
)
def test_triton_says_which_heads_it_takes(shape, message):
    require("triton", "self_attention")
    q = torch.zeros(shape, device=device_of("triton"))
    assert message in explain("self_attention", q, q, q).reasons["triton"]


def test_a_cpu_takes_the_native_kernels_with_avx512_for_many_keys_too():
    assert explain(ops.self_attention, Q, Q, Q).backend == "cpu"
    many, wide = torch.zeros(1, 257, 1, 8), torch.zeros(1, 200, 1, 96)
    streamed = _native.binding("cpu").cpu_isa().startswith("avx512")
    assert {explain(ops.self_attention, t, t, t).backend for t in (many, wide)} == {"cpu" if streamed else "library"}
    found = explain(ops.self_attention, *[many.double()] * 3)
    assert found.backend == "library" and "there must be at most 256 keys" in found.reasons["cpu"]
    assert "would run, but library is preferred" in found.reasons["eager"]
    assert explain(ops.self_attention, *[Q.to("meta")] * 3).reasons["library"] == "q must be a cpu or cuda tensor"


@pytest.mark.parametrize(
    ("dtype", "shape", "backward", "expected"),
    [
        (torch.float32, (1, 16, 4, 24), True, False),
        (torch.float16, (1, 4096, 1, 64), False, True),
        (torch.bfloat16, (64, 16, 4, 24), False, False),
        (torch.bfloat16, (64, 16, 4, 24), True, True),
        (torch.bfloat16, (1, 256, 4, 128), True, True),
        (torch.bfloat16, (1, 257, 4, 64), True, False),
        (torch.bfloat16, (1, 256, 1, 512), True, False),
    ],
)
def test_where_the_cpu_kernel_gets_float32_copies(dtype, shape, backward, expected):
    assert _sdpa.upcasts(torch.empty(shape, dtype=dtype, device="meta"), backward=backward) is expected
