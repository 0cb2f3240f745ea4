# SPDX-License-Identifier: Apache-2.0
"""Everything about whole pipelines in one run: ``python -m benchmarks.e2e``.

Whole calls of diffusers, compiled, and this package's pipelines at several batches and sizes, then from process start
to the first picture. On a GPU that is SDXL's true configuration with random weights, in bfloat16 and float8; on a CPU
the embedded pipeline, and SDXL at 1024 px with ``--true-width``. The results file is whole after every row, page and
plot are written at the end, and ``--resume FILE`` goes on with what is missing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import command, machine, report
from benchmarks.build import build_and_restart
from benchmarks.e2e import bench_cold_start, bench_one_step, bench_pipelines, peers
from benchmarks.e2e.bench_pipelines import Request, default_dtype, parse_size
from benchmarks.e2e.random_model import RANDOM_SDXL
from benchmarks.results import ResultsFile
from benchmarks.timing import clock_for

BATCHES = {"cpu": (1, 8), "cuda": (1, 2, 4, 8)}
GPU_SIZES = ((512, 512), (768, 768), (1216, 832))
"""Beside the native one, one picture each."""
COMPILE = ("none", "first", "all")


def requests(arguments: argparse.Namespace) -> list[Request]:
    """Returns what to time, the most valuable first."""
    cuda = arguments.device == "cuda"
    model = arguments.model or (RANDOM_SDXL if cuda else None)
    dtype = arguments.dtype or default_dtype(arguments.device)
    compile = arguments.compile_peer or ("first" if cuda else "all")
    batches = arguments.batch or ((1,) if arguments.quick else BATCHES[arguments.device])
    # SDXL's own size has its name in the row, as the sizes beside it have
    native = (1024, 1024) if model == RANDOM_SDXL else None
    pairs = [(size, batch) for size in arguments.size or [native] for batch in batches]
    if cuda and not (arguments.size or arguments.quick):
        pairs += [(size, 1) for size in GPU_SIZES]
    return [
        Request(
            model,
            dtype,
            batch,
            compile == "all" or (compile == "first" and index == 0),
            rounds=3 if arguments.quick else arguments.rounds,
            budget_s=2.0 if arguments.quick else 30.0,
            size=size,
            float8=cuda and dtype == "bfloat16",
            third_parties=cuda and index == 0,
        )
        for index, (size, batch) in enumerate(pairs)
    ]


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = command.parser(
        "benchmarks.e2e",
        "Time whole pipelines, warm and from a cold start.",
        compile=False,
        out=Path("benchmarks/results"),
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"folder or hub id; default: {RANDOM_SDXL} on a GPU, else the embedded one")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default: 1 8, on a GPU 1 2 4 8")
    parser.add_argument("--size", type=parse_size, action="append", help="side or HEIGHTxWIDTH; may be repeated")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument(
        "--compile",
        dest="compile_peer",
        choices=COMPILE,
        help="where torch.compile takes part, minutes each for SDXL; default: all, on a GPU first",
    )
    parser.add_argument("--true-width", action="store_true", help="SDXL itself on a CPU too: half an hour, 20 GB")
    parser.add_argument("--no-cold-start", action="store_true", help="leave out the runs from a process's start")
    parser.add_argument("--skip-build", action="store_true", help="GPU: use the native library as it is")
    parser.add_argument("--resume", type=Path, metavar="FILE.json", help="measure what that file lacks")
    found = parser.parse_args(given)
    command.check(parser, found)
    if found.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA GPU here")
    if any(batch < 1 for batch in found.batch or ()):
        parser.error("--batch must be at least 1")
    return found


def _true_width(arguments: argparse.Namespace, results: ResultsFile) -> None:
    """SDXL at 1024 px on a CPU: each in a process of its own for memory, then stock and packed on the same weights."""
    # In this order, as this process gives no memory back: warm memory is what it asks its allocator for.
    cold = bench_cold_start.Request(RANDOM_SDXL, "bfloat16", rounds=1, threads=arguments.threads)
    bench_cold_start.run([cold], "cpu", results)
    clock = clock_for("cpu", quick=arguments.quick)
    request = bench_one_step.Request(RANDOM_SDXL, "bfloat16", rounds=3)
    bench_one_step.run([request], "cpu", clock, results)


def main(argv: Sequence[str] | None = None) -> None:
    """Times whole pipelines; exit status 1 when a picture was wrong."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(given)
    machine.restart_with_warm_allocator("benchmarks.e2e", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    peers.quiet()
    if arguments.device == "cuda" and not arguments.skip_build:
        build_and_restart("benchmarks.e2e", given)
    clock = clock_for(arguments.device, quick=arguments.quick)
    if arguments.resume:
        results = ResultsFile.load(arguments.resume)
        results.set("complete", False)
    else:
        name = "e2e_quick" if arguments.quick else "e2e"
        results = command.start(arguments.out, arguments.device, clock, quick=arguments.quick, name=name)
    listed = requests(arguments)
    try:
        bench_pipelines.run(listed, arguments.device, results)
        if not arguments.no_cold_start:
            first = listed[0]
            rounds = 1 if arguments.quick else 3
            compile = first.compile and not arguments.quick
            cold = bench_cold_start.Request(first.model, first.dtype, compile, rounds, arguments.threads)
            bench_cold_start.run([cold], arguments.device, results)
        if arguments.true_width and arguments.device == "cpu":
            _true_width(arguments, results)
    except BaseException:
        report.write(results)  # what an interrupted run has measured is worth its page
        raise
    raise SystemExit(command.finish(results))


if __name__ == "__main__":
    main()
