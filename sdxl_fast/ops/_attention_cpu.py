# SPDX-License-Identifier: Apache-2.0
"""The ``cpu`` backend of the attention ops: few keys, whose scores fit in the cache (csrc/cpu/attention.cpp)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast.constraints import Condition, LastAtMost, Values
from sdxl_fast.dispatch import Backend
from sdxl_fast.ops import _backends, _native
from sdxl_fast.reference._attention import Gradients, scale_of
from sdxl_fast.reference._common import accumulation_dtype

# Of csrc/cpu/attention_plan.h.
MOST_KEYS, MOST_CHANNELS, MOST_KEY_ELEMENTS = 256, 128, 16384


def _few_keys(values: Values) -> bool:
    tokens = values["k"].shape[1]
    return tokens <= MOST_KEYS and tokens * values["k"].shape[-1] <= MOST_KEY_ELEMENTS


def _layout(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides of samples, tokens and heads; [N,S,D] has one head."""
    strides = t.stride()
    return (strides[0], strides[1], strides[2] if len(strides) == 4 else 0)


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int, int]:
    n, s, *heads, d = q.shape
    return n, s, k.shape[1], heads[0] if heads else 1, d


def _fwd(lib: Any, *, kept: bool) -> Callable[..., Any]:
    function, pointer, tail = lib.attention_fwd_cpu, _native.pointer, _native.cpu_tail

    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, ...]:
        out = torch.empty(q.shape, dtype=q.dtype)
        lse = None
        if kept:
            lse = torch.empty((q.shape[0], *q.shape[2:-1], q.shape[1]), dtype=accumulation_dtype(q.dtype))
        addresses = (q.data_ptr(), k.data_ptr(), v.data_ptr(), out.data_ptr(), pointer(lse))
        strides = (*_layout(q), *_layout(k), *_layout(v))
        status = function(*addresses, *_sizes(q, k), *strides, scale_of(q, scale), _native.DTYPE[q.dtype], tail(q))
        if status:
            _native.fail(lib, status, "attention_fwd_cpu", q, k, v)
        return (out,) if lse is None else (out, lse)

    return fwd


def _bwd(lib: Any) -> Callable[..., Gradients]:
    function, pointer, tail = lib.attention_bwd_cpu, _native.pointer, _native.cpu_tail

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
        dq, dk, dv = found = tuple(
            torch.empty(t.shape, dtype=t.dtype) if need else None for t, need in zip((q, k, v), needs, strict=True)
        )
        given = (dout, q, k, v)
        strides = [stride for t in given for stride in _layout(t)]
        codes = (scale_of(q, scale), _native.DTYPE[q.dtype], tail(q))
        status = function(*map(pointer, (*given, lse, *found)), *_sizes(q, k), *strides, *codes)
        if status:
            _native.fail(lib, status, "attention_bwd_cpu", *given)
        return dq, dk, dv

    return bwd


def _load(device: str) -> _backends.Functions:
    lib = _native.binding(device)
    return _fwd(lib, kept=True), _bwd(lib), _fwd(lib, kept=False)


def backend() -> Backend:
    """The registry's entry for an attention op."""
    few = Condition(
        f"there must be at most {MOST_KEYS} keys, and {MOST_KEY_ELEMENTS} channels of a head in all", _few_keys
    )
    return _backends.native("cpu", "q", _load, LastAtMost("q", MOST_CHANNELS), few)
