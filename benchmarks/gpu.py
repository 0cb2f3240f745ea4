# SPDX-License-Identifier: Apache-2.0
"""Everything for a machine with a CUDA GPU in one command: ``make gpu``, which is ``python -m benchmarks.gpu``.

Builds the native library for the GPU that is here if it was built for none or another, then measures and runs the tests
that need one, the most valuable first. The results file is whole after every row: cut the run off when you like, and
``--resume FILE`` goes on with what is missing. A kernel that crashes the GPU costs a restart and its own numbers only.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, gpu_tests, machine, report, roofline
from benchmarks.build import again, build_and_restart
from benchmarks.measure import ContextLostError
from benchmarks.ops import benches
from benchmarks.results import ResultsFile
from benchmarks.suite import FORWARD, OpBench, Options, Work, works
from benchmarks.timing import Clock, clock_for
from sdxl_fast.text import one_line

RANDOM = "SDXL's configuration with random weights"

Stage = tuple[str, Callable[[], None]]


def _of_dtype(bench: OpBench, dtype: str) -> OpBench:
    return dataclasses.replace(bench, dtypes=(dtype,))


@dataclasses.dataclass(frozen=True)
class Session:
    """What the stages of a run share; ``deadline`` in seconds of the monotonic clock, ``tests`` whether any are run."""

    device: str
    clock: Clock
    results: ResultsFile
    options: Options
    model: str | None = None
    quick: bool = False
    tests: bool = True
    deadline: float = float("inf")

    def works(self, dtype: str, *, first: int | None = None, rest: bool = False) -> list[Work]:
        """Returns the cases of all ops, the first ``first`` of each, or the rest of SDXL's shapes."""
        found: list[Work] = []
        for bench in benches():
            cases = bench.gpu_rest if rest else bench.cases(self.device, quick=self.quick)[:first]
            found += works(_of_dtype(bench, dtype), cases, modes=(FORWARD,) if rest else None)
        return found

    def ops(self, listed: Sequence[Work], *, compile: bool = False) -> None:
        """Measures ops."""
        options = dataclasses.replace(self.options, compile=compile)
        command.run_rows(listed, options, self.clock, self.results, deadline=self.deadline)

    def models(self, *models: str | None, batch: int = 1) -> None:
        """Measures one step of each model; where diffusers is missing, the rows say so."""
        dtype = "float32" if self.device == "cpu" else "bfloat16"
        try:
            from benchmarks.e2e import bench_one_step
        except ImportError as error:
            self._skip({"model": "one step", "case": f"batch {batch}", "dtype": dtype, "mode": "latency"}, error)
            return
        for model in models:
            if time.monotonic() < self.deadline:
                request = bench_one_step.Request(
                    bench_one_step.RANDOM_SDXL if model == RANDOM else model,
                    dtype,
                    batch=batch,
                    graphs=True,
                    rounds=self.options.rounds,
                    budget_s=4 * self.options.budget_s,
                )
                bench_one_step.run([request], self.device, self.clock, self.results)

    def training(self, model: str) -> None:
        """Measures the training steps of a model; where a package is missing, the row says so.

        One process for each contestant: one of SDXL's size takes a minute to draw its weights.
        """
        try:
            from benchmarks import training
            from benchmarks.training_ground import Scene
        except ImportError as error:
            self._skip({"model": model, "case": "training", "dtype": "bfloat16", "mode": "SDXL-Lightning"}, error)
            return
        scene, batch = Scene(model, self.device), training.BATCHES[model]
        key = training.key(scene, batch)
        if self.results.find("end_to_end", key) is not None or time.monotonic() > self.deadline:
            return
        try:
            row = training.measure(threads=torch.get_num_threads(), rounds=1, batch=batch, scene=scene)
        except Exception as error:  # whatever its gate raises: the row says what it was
            self._skip(key, error)
        else:
            training.write(self.results, row)

    def _skip(self, key: dict[str, str], error: Exception) -> None:
        """Puts the row of a model that says why there are no times."""
        row = {**key, "about": "", "skipped": one_line(error), "contestants": {}}
        self.results.put("end_to_end", row)
        command.say(report.model_text(row))


def plan(session: Session) -> list[Stage]:
    """Returns what to run, the most valuable first: a machine may be taken away after ten minutes."""
    works, ops = session.works, session.ops
    if session.quick:
        return [
            ("ops", lambda: ops(works("bfloat16"))),
            ("one step", lambda: session.models(session.model)),
        ]
    return [
        ("one step of SDXL", lambda: session.models(RANDOM)),
        ("ops, the two cases of each that cost most, bfloat16", lambda: ops(works("bfloat16", first=2))),
        *(_tests(session.results) if session.tests else []),
        ("ops, the maps that cost most, bfloat16", lambda: ops(works("bfloat16"))),
        ("one step", lambda: session.models(session.model)),
        ("ops against torch.compile", lambda: ops(works("bfloat16", first=2), compile=True)),
        ("one step, four pictures", lambda: session.models(RANDOM, batch=4)),
        ("ops, float32", lambda: ops(works("float32"))),
        ("ops, every shape of a 1024 px picture", lambda: ops(works("bfloat16", rest=True))),
        ("training steps, embedded", lambda: session.training("embedded")),
        ("training steps, SDXL", lambda: session.training("sdxl")),
        ("all ops against torch.compile", lambda: ops(works("bfloat16"), compile=True)),
    ]


def _tests(results: ResultsFile) -> list[Stage]:
    return [
        ("tests of the GPU backends", lambda: gpu_tests.run_ops(results)),
        ("tests of CUDA graphs", lambda: gpu_tests.run_graphs(results)),
        ("compute-sanitizer", lambda: gpu_tests.sanitize(results)),
    ]


def run(stages: Sequence[Stage], results: ResultsFile, *, deadline: float = float("inf")) -> bool:
    """Runs the stages until the deadline [s of the monotonic clock]; false when it cut the list short.

    The page beside the results file is written after every stage, and when one is interrupted.
    """
    try:
        for name, stage in stages:
            if time.monotonic() > deadline:
                command.say(f"no time left for: {name}")
                return False
            command.say(f"--- {name}\n")
            stage()
            report.write(results, with_plot=False)
    finally:
        report.write(results, with_plot=False)
    return time.monotonic() <= deadline


def _stop(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


def _restart(given: Sequence[str], lost: ContextLostError, results: ResultsFile, deadline: float) -> None:
    """Takes down what crashed the GPU and goes on in a new process."""
    results.put(lost.section, lost.row)
    command.say(f"{lost}\nrestarting")
    kept = [a for i, a in enumerate(given) if a != "--resume" and (i == 0 or given[i - 1] != "--resume")]
    again("benchmarks.gpu", [*kept, "--resume", str(results.path)], deadline=deadline)


def _arguments(given: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description="Build, test and measure on a GPU.")
    out = os.environ.get("OUT") or "benchmarks/results"
    parser.add_argument("--out", type=Path, default=Path(out), metavar="FOLDER", help="default: $OUT, else %(default)s")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further stage after this long")
    parser.add_argument("--model", help="for one-step generation, besides SDXL's shape; default: the embedded pipeline")
    parser.add_argument("--skip-build", action="store_true", help="use the native library as it is")
    parser.add_argument("--skip-tests", action="store_true", help="measure only; every number keeps its own gate")
    parser.add_argument("--resume", type=Path, metavar="FILE.json", help="measure what that file lacks")
    parser.add_argument("--rehearse", action="store_true", help="go through the motions on the CPU, with small shapes")
    arguments = parser.parse_args(given)
    if not arguments.rehearse and not torch.cuda.is_available():
        parser.error("torch finds no CUDA GPU here (--rehearse goes through the motions on the CPU)")
    if arguments.minutes <= 0:
        parser.error(f"--minutes is {arguments.minutes}; it must be positive")
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Builds, tests, measures. Exit status 1 when a test or a gate failed, or the CUDA kernels could not be built."""
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = _arguments(given)
    deadline = time.monotonic() + 60 * arguments.minutes
    signal.signal(signal.SIGTERM, _stop)
    rehearse: bool = arguments.rehearse
    device = "cpu" if rehearse else "cuda"
    machine.full_float32()
    clock = clock_for(device, quick=rehearse)
    ready = rehearse or arguments.skip_build or arguments.resume
    problem = "" if ready else build_and_restart("benchmarks.gpu", given, deadline=deadline)
    if arguments.resume:
        results = ResultsFile.load(arguments.resume)
        results.set("complete", False)
    else:
        results = command.start(arguments.out, device, clock, quick=rehearse)
    tests = not (rehearse or arguments.skip_tests)
    options = Options(
        device,
        rounds=3 if rehearse else 15,
        budget_s=0.3 if rehearse else 2.0,
        sets=1 if rehearse else None,
        faults=tuple(results.data["faults"]),
        copy=roofline.fastest_copy(device, quick=rehearse),
    )
    session = Session(device, clock, results, options, arguments.model, rehearse, tests, deadline)
    try:
        finished = run(plan(session), results, deadline=deadline)
    except ContextLostError as lost:
        _restart(given, lost, results, deadline)
    except KeyboardInterrupt:
        command.say(f"interrupted; what was measured is in {results.path}")
        raise SystemExit(130) from None
    status = command.finish(results, complete=finished)
    raise SystemExit(1 if gpu_tests.failed(results) or problem else status)


if __name__ == "__main__":
    main()
