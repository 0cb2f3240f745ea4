# SPDX-License-Identifier: Apache-2.0
"""Where the time of a picture goes: ``python -m benchmarks.e2e.profile``.

UNet and decoder, each after a call that sets libraries up, under PyTorch's profiler, by kind of work. Products of
matrices, convolutions and attention have their multiply-adds beside them, counted on the stock modules, and so the rate
that they run at; what upsampling before a convolution spares is taken off. On a GPU the times are those of kernels,
without CUDA graphs; on a CPU those of operations in the thread that calls them.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import command, machine, report
from benchmarks.e2e import bench_one_step, floor
from benchmarks.e2e.bench_one_step import Request
from benchmarks.e2e.random_model import RANDOM_SDXL
from benchmarks.timing import clock_for
from sdxl_fast import OneStepPipeline, ops
from sdxl_fast.inference.accelerated import runner_of
from sdxl_fast.ops._kept import KeptWeight

KINDS: dict[str, tuple[str, ...]] = {
    "attention": ("attention", "flash", "fmha", "sdpa"),
    "norms": ("group_norm", "layer_norm"),
    "convolutions": ("conv", "implicit", "fprop"),
    "products": ("addmm", "aten::mm", "linear", "gemm", "cutlass", "nvjet"),
    "gates": ("geglu", "gelu"),
    "copies": ("copy", "cat", "memcpy", "contiguous"),
}
"""Words in the names of operations and kernels, the first kind that fits; everything else is "other"."""
STAGES = ("unet", "vae")
_WHOLE = "whole call"


@dataclass
class Part:
    """One kind of work of a network: seconds, calls, and the multiply-adds counted twice."""

    seconds: float = 0.0
    calls: int = 0
    flops: float = 0.0


def kind_of(name: str) -> str:
    """The kind of work that an operation or kernel of this name does."""
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), "other")


@contextmanager
def named_operations() -> Iterator[None]:
    """This package's operations are seen by the profiler: those in C++ are called past PyTorch's dispatcher."""
    kept = ("linear", "conv2d", "upsample_conv2d")
    places = [*((ops, name) for name in ops.__all__), *((KeptWeight, name) for name in kept)]
    originals = [(owner, name, getattr(owner, name)) for owner, name in places]
    for owner, name, call in originals:
        setattr(owner, name, _named(name, call))
    try:
        yield
    finally:
        for owner, name, call in originals:
            setattr(owner, name, call)


def _named(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(f"sdxl_fast::{name}"):
            return call(*args, **kwargs)

    return named


def profiled(call: Callable[[], Any], device: str) -> dict[str, Part]:
    """Seconds and calls of the second call by kind; "all" is the wall clock with the GPU waited for."""
    cuda = device == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    wait = torch.cuda.synchronize if cuda else lambda: None
    call()
    wait()
    with named_operations(), profile(activities=activities) as found, record_function(_WHOLE):
        call()
        wait()
    parts: dict[str, Part] = {}
    for event in found.key_averages():
        if event.key == _WHOLE:
            parts["all"] = Part(event.cpu_time_total / 1e6, 1)
        own = event.self_device_time_total if cuda else event.self_cpu_time_total
        if own > 0 and event.key != _WHOLE and (not cuda or event.device_type.name == "CUDA"):
            part = parts.setdefault(kind_of(event.key), Part())
            part.seconds, part.calls = part.seconds + own / 1e6, part.calls + event.count
    return parts


def stages(pipe: OneStepPipeline, batch: int, flops: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, Part]]:
    """The parts of UNet and decoder."""
    found = {}
    calls = bench_one_step.stage_calls(pipe, batch)
    for name in STAGES:
        runner = runner_of(getattr(pipe, name))
        if runner is not None:
            runner.graphs = None
        found[name] = profiled(calls[name], pipe.device.type)
        for kind, count in flops[name].items():
            found[name].setdefault(kind, Part()).flops = count
    return found


def table(name: str, parts: Mapping[str, Part], ceiling: float | None) -> str:
    """Markdown: each kind's share of the wall clock, and the rate of those that multiply."""
    whole = parts["all"].seconds
    head = ["| work | time | share | calls | rate | of the machine's |", "|---|---:|---:|---:|---:|---:|"]
    lines = [f"## {name}, {report.seconds_text(whole)}", "", *head]
    kinds = sorted((kind for kind in parts if kind != "all"), key=lambda kind: -parts[kind].seconds)
    for kind in kinds:
        part = parts[kind]
        rate = part.flops / part.seconds if part.seconds else 0.0
        rates = [f"{rate / 1e12:.3g} TFLOP/s", f"{rate / ceiling:.0%}" if ceiling else "–"] if rate else ["–", "–"]
        cells = [kind, report.seconds_text(part.seconds), f"{part.seconds / whole:.1%}", str(part.calls), *rates]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Prints the tables, and writes them with ``--out``."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.e2e.profile", "Say where the time of a picture goes.", compile=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"folder, hub id or file; {RANDOM_SDXL}: SDXL with random weights")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    machine.restart_with_warm_allocator("benchmarks.e2e.profile", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    dtype = arguments.dtype or ("bfloat16" if arguments.device == "cuda" else "float32")
    clock = clock_for(arguments.device, quick=arguments.quick)
    results = command.start(None, arguments.device, clock, quick=arguments.quick)
    ceiling = results.data["ceilings"]["matrix_flops_per_s"].get(dtype)
    pipe = bench_one_step.load(Request(arguments.model, dtype, arguments.batch), arguments.device)
    side, tokens = pipe.default_size, pipe.tokenizer.model_max_length
    flops = floor.by_kind(pipe.unet.config, pipe.vae.config, arguments.batch, (side, side), tokens)
    name = "embedded pipeline" if arguments.model is None else Path(arguments.model).name
    facts = command.describe(results.data["machine"])
    pages = [f"# Where the time goes: {name}, batch {arguments.batch}, {pipe.default_size} px, {dtype}", facts]
    pages += [table(stage, parts, ceiling) for stage, parts in stages(pipe, arguments.batch, flops).items()]
    pages.append("Written by `python -m benchmarks.e2e.profile`.")
    text = "\n\n".join(pages) + "\n"
    print(text)
    if arguments.out is not None:
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = f"{machine.slug(results.data['machine'])}_profile-{name.replace(' ', '-')}.md"
        (arguments.out / file).write_text(text)


if __name__ == "__main__":
    main()
