# SPDX-License-Identifier: Apache-2.0
"""The ``cpu`` backend of the attention ops: few keys, whose scores are held, or many that are streamed.

The kernels are csrc/cpu/attention.cpp and csrc/cpu/streamed_attention.cpp, of which the latter is a forward alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast.constraints import Condition, Values
from sdxl_fast.dispatch import Backend
from sdxl_fast.ops import _backends, _native, _sdpa
from sdxl_fast.reference._attention import Gradients, scale_of
from sdxl_fast.reference._common import accumulation_dtype

Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, "float | None"], tuple[torch.Tensor, ...]]

# Of csrc/cpu/attention_plan.h.
MOST_KEYS, MOST_CHANNELS, MOST_KEY_ELEMENTS = 256, 128, 16384
MOST_STREAMED_CHANNELS = 512
# The vector path that multiplies bfloat16 in pairs.
_PAIRS = "avx512_bf16"
# From so many keys on they are streamed where bfloat16 is multiplied in pairs. 2 Zen 4 cores, 2026-11-22, ms streamed,
# held and PyTorch's: 16 keys of 24 channels 0.37, 0.17, 0.60; 64 of 96 0.022, 0.029, 0.047; 77 of 64 2.3, 2.7, 4.6;
# 256 of 64 1.1, 2.0, 2.5. Many keys, streamed and PyTorch's: 4096 of 10 heads of 64 bfloat16 134 and 280, float32 236
# and 272; 16,384 of 512 bfloat16 1,382 and 2,961.
_STREAMED_PAIRS = 64


def _few_keys(k: torch.Tensor) -> bool:
    tokens, channels = k.shape[1], k.shape[-1]
    return tokens <= MOST_KEYS and channels <= MOST_CHANNELS and tokens * channels <= MOST_KEY_ELEMENTS


def _fits(values: Values) -> bool:
    k = values["k"]
    if _few_keys(k):
        return True
    streamed = k.dtype != torch.float64 and k.shape[-1] <= MOST_STREAMED_CHANNELS
    return streamed and _native.binding("cpu").cpu_isa().startswith("avx512")


def _layout(t: torch.Tensor) -> tuple[int, int, int]:
    """Strides of samples, tokens and heads; [N,S,D] has one head."""
    strides = t.stride()
    return (strides[0], strides[1], strides[2] if len(strides) == 4 else 0)


def _sizes(q: torch.Tensor, k: torch.Tensor) -> tuple[int, int, int, int, int]:
    n, s, *heads, d = q.shape
    return n, s, k.shape[1], heads[0] if heads else 1, d


def _run(
    lib: Any,
    name: str,
    tensors: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float | None,
    *workspace: int,
    kept: bool,
) -> tuple[torch.Tensor, ...]:
    """Calls a forward of the library on q, k and v; returns the result and, if it is ``kept``, the log-sum-exp."""
    q, k, v = tensors
    out, lse = torch.empty(q.shape, dtype=q.dtype), None
    if kept:
        lse = torch.empty((q.shape[0], *q.shape[2:-1], q.shape[1]), dtype=accumulation_dtype(q.dtype))
    addresses = (*map(_native.pointer, (q, k, v, out, lse)), *workspace)
    strides = (*_layout(q), *_layout(k), *_layout(v))
    codes = (scale_of(q, scale), _native.DTYPE[q.dtype], _native.cpu_tail(q))
    status = getattr(lib, name)(*addresses, *_sizes(q, k), *strides, *codes)
    if status:
        _native.fail(lib, status, name, q, k, v)
    return (out,) if lse is None else (out, lse)


def _held(lib: Any, *, kept: bool) -> Forward:
    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, ...]:
        return _run(lib, "attention_fwd_cpu", (q, k, v), scale, kept=kept)

    return fwd


def streamed(lib: Any, *, kept: bool) -> Forward:
    """Returns the forward for any number of keys, with the log-sum-exp if it is ``kept``."""

    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, ...]:
        size = lib.streamed_attention_workspace_cpu(*_sizes(q, k), _native.DTYPE[q.dtype])
        memory = _native.scratch(size, q)  # held until the call has been made
        return _run(lib, "streamed_attention_fwd_cpu", (q, k, v), scale, _native.pointer(memory), kept=kept)

    return fwd


def _fwd(lib: Any, *, kept: bool) -> Forward:
    held, stream, pairs = _held(lib, kept=kept), streamed(lib, kept=kept), lib.cpu_isa() == _PAIRS

    def fwd(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> tuple[torch.Tensor, ...]:
        in_pairs = pairs and k.dtype == torch.bfloat16 and k.shape[1] >= _STREAMED_PAIRS
        return (held if _few_keys(k) and not in_pairs else stream)(q, k, v, scale)

    return fwd


def _bwd(lib: Any, many: Callable[..., Gradients]) -> Callable[..., Gradients]:
    """The backward; ``many`` is that of many keys."""
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
        if not _few_keys(k):
            return many(dout, q, k, v, out, lse, scale, needs)
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


def backend(many: Callable[..., Gradients] = _sdpa.bwd) -> Backend:
    """Few keys, forward and backward, and the forward of many; ``many`` is the backward of those."""

    def load(device: str) -> _backends.Functions:
        lib = _native.binding(device)
        return _fwd(lib, kept=True), _bwd(lib, many), _fwd(lib, kept=False)

    fits = Condition(
        f"there must be at most {MOST_KEYS} keys of at most {MOST_CHANNELS} channels, {MOST_KEY_ELEMENTS} channels in "
        f"all; or, with AVX-512 and not in float64, any number of at most {MOST_STREAMED_CHANNELS} channels",
        _fits,
    )
    return _backends.native("cpu", "q", load, fits)
