"""Benchmark one operation at one shape on this machine: every backend that can run it, and stock PyTorch.

python -m sdxl_fast.examples.bench_one_op --shape 1 320 128 128 --dtype bfloat16

The suite in `benchmarks/` of a checkout does this for all operations, against more peers, behind a correctness gate.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch.utils.benchmark import Timer

from sdxl_fast import explain, ops, use_backend
from sdxl_fast.dispatch import available_backends

GROUPS, EPS = 32, 1e-5


def stock(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """What the operation replaces."""
    return F.silu(F.group_norm(x, GROUPS, weight, bias, EPS))


def fused(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """The operation: on a CPU, `explain` says which backend it would take and why not the others."""
    return ops.group_norm_silu(x, weight, bias, num_groups=GROUPS, eps=EPS, activation="silu")


def seconds(call: Callable[..., torch.Tensor], arguments: Sequence[torch.Tensor], min_time: float) -> float:
    """Median seconds of a call; on a GPU with the device waited for."""
    timer = Timer(
        "call(*arguments)", globals={"call": call, "arguments": arguments}, num_threads=torch.get_num_threads()
    )
    return float(timer.blocked_autorange(min_run_time=min_time).median)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Prints the median time and the largest error of every way; returns the times [s] by name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--shape", type=int, nargs=4, default=(1, 320, 128, 128), metavar=("N", "C", "H", "W"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--min-time", type=float, default=0.5, help="seconds to measure each for")
    given = parser.parse_args(argv)
    if given.shape[1] % GROUPS:
        parser.error(f"C is {given.shape[1]}; it must be a multiple of {GROUPS}")
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    x = torch.randn(*given.shape, device=given.device).to(dtype).contiguous(memory_format=torch.channels_last)
    arguments = [x, *(torch.randn(given.shape[1], device=given.device).to(dtype) for _ in range(2))]
    exact = stock(*(t.double() for t in arguments))
    print(explain("group_norm_silu", *arguments, num_groups=GROUPS, eps=EPS, activation="silu"))
    times = {"stock PyTorch": _report("stock PyTorch", stock, arguments, exact, given.min_time)}
    for name, why_not in available_backends()["group_norm_silu"].items():
        if why_not is not None:
            print(f"{name:14s} not here: {why_not}")
            continue
        with use_backend(name):
            try:
                times[name] = _report(name, fused, arguments, exact, given.min_time)
            except Exception as reason:  # unsupported, or whatever a compiler of kernels raises
                print(f"{name:14s} not for this call: {reason}")
    return times


def _report(
    name: str,
    call: Callable[..., torch.Tensor],
    arguments: Sequence[torch.Tensor],
    exact: torch.Tensor,
    min_time: float,
) -> float:
    with torch.no_grad():
        error = float((call(*arguments).double() - exact).abs().max())
        found = seconds(call, arguments, min_time)
    print(f"{name:14s} {found * 1e6:10.1f} us   largest error {error:.2g}")
    return found


if __name__ == "__main__":
    main()
