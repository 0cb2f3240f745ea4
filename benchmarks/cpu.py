# SPDX-License-Identifier: Apache-2.0
"""Every CPU benchmark in one run, 13 minutes on two cores: ``python -m benchmarks.cpu --out benchmarks/results``.

The machine should have nothing else to do: another process on the same cores slows both by up to a hundred times.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import command, machine, training
from benchmarks.e2e import bench_fuse
from benchmarks.e2e.bench_one_step import Request, run
from benchmarks.ops import benches
from benchmarks.suite import works
from benchmarks.timing import clock_for


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all, writing the file as it goes; exit status 1 for a failed gate."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.cpu", "All CPU benchmarks.")
    parser.add_argument("--model", help="for one-step generation; default: the embedded pipeline")
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    machine.restart_with_warm_allocator("benchmarks.cpu", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    options = command.options_of(arguments, "cpu")
    clock = clock_for("cpu", quick=arguments.quick)
    out = arguments.out or Path("benchmarks/results")
    results = command.start(out, "cpu", clock, quick=arguments.quick)
    for bench in benches():
        command.run_rows(works(bench, bench.cases("cpu", quick=arguments.quick)), options, clock, results)
    request = Request(arguments.model, "float32", rounds=options.rounds, budget_s=4 * options.budget_s)
    run([request], "cpu", clock, results)
    bench_fuse.run([bench_fuse.Request(arguments.model, n, options.rounds) for n in bench_fuse.BATCHES], results)
    lengths = training.QUICK if arguments.quick else {}
    training.write(results, training.measure(threads=arguments.threads, **lengths, compiled=arguments.compile))
    raise SystemExit(command.finish(results))


if __name__ == "__main__":
    main()
