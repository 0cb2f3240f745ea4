# SPDX-License-Identifier: Apache-2.0
"""self_attention: out = softmax(scale q k^T) v per head, over tokens of any stride.

Formula   forward  s = scale q k^T, running maximum and sum over blocks of keys, in base 2; lse = log sum exp s, saved.
          backward p = exp(s - lse), dp = dout v^T, ds = p (dp - delta), delta = <dout, out> of a row;
                   dq = scale ds k, dk = scale ds^T q, dv = p^T dout.
Grid      (blocks of rows, heads, N): forward and dq by queries, dk and dv by keys. Neighbours in the first dimension
          share a head, so its K and V (0.25 MB at 1024 tokens) are read from L2.
Registers the tile's rows, the scores against one block of the other side, and the sums (out; dq; dk and dv), fp32.
          No sum crosses programs: no atomics, and the same bits every time.
Bytes     q, k, v read and out written, 2 bytes each, and lse; the backward reads q, k, v, out, dout, writes dq, dk, dv.
          K and V pass through L2 once per block of queries; products are 4 S T D forward and 14 backward (the scores
          are made twice there, which costs less than writing them).
Wrong     for a handful of keys (cross_attention makes one pass), and for heads beyond 128 channels (vae_attention).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from ._attention import LN2, LOG2E, blocks_in_loop, dot, load_rows, precision_of, scales_of, softmax_step, store_rows
from ._attention_config import (
    padded_head_dim,
    self_attention_bwd_config,
    self_attention_fwd_config,
    target_of,
)
from ._math import round_to


@triton.jit
def _fwd_block(
    b_q, c_max, c_sum, b_acc, k_ptr, v_ptr, o_n, o_d, stride_k, stride_v, keys, D, scale_log2,
    MASK_N: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = load_rows(k_ptr, o_n, o_d, stride_k, keys, D, MASK_N, MASK_D)
    b_s = dot(b_q, tl.trans(b_k), None, PRECISION)
    if MASK_N:
        b_s = tl.where((o_n < keys)[None, :], b_s, float("-inf"))
    b_p, c_max, c_sum, b_acc = softmax_step(b_s, c_max, c_sum, b_acc, scale_log2)
    b_v = load_rows(v_ptr, o_n, o_d, stride_v, keys, D, MASK_N, MASK_D)
    b_acc = dot(round_to(b_p, v_ptr.dtype.element_ty), b_v, b_acc, PRECISION)
    return c_max, c_sum, b_acc


@triton.jit
def self_attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, sq_n, sq_s, sq_h, sk_n, sk_s, sk_h, sv_n, sv_s, sv_h, heads, queries, keys,
    scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_h = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    MASK_D: tl.constexpr = D != BLOCK_D
    left = queries - i_m
    k_ptr += i_n * sk_n + i_h * sk_h
    v_ptr += i_n * sv_n + i_h * sv_h
    b_q = load_rows(q_ptr + i_n * sq_n + i_h * sq_h + i_m * sq_s, o_m, o_d, sq_s, left, D, True, MASK_D)
    c_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    c_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    rest = keys
    for _ in range(0, blocks_in_loop(keys, BLOCK_N, TAIL)):
        c_max, c_sum, b_acc = _fwd_block(
            b_q, c_max, c_sum, b_acc, k_ptr, v_ptr, o_n, o_d, sk_s, sv_s, rest, D, scale_log2,
            TAIL == 1, MASK_D, PRECISION,
        )  # fmt: skip
        k_ptr += BLOCK_N * sk_s.to(tl.int64)
        v_ptr += BLOCK_N * sv_s.to(tl.int64)
        rest -= BLOCK_N
    if TAIL == 2:
        c_max, c_sum, b_acc = _fwd_block(
            b_q, c_max, c_sum, b_acc, k_ptr, v_ptr, o_n, o_d, sk_s, sv_s, rest, D, scale_log2, True, MASK_D, PRECISION
        )
    p_out = out_ptr + ((i_n * queries + i_m) * heads + i_h) * D
    store_rows(p_out, b_acc / c_sum[:, None], o_m, o_d, heads * D, left, D)
    p_lse = lse_ptr + (i_n * heads + i_h) * queries + i_m
    tl.store(p_lse + o_m, (c_max + tl.log2(c_sum)) * LN2, mask=o_m < left)


@triton.jit
def _dq_block(
    b_q, b_do, c_lse2, c_delta, b_dq, k_ptr, v_ptr, o_n, o_d, stride_k, stride_v, keys, D, scale_log2,
    MASK_N: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    b_k = load_rows(k_ptr, o_n, o_d, stride_k, keys, D, MASK_N, MASK_D)
    b_v = load_rows(v_ptr, o_n, o_d, stride_v, keys, D, MASK_N, MASK_D)
    b_p = tl.exp2(dot(b_q, tl.trans(b_k), None, PRECISION) * scale_log2 - c_lse2[:, None])
    if MASK_N:
        b_p = tl.where((o_n < keys)[None, :], b_p, 0.0)
    b_ds = b_p * (dot(b_do, tl.trans(b_v), None, PRECISION) - c_delta[:, None])
    return dot(round_to(b_ds, k_ptr.dtype.element_ty), b_k, b_dq, PRECISION)


@triton.jit
def self_attention_bwd_q_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, delta_ptr, dq_ptr,
    so_n, so_s, so_h, sq_n, sq_s, sq_h, sk_n, sk_s, sk_h, sv_n, sv_s, sv_h, heads, queries, keys,
    scale, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """delta of its queries, for the other kernel too, and dq unless there is nowhere to put it."""
    i_m = tl.program_id(0).to(tl.int64) * BLOCK_M
    i_h = tl.program_id(1).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    MASK_D: tl.constexpr = D != BLOCK_D
    left = queries - i_m
    at = (i_n * heads + i_h) * queries + i_m
    rows = ((i_n * queries + i_m) * heads + i_h) * D
    b_do = load_rows(do_ptr + i_n * so_n + i_h * so_h + i_m * so_s, o_m, o_d, so_s, left, D, True, MASK_D)
    b_out = load_rows(out_ptr + rows, o_m, o_d, heads * D, left, D, True, MASK_D)
    c_delta = tl.sum(b_do.to(tl.float32) * b_out.to(tl.float32), 1)
    tl.store(delta_ptr + at + o_m, c_delta, mask=o_m < left)
    if dq_ptr is not None:
        b_q = load_rows(q_ptr + i_n * sq_n + i_h * sq_h + i_m * sq_s, o_m, o_d, sq_s, left, D, True, MASK_D)
        c_lse2 = tl.load(lse_ptr + at + o_m, mask=o_m < left, other=0.0) * LOG2E
        k_ptr += i_n * sk_n + i_h * sk_h
        v_ptr += i_n * sv_n + i_h * sv_h
        b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        rest = keys
        for _ in range(0, blocks_in_loop(keys, BLOCK_N, TAIL)):
            b_dq = _dq_block(
                b_q, b_do, c_lse2, c_delta, b_dq, k_ptr, v_ptr, o_n, o_d, sk_s, sv_s, rest, D, scale_log2,
                TAIL == 1, MASK_D, PRECISION,
            )  # fmt: skip
            k_ptr += BLOCK_N * sk_s.to(tl.int64)
            v_ptr += BLOCK_N * sv_s.to(tl.int64)
            rest -= BLOCK_N
        if TAIL == 2:
            b_dq = _dq_block(
                b_q, b_do, c_lse2, c_delta, b_dq, k_ptr, v_ptr, o_n, o_d, sk_s, sv_s, rest, D, scale_log2,
                True, MASK_D, PRECISION,
            )  # fmt: skip
        store_rows(dq_ptr + rows, b_dq * scale, o_m, o_d, heads * D, left, D)


@triton.jit
def _dkv_block(
    b_k, b_v, b_dk, b_dv, q_ptr, do_ptr, lse_ptr, delta_ptr, o_m, o_d, stride_q, stride_o, queries, D, scale_log2,
    MASK_M: tl.constexpr, MASK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The scores lie as [keys, queries] here, so that both sums multiply from the left."""
    b_q = load_rows(q_ptr, o_m, o_d, stride_q, queries, D, MASK_M, MASK_D)
    b_do = load_rows(do_ptr, o_m, o_d, stride_o, queries, D, MASK_M, MASK_D)
    if MASK_M:
        c_lse = tl.load(lse_ptr + o_m, mask=o_m < queries, other=float("inf"))  # makes p zero there
        c_delta = tl.load(delta_ptr + o_m, mask=o_m < queries, other=0.0)
    else:
        c_lse = tl.load(lse_ptr + o_m)
        c_delta = tl.load(delta_ptr + o_m)
    b_s = dot(b_k, tl.trans(b_q), None, PRECISION)
    b_p = tl.exp2(b_s * scale_log2 - (c_lse * LOG2E)[None, :])
    b_dv = dot(round_to(b_p, do_ptr.dtype.element_ty), b_do, b_dv, PRECISION)
    b_ds = b_p * (dot(b_v, tl.trans(b_do), None, PRECISION) - c_delta[None, :])
    b_dk = dot(round_to(b_ds, q_ptr.dtype.element_ty), b_q, b_dk, PRECISION)
    return b_dk, b_dv


@triton.jit
def self_attention_bwd_kv_kernel(
    do_ptr, q_ptr, k_ptr, v_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    so_n, so_s, so_h, sq_n, sq_s, sq_h, sk_n, sk_s, sk_h, sv_n, sv_s, sv_h, heads, queries, keys, run,
    scale, scale_log2, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    TAIL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of its keys from a run of `run` queries; the results of each run, if there are several, lie apart."""
    i_k = tl.program_id(0).to(tl.int64) * BLOCK_N
    i_h = (tl.program_id(1) % heads).to(tl.int64)
    i_run = (tl.program_id(1) // heads).to(tl.int64)
    i_n = tl.program_id(2).to(tl.int64)
    first = i_run * run
    o_m = tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    MASK_D: tl.constexpr = D != BLOCK_D
    left = keys - i_k
    b_k = load_rows(k_ptr + i_n * sk_n + i_h * sk_h + i_k * sk_s, o_n, o_d, sk_s, left, D, True, MASK_D)
    b_v = load_rows(v_ptr + i_n * sv_n + i_h * sv_h + i_k * sv_s, o_n, o_d, sv_s, left, D, True, MASK_D)
    q_ptr += i_n * sq_n + i_h * sq_h + first * sq_s
    do_ptr += i_n * so_n + i_h * so_h + first * so_s
    lse_ptr += (i_n * heads + i_h) * queries + first
    delta_ptr += (i_n * heads + i_h) * queries + first
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    rest = tl.minimum(queries - first, run).to(tl.int32)
    for _ in range(0, blocks_in_loop(rest, BLOCK_M, TAIL)):
        b_dk, b_dv = _dkv_block(
            b_k, b_v, b_dk, b_dv, q_ptr, do_ptr, lse_ptr, delta_ptr, o_m, o_d, sq_s, so_s, rest, D, scale_log2,
            TAIL == 1, MASK_D, PRECISION,
        )  # fmt: skip
        q_ptr += BLOCK_M * sq_s.to(tl.int64)
        do_ptr += BLOCK_M * so_s.to(tl.int64)
        lse_ptr += BLOCK_M
        delta_ptr += BLOCK_M
        rest -= BLOCK_M
    if TAIL == 2:
        b_dk, b_dv = _dkv_block(
            b_k, b_v, b_dk, b_dv, q_ptr, do_ptr, lse_ptr, delta_ptr, o_m, o_d, sq_s, so_s, rest, D, scale_log2,
            True, MASK_D, PRECISION,
        )  # fmt: skip
    rows = (((i_run * tl.num_programs(2) + i_n) * keys + i_k) * heads + i_h) * D
    if dk_ptr is not None:
        store_rows(dk_ptr + rows, b_dk * scale, o_n, o_d, heads * D, left, D)
    if dv_ptr is not None:
        store_rows(dv_ptr + rows, b_dv, o_n, o_d, heads * D, left, D)


def self_attention_fwd(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out like q, contiguous; lse (N, H, S) fp32); q (N, S, H, D), k and v (N, T, H, D), fp32, bf16 or fp16.

    The last stride is 1, D a multiple of 8 and at most 128; scale None is 1/sqrt(D).
    """
    n, queries, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty((n, heads, queries), dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    config = self_attention_fwd_config(n, heads, queries, head_dim, q.dtype, target_of(q))
    self_attention_fwd_kernel[(triton.cdiv(queries, config.block_m), heads, n)](
        q, k, v, out, lse, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], heads, queries, k.shape[1],
        scales_of(head_dim, scale)[1], D=head_dim, BLOCK_D=padded_head_dim(head_dim), BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, TAIL=config.tail(k.shape[1]), PRECISION=precision_of(q.dtype),
        **config.options(),
    )  # fmt: skip
    return out, lse


# ptxas, left alone, aims for 48 registers on sm_100 when dq is left out, and spills to get there.
_DELTA_ALONE = {"maxnreg": 128}


def _shared(
    dout: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[tuple[int, ...], dict[str, Any]]:
    """The arguments that both kernels of the backward take: strides and sizes, and the constants."""
    strides = (
        *dout.stride()[:3],
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        q.shape[2],
        q.shape[1],
        k.shape[1],
    )
    head_dim = q.shape[3]
    return strides, {"D": head_dim, "BLOCK_D": padded_head_dim(head_dim), "PRECISION": precision_of(q.dtype)}


def backward_of_queries(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    dq: torch.Tensor | None,
    scale: float | None,
) -> torch.Tensor:
    """Fills dq, if it is given, and returns delta (N, H, S), which the other half needs."""
    n, queries, heads, head_dim = q.shape
    delta = torch.empty_like(lse)
    sizes, constants = _shared(dout, q, k, v)
    config = self_attention_bwd_config(n, heads, queries, head_dim, q.dtype, target_of(q))
    self_attention_bwd_q_kernel[(triton.cdiv(queries, config.block_m), heads, n)](
        dout, q, k, v, out, lse, delta, dq, *sizes, *scales_of(head_dim, scale), **constants,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, TAIL=config.tail(k.shape[1]),
        **config.options() | ({} if dq is not None else _DELTA_ALONE),
    )  # fmt: skip
    return delta


def backward_of_keys(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lse: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor | None,
    dv: torch.Tensor | None,
    scale: float | None,
    *,
    runs: int = 1,
) -> None:
    """Fills dk and dv (N, T, H, D), those that are given; (runs, N, T, H, D), to be added, for several runs."""
    n, queries, heads, head_dim = q.shape
    sizes, constants = _shared(dout, q, k, v)
    config = self_attention_bwd_config(n, heads * runs, k.shape[1], head_dim, q.dtype, target_of(q))
    run = triton.cdiv(triton.cdiv(queries, config.block_n), runs) * config.block_n
    self_attention_bwd_kv_kernel[(triton.cdiv(k.shape[1], config.block_m), heads * runs, n)](
        dout, q, k, v, lse, delta, dk, dv, *sizes, run, *scales_of(head_dim, scale), **constants,
        BLOCK_M=config.block_n, BLOCK_N=config.block_m, TAIL=config.tail(queries), **config.options(),
    )  # fmt: skip


def self_attention_bwd(
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
    dq, dk, dv = (t.new_empty(t.shape) if need else None for t, need in zip((q, k, v), needs, strict=True))
    if q.numel() == 0:
        return dq, *(None if t is None else t.zero_() for t in (dk, dv))  # type: ignore[return-value]
    delta = backward_of_queries(dout, q, k, v, out, lse, dq, scale)
    if dk is not None or dv is not None:
        backward_of_keys(dout, q, k, v, lse, delta, dk, dv, scale)
    return dq, dk, dv
