# SPDX-License-Identifier: Apache-2.0
"""cross_attention: out = softmax(scale q k^T) v over at most 256 keys, which a program sees all at once.

Formula   forward  p = softmax of whole rows of scores: one pass, no running maximum; lse saved for the backward.
          backward as in self_attention, by its kernels.
Grid      (blocks of queries, heads, N). With so few keys there are too few blocks of them to share dk and dv among: the
          queries are divided into runs, each of which makes a dk and dv of its own, and a last launch adds them up.
Registers all keys against a block of queries, fp32. No atomics.
Bytes     q read and out written; K and V, 20 KB a head for 77 keys, come from L2. Backward: q, out and dout read, q and
          dout again, dq written, and per run a dk and dv in fp32.
Wrong     beyond 256 keys, where a row of scores fills the registers.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ._attention import LN2, dot, load_rows, precision_of, scales_of, store_rows
from ._attention_config import cross_attention_fwd_config, padded_head_dim, query_runs, target_of
from ._math import round_to
from .self_attention import backward_of_keys, backward_of_queries


@triton.jit
def cross_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sq_n, sq_s, sq_h, sk_n, sk_s, sk_h, sv_n, sv_s, sv_h, heads, queries, keys,
    scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_T: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_h = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_t = tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    MASK_D: tl.constexpr = D != BLOCK_D
    left = queries - i_m
    b_q = load_rows(q_ptr + i_n * sq_n + i_h * sq_h + i_m * sq_s, o_m, o_d, sq_s, left, D, True, MASK_D)
    b_k = load_rows(k_ptr + i_n * sk_n + i_h * sk_h, o_t, o_d, sk_s, keys, D, True, MASK_D)
    b_v = load_rows(v_ptr + i_n * sv_n + i_h * sv_h, o_t, o_d, sv_s, keys, D, True, MASK_D)
    b_s = dot(b_q, tl.trans(b_k), None, PRECISION)
    b_s = tl.where((o_t < keys)[None, :], b_s, float("-inf"))
    c_max = tl.max(b_s, 1) * scale_log2
    b_p = tl.exp2(b_s * scale_log2 - c_max[:, None])
    c_sum = tl.sum(b_p, 1)
    b_out = dot(round_to(b_p, v_ptr.dtype.element_ty), b_v, None, PRECISION) / c_sum[:, None]
    store_rows(out_ptr + ((i_n * queries + i_m) * heads + i_h) * D, b_out, o_m, o_d, heads * D, left, D)
    p_lse = lse_ptr + (i_n * heads + i_h) * queries + i_m
    tl.store(p_lse + o_m, (c_max + tl.log2(c_sum)) * LN2, mask=o_m < left)


@triton.jit
def cross_attention_bwd_merge_kernel(partial_ptr, dk_ptr, dv_ptr, runs, elements, BLOCK: tl.constexpr):
    """The sum over the runs, in order: of partial (2, runs, elements) the first half is dk's, the second dv's."""
    o_x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_x = o_x < elements
    size = tl.cast(elements, tl.int64)
    b_dk = tl.zeros((BLOCK,), tl.float32)
    b_dv = tl.zeros((BLOCK,), tl.float32)
    p_dk = partial_ptr + o_x
    p_dv = p_dk + runs * size
    for _ in range(0, runs):
        if dk_ptr is not None:
            b_dk += tl.load(p_dk, mask=m_x, other=0.0)
        if dv_ptr is not None:
            b_dv += tl.load(p_dv, mask=m_x, other=0.0)
        p_dk += size
        p_dv += size
    if dk_ptr is not None:
        tl.store(dk_ptr + o_x, round_to(b_dk, dk_ptr.dtype.element_ty), mask=m_x)
    if dv_ptr is not None:
        tl.store(dv_ptr + o_x, round_to(b_dv, dv_ptr.dtype.element_ty), mask=m_x)


def cross_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, contiguous; lse (N, H, S) fp32); q (N, S, H, D), k and v (N, T, H, D), fp32, bf16 or fp16.

    The last stride is 1, T at most 256, D a multiple of 8 and at most 128; scale None is 1/sqrt(D).
    """
    n, queries, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((n, heads, queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    config = cross_attention_fwd_config(n, heads, queries, k.shape[1], head_dim, q.dtype, target_of(q))
    cross_attention_fwd_kernel[(triton.cdiv(queries, config.block_m), heads, n)](
        q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, queries, k.shape[1],
        scales_of(head_dim, scale)[1], D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m,
        BLOCK_T=config.block_n, PRECISION=precision_of(q.dtype), **config.options(),
    )  # fmt: skip
    return out, lse


def cross_attention_bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    """(dq, dk, dv), contiguous, None where `needs` is False; dout (N, S, H, D) with the last stride 1."""
    n, queries, heads, _ = q.shape
    dq, dk, dv = (t.new_empty(t.shape) if need else None for t, need in zip((q, k, v), needs, strict=True))
    if q.numel() == 0:
        return dq, *(None if t is None else t.zero_() for t in (dk, dv))  # type: ignore[return-value]
    delta = backward_of_queries(dout, q, k, v, out, lse, dq, scale)
    if dk is None and dv is None:
        return dq, dk, dv
    runs = query_runs(n * heads, queries, k.shape[1], target_of(q))
    if runs == 1:
        backward_of_keys(dout, q, k, v, lse, delta, dk, dv, scale)
        return dq, dk, dv
    partial = k.new_empty((2, runs, *k.shape), dtype=torch.float32)
    of_k, of_v = (part if wanted is not None else None for part, wanted in zip(partial, (dk, dv), strict=True))
    backward_of_keys(dout, q, k, v, lse, delta, of_k, of_v, scale, runs=runs)
    cross_attention_bwd_merge_kernel[(triton.cdiv(k.numel(), 1024),)](
        partial, dk, dv, runs, k.numel(), BLOCK=1024, num_warps=4, num_stages=1, enable_fp_fusion=True
    )
    return dq, dk, dv
