# SPDX-License-Identifier: Apache-2.0
"""Tensors that end where readable memory does: reading or writing past them is a segmentation fault."""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch

_NO_ACCESS = 0


def fenced(t: torch.Tensor) -> torch.Tensor:
    """Returns a copy of t, of the same strides, whose last byte is the last of a page before a closed one.

    t itself is returned if it is not on the CPU, has no elements or has gaps between them, and where the system is not
    Linux.
    """
    size = t.numel() * t.element_size()
    if not sys.platform.startswith("linux") or not t.is_cpu or not size or not _is_dense(t):
        return t
    page = mmap.PAGESIZE
    pages = -(-size // page)
    memory = mmap.mmap(-1, (pages + 1) * page)
    closed = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages * page
    if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(closed), ctypes.c_size_t(page), _NO_ACCESS):
        raise OSError(ctypes.get_errno(), "mprotect")
    flat = torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages * page - size)
    return flat.as_strided(t.shape, t.stride()).copy_(t.detach())


def _is_dense(t: torch.Tensor) -> bool:
    span = 1 + sum((length - 1) * stride for length, stride in zip(t.shape, t.stride(), strict=True))
    return span == t.numel()
