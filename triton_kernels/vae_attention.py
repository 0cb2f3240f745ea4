# SPDX-License-Identifier: Apache-2.0
"""vae_attention: out = softmax(scale q k^T) v with one head of up to 512 channels.

Formula   forward as in self_attention. The backward is the library's, from the same log-sum-exp.
Grid      (blocks of queries, parts of v's channels, N). At 512 channels the weighted sums of 64 whole queries, or of
          128 with half their channels, are 128 KB in fp32, half of an SM's registers, so one program runs per SM.
          Which of the two is `vae_attention_config`'s choice; each part makes the scores for itself.
Registers the sums, over all warps, and the scores against one block of keys.
Shared    the queries, 64 KB at 64 x 512 in 16 bits (or by chunks, where that is too much), and the blocks of K and V on
          their way.
Bytes     q, k, v read and out written. Every program reads K and its part of V from L2, which bounds it.
Wrong     for heads up to 128 channels, which self_attention's kernels do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ._attention import LN2, dot, load_rows, precision_of, scales_of, softmax_step, store_rows
from ._attention_config import padded_head_dim, target_of, vae_attention_config
from ._math import round_to
from .self_attention import self_attention_fwd


@triton.jit
def vae_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sq_n, sq_s, sk_n, sk_s, sv_n, sv_s, queries, keys, scale_log2,
    D: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, VALUE_D: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, MASK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # 32 bits until they meet a stride: every register counts here.
    i_m = tl.program_id(0) * BLOCK_M
    i_n = tl.program_id(2)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_c = tl.arange(0, CHUNK)
    o_v = tl.program_id(1) * VALUE_D + tl.arange(0, VALUE_D)
    MASK_D: tl.constexpr = D != BLOCK_D
    left = queries - i_m
    q_ptr += i_n.to(tl.int64) * sq_n + i_m.to(tl.int64) * sq_s
    k_ptr += i_n.to(tl.int64) * sk_n
    v_ptr += i_n.to(tl.int64) * sv_n
    if CHUNK == BLOCK_D:
        b_q = load_rows(q_ptr, o_m, o_c, sq_s, left, D, True, MASK_D)
    c_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    c_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, VALUE_D), tl.float32)
    rest = keys
    for _ in range(0, (keys + BLOCK_N - 1) // BLOCK_N):
        if CHUNK == BLOCK_D:
            b_k = load_rows(k_ptr, o_n, o_c, sk_s, rest, D, MASK_N, MASK_D)
            b_s = dot(b_q, tl.trans(b_k), None, PRECISION)
        else:
            b_s = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
            for start in range(0, D, CHUNK):
                b_q = load_rows(q_ptr + start, o_m, o_c, sq_s, left, D - start, True, MASK_D)
                b_k = load_rows(k_ptr + start, o_n, o_c, sk_s, rest, D - start, MASK_N, MASK_D)
                b_s = dot(b_q, tl.trans(b_k), b_s, PRECISION)
        if MASK_N:
            b_s = tl.where((o_n < rest)[None, :], b_s, float("-inf"))
        b_p, c_max, c_sum, b_acc = softmax_step(b_s, c_max, c_sum, b_acc, scale_log2)
        b_v = load_rows(v_ptr, o_n, o_v, sv_s, rest, D, MASK_N, MASK_D)
        b_acc = dot(round_to(b_p, v_ptr.dtype.element_ty), b_v, b_acc, PRECISION)
        k_ptr += BLOCK_N * sk_s.to(tl.int64)
        v_ptr += BLOCK_N * sv_s.to(tl.int64)
        rest -= BLOCK_N
    row = i_n.to(tl.int64) * queries + i_m
    if tl.program_id(1) == 0:
        tl.store(lse_ptr + row + o_m, (c_max + tl.log2(c_sum)) * LN2, mask=o_m < left)
    store_rows(out_ptr + row * D, b_acc / c_sum[:, None], o_m, o_v, D, left, D)


def vae_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, contiguous; lse (N, S) fp32); q (N, S, D), k and v (N, T, D), fp32, bf16 or fp16.

    The last stride is 1, D a multiple of 8 and at most 512; scale None is 1/sqrt(D).
    """
    n, queries, head_dim = q.shape
    if head_dim <= 128:
        out, lse = self_attention_fwd(q.unsqueeze(2), k.unsqueeze(2), v.unsqueeze(2), scale)
        return out.squeeze(2), lse.squeeze(1)
    out = q.new_empty(q.shape)
    lse = q.new_empty((n, queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    block_d = padded_head_dim(head_dim)
    config = vae_attention_config(head_dim, k.shape[1], q.dtype, target_of(q))
    vae_attention_fwd_kernel[(triton.cdiv(queries, config.block_m), config.parts, n)](
        q, k, v, out, lse, *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], queries, k.shape[1],
        scales_of(head_dim, scale)[1], D=head_dim, BLOCK_D=block_d, CHUNK=config.chunk or block_d,
        VALUE_D=block_d // config.parts, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        MASK_N=k.shape[1] % config.block_n != 0, PRECISION=precision_of(q.dtype), **config.options(),
    )  # fmt: skip
    return out, lse
