# SPDX-License-Identifier: Apache-2.0
"""The ``library`` backend of the attention ops: the fused kernels behind PyTorch's scaled_dot_product_attention.

They are called below autograd, as ``aten`` ops, because the contract of this package wants the log-sum-exp: it is what
the backward starts from, and ``scaled_dot_product_attention`` itself keeps it to its own graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sdxl_fast.constraints import Condition, LastMultiple, Rule, Values
from sdxl_fast.dispatch import Backend
from sdxl_fast.reference._attention import Gradients, Pair, scale_of

_aten = torch.ops.aten
# The flash kernels of CUDA know 16-bit floats up to this head dimension; the memory-efficient ones do the rest.
_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_HEAD_DIM = 256
# Queries the memory-efficient kernels pad their log-sum-exp to.
_EFFICIENT_ROWS = 32


@dataclass(frozen=True)
class Upcast:
    """Where PyTorch's CPU kernel is faster on float32 copies of its operands than on 16-bit ones.

    Attributes:
        dtype: of the operands.
        forward, backward: which pass.
        most_keys: up to how many keys, None for any number.
        most_head_dim: up to which head dimension.
    """

    dtype: torch.dtype
    forward: bool
    backward: bool
    most_keys: int | None = None
    most_head_dim: int | None = None


# Measured on one core of a Zen 4 EPYC, torch 2.13, best of many in turn: milliseconds on 16-bit operands | on float32
# copies of them, conversions included, for N*H heads of S queries and S keys with N*H*S = 4096:
#                          S=16         S=64         S=256       S=1024       S=4096
#   bfloat16 backward D=24  21 | 2.1    11 | 2.5    41 | 35    117 | 120    272 | 334
#                     D=64  19 | 2.6     9 | 13     66 | 58    157 | 178    483 | 543
#   float16  forward  D=64 2.7 | 1.3    14 | 2.0    48 | 14     93 | 60     352 | 233
#            backward D=64  27 | 2.8    97 | 17    396 | 45   1511 | 153   5321 | 451
# bfloat16 forward: within 10 % of each other. D=512, S=256, 4 heads, bfloat16 backward: 20 | 36. 77 keys, D=64, S=4096,
# bfloat16 backward: 6.6 | 3.6. The 16-bit backward has a cost per head, which many short sequences multiply, and that
# CPU has no float16 products. Against plain matrix products in float32 the kernel on copies wins at every length.
UPCASTS = (
    Upcast(torch.float16, forward=True, backward=True),
    Upcast(torch.bfloat16, forward=False, backward=True, most_keys=256, most_head_dim=128),
)


def upcasts(k: torch.Tensor, *, backward: bool) -> bool:
    """Returns whether the CPU kernel gets float32 copies; k is [N,T,H,D]."""
    return any(
        row.dtype == k.dtype
        and (row.backward if backward else row.forward)
        and (row.most_keys is None or k.shape[1] <= row.most_keys)
        and (row.most_head_dim is None or k.shape[-1] <= row.most_head_dim)
        for row in UPCASTS
    )


def _cpu_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Pair:
    dtype = torch.float32 if upcasts(k, backward=False) else q.dtype
    heads_first = (t.to(dtype).transpose(1, 2) for t in (q, k, v))
    out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(*heads_first, 0.0, False, scale=scale)
    return out.transpose(1, 2).to(q.dtype).contiguous(), lse.contiguous()


def _cpu_bwd(tensors: Sequence[torch.Tensor], lse: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    """``tensors``: dout, q, k, v, out; returns the gradients with the heads first."""
    dtype = torch.float32 if upcasts(tensors[2], backward=True) else tensors[1].dtype
    heads_first = (t.to(dtype).transpose(1, 2) for t in tensors)
    found: tuple[torch.Tensor, ...] = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
        *heads_first, lse, 0.0, False, scale=scale
    )
    return found


def _flash(q: torch.Tensor) -> bool:
    return q.dtype in _FLASH_DTYPES and q.shape[-1] <= _FLASH_HEAD_DIM


def _cuda_fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> Pair:
    heads_first = [t.transpose(1, 2) for t in (q, k, v)]
    if _flash(q):
        out, lse, *_ = _aten._scaled_dot_product_flash_attention(*heads_first, 0.0, False, False, scale=scale)
    else:
        out, lse, *_ = _aten._scaled_dot_product_efficient_attention(*heads_first, None, True, 0.0, False, scale=scale)
    return out.transpose(1, 2).contiguous(), lse[..., : q.shape[1]].contiguous()


def _cuda_bwd(tensors: Sequence[torch.Tensor], lse: torch.Tensor, scale: float) -> tuple[torch.Tensor, ...]:
    dout, q, k, v, out = (t.transpose(1, 2) for t in tensors)
    state = torch.empty((), dtype=torch.int64, device=q.device)  # of the dropout, which there is none of
    if _flash(q):
        found: tuple[torch.Tensor, ...] = _aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, False, state, state, scale=scale
        )
        return found
    lse = torch.nn.functional.pad(lse, (0, -lse.shape[-1] % _EFFICIENT_ROWS))
    mask = [True, True, True, False]
    *found_with_bias, _ = _aten._scaled_dot_product_efficient_attention_backward(
        dout, q, k, v, None, out, lse, state, state, 0.0, mask, False, scale=scale
    )
    return tuple(found_with_bias)


def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> Pair:
    """Raw forward on q [N,S,H,D], k and v [N,T,H,D] with the last stride 1: out like q, contiguous, and lse [N,H,S]."""
    if q.numel() == 0:
        return _nothing(q)
    run = _cpu_fwd if q.device.type == "cpu" else _cuda_fwd
    return run(q, k, v, scale_of(q, scale))


def bwd(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float | None,
    needs: Sequence[bool],
) -> Gradients:
    """Raw backward: (dq, dk, dv) contiguous, None where not needed; the kernels compute all three regardless."""
    if q.numel() == 0:
        dq, dk, dv = (torch.zeros_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    else:
        run = _cpu_bwd if q.device.type == "cpu" else _cuda_bwd
        found = run((dout, q, k, v, out), lse, scale_of(q, scale))
        dq, dk, dv = (t.transpose(1, 2).to(q.dtype).contiguous() for t in found)
    return dq if needs[0] else None, dk if needs[1] else None, dv if needs[2] else None


def _nothing(q: torch.Tensor) -> Pair:
    lse = q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.promote_types(q.dtype, torch.float32))
    return q.new_empty(q.shape), lse


def _on_cpu_or_cuda(values: Values) -> bool:
    return values["q"].device.type in ("cpu", "cuda")


def _double_on_cpu(values: Values) -> bool:
    return values["q"].dtype != torch.float64 or values["q"].device.type == "cpu"


def _aligned_on_cuda(values: Values) -> bool:
    return values["q"].device.type == "cpu" or LastMultiple("q", 8).check(values) is None


RULES: tuple[Rule, ...] = (
    Condition("q must be a cpu or cuda tensor", _on_cpu_or_cuda),
    Condition("q must be float32, bfloat16 or float16 on cuda", _double_on_cpu),
    Condition("the last dimension of q must be a multiple of 8 on cuda", _aligned_on_cuda),
)


def backend(kernels: tuple[Any, Any] = (fwd, bwd)) -> Backend:
    """The registry's entry for an attention op."""
    return Backend("library", lambda: kernels, RULES)
