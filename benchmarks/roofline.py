# SPDX-License-Identifier: Apache-2.0
"""The machine's own ceilings, measured in the same run and on the same threads as what is compared with them."""

from __future__ import annotations

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.timing import Call, Clock, Timed, clock_for, interleave

MIB = 1 << 20


@dataclass(frozen=True)
class Copy:
    """The machine's fastest way to copy, which takes its turn beside the contestants of every row.

    Attributes:
        bytes: read plus written by a call.
        timed: the call.
    """

    bytes: int
    timed: Timed


def fastest_copy(device: str, *, quick: bool = False) -> Copy:
    """Returns the way of copying that is fastest now; ``quick`` copies little, to try the code out."""
    size, clock = _copy_size(device, quick), clock_for(device, quick=True)  # one copy is a sample long enough
    timed = {name: clock.prepare([call]) for name, call in _copies(device, size).items()}
    samples = interleave(timed, rounds=3)
    return Copy(2 * size, timed[min(samples, key=lambda name: min(samples[name]))])


def _copy_size(device: str, quick: bool) -> int:
    size = (4 if quick else 256) * MIB
    if device == "cuda" and not quick:
        free, _ = torch.cuda.mem_get_info()
        size = min(1024 * MIB, free // 8)
    return size


def _copies(device: str, size: int) -> dict[str, Call]:
    """Ways to copy ``size`` bytes; the fastest is the ceiling."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    ways: dict[str, Call] = {"torch": lambda: target.copy_(source)}
    if device == "cpu":
        # The C library's copy uses streaming stores, which save reading the target first; ctypes lets go of the GIL.
        threads = torch.get_num_threads()
        part = size // threads
        pool = ThreadPoolExecutor(threads)
        at_target, at_source = target.data_ptr(), source.data_ptr()

        def copy_part(i: int) -> None:
            ctypes.memmove(at_target + i * part, at_source + i * part, part)

        ways["memmove"] = lambda: list(pool.map(copy_part, range(threads)))
        ways["memmove"]()
        if not torch.equal(source[: part * threads], target[: part * threads]):
            raise RuntimeError("the threaded copy did not copy")
    return ways


def _products(device: str, quick: bool) -> dict[str, tuple[int, Call]]:
    """Square matrix products by dtype: operations and call. Random operands: zeros run faster than data does."""
    sides = (
        {"bfloat16": 8192, "float16": 8192, "float32": 4096}
        if device == "cuda"
        else dict.fromkeys(("float32", "bfloat16"), 1024)
    )
    found: dict[str, tuple[int, Call]] = {}
    for dtype, side in sides.items():
        side = side // 8 if quick else side
        a, b = (torch.randn(side, side, device=device, dtype=getattr(torch, dtype)) for _ in range(2))
        found[dtype] = (2 * side**3, functools.partial(torch.matmul, a, b))
    return found


def measure(device: str, clock: Clock, *, quick: bool = False) -> dict[str, Any]:
    """Measures copy bandwidth and matrix rates.

    Args:
        device: "cpu" or "cuda".
        clock: how to time.
        quick: small sizes, to try the code out; such a ceiling means nothing.

    Returns:
        ``copy_bytes_per_s`` (bytes read plus bytes written, the fastest way to copy), ``copies`` (each way),
        ``copy_size`` (bytes), ``matrix_flops_per_s`` by dtype. Each is the best of its samples: what disturbs a
        ceiling lowers it, and would flatter whatever is compared with it.
    """
    size = _copy_size(device, quick)
    rounds = 3 if quick else 9
    timed = {name: clock.prepare([call]) for name, call in _copies(device, size).items()}
    copies = {name: 2 * size / min(s) for name, s in interleave(timed, rounds=rounds).items()}
    timed.clear()
    rates = {}
    for dtype, (operations, call) in _products(device, quick).items():
        samples = interleave({dtype: clock.prepare([call])}, rounds=rounds, budget_s=5)[dtype]
        rates[dtype] = operations / min(samples)
    return {
        "copy_bytes_per_s": max(copies.values()),
        "copies": copies,
        "copy_size": size,
        "matrix_flops_per_s": rates,
    }
