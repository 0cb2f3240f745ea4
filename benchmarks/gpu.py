# SPDX-License-Identifier: Apache-2.0
"""Everything for a machine with a CUDA GPU in one command: ``make gpu``, which is ``python -m benchmarks.gpu``.

Builds the native library for the GPU that is here if it was built for none or another, runs the tests that need one,
then measures, the most valuable first. The results file is whole after every row: cut the run off when you like, and
``--resume FILE`` goes on with what is missing. A kernel that crashes the GPU costs a restart and its own numbers only.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, machine, report, roofline
from benchmarks.measure import ContextLostError
from benchmarks.ops import benches
from benchmarks.results import ResultsFile
from benchmarks.suite import FORWARD, OpBench, Options, Work, works
from benchmarks.timing import Clock, clock_for

TEST_SECONDS = 150
SANITIZER_SECONDS = 90
# Whole tests of the CUDA kernels whose sizes fill no vector and no block, and of one element.
SMALL = "test_matches_oracle and cuda and contiguous and (ragged or one) and (fp32 or bf16)"
CUDA_FOLDERS = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]

RANDOM = "SDXL's configuration with random weights"

Stage = tuple[str, Callable[[], None]]


def cuda_problem() -> str:
    """Returns why the native library cannot serve the GPU, or "": asked in a fresh process, since a load is kept."""
    code = "from sdxl_fast import native; print(native.unavailable_reason('cuda') or '')"
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"sdxl_fast does not import: {done.stderr.strip()[-300:]}"


def build() -> str:
    """Builds the native library for the GPU that is here, if need be; returns what is wrong with it afterwards."""
    problem = cuda_problem()
    if not problem:
        return ""
    command.say(f"building the CUDA kernels ({problem})")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    environment = {**os.environ, "SDXL_FAST_CUDA": "on"}
    started = time.monotonic()
    done = subprocess.run(install, cwd=machine.ROOT, env=environment)
    command.say(f"build: exit status {done.returncode} after {time.monotonic() - started:.0f} s")
    return cuda_problem()


def run_tests(results: ResultsFile) -> None:
    """Runs the op tests of the GPU backends, once per results file, in which their outcome goes.

    Their time is bounded, so that there is some left to measure: whatever they did not get to, every number has its
    own gate.
    """
    _test(results, ["tests/ops", "-k", "cuda or triton"], TEST_SECONDS)


def sanitize(results: ResultsFile) -> None:
    """Runs small cases of the CUDA kernels under compute-sanitizer where it is installed, once per results file.

    It sees accesses outside of any allocation, so torch does not hand out parts of larger ones meanwhile.
    """
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *CUDA_FOLDERS]))
    if tool is None:
        command.say("compute-sanitizer is not installed")
        return
    memcheck = [tool, "--tool", "memcheck", "--error-exitcode", "1"]
    _test(results, ["tests/ops", "-k", SMALL], SANITIZER_SECONDS, memcheck, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def _test(
    results: ResultsFile,
    selection: Sequence[str],
    seconds: float,
    under: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> None:
    case = " ".join([*(Path(name).name for name in under[:1]), "pytest", *selection])
    if results.find("tests", {"case": case}) is None:
        command.say(case)
        results.put("tests", {"case": case, **_pytest(selection, seconds, under, environment or {})})


def _pytest(
    arguments: Sequence[str], seconds: float, under: Sequence[str], environment: Mapping[str, str]
) -> dict[str, Any]:
    """Runs pytest and returns whether it passed, None when it ran out of time, and its last line."""
    pytest = [*under, sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", *arguments]
    known = {**os.environ, **environment}
    try:
        done = subprocess.run(pytest, cwd=machine.ROOT, env=known, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"passed": None, "outcome": f"stopped after {seconds:g} s without a verdict"}
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines() or ["no output"]
    passed = done.returncode == 0
    command.say("\n".join(lines[-1:] if passed else lines[-40:]))
    return {"passed": passed, "outcome": lines[-1].strip("= ")}


def failed(results: ResultsFile) -> bool:
    """Whether a test of the run failed."""
    return any(found["passed"] is False for found in results.data["tests"])


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
            row = {"model": "one step", "case": f"batch {batch}", "dtype": dtype, "mode": "latency"}
            self.results.put("end_to_end", {**row, "about": "", "skipped": str(error), "contestants": {}})
            command.say(f"one step skipped: {error}")
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


def plan(session: Session) -> list[Stage]:
    """Returns what to measure, the most valuable first."""
    works, ops = session.works, session.ops
    if session.quick:
        return [
            ("ops", lambda: ops(works("bfloat16"))),
            ("one step", lambda: session.models(session.model)),
        ]
    return [
        ("ops, the maps that cost most, bfloat16", lambda: ops(works("bfloat16"))),
        ("one step", lambda: session.models(RANDOM, session.model)),
        *([("compute-sanitizer", lambda: sanitize(session.results))] if session.tests else []),
        ("ops against torch.compile", lambda: ops(works("bfloat16", first=2), compile=True)),
        ("one step, four pictures", lambda: session.models(RANDOM, batch=4)),
        ("ops, float32", lambda: ops(works("float32"))),
        ("ops, every shape of a 1024 px picture", lambda: ops(works("bfloat16", rest=True))),
        ("all ops against torch.compile", lambda: ops(works("bfloat16"), compile=True)),
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


def _restart(given: Sequence[str], lost: ContextLostError, results: ResultsFile) -> None:
    """Takes down what crashed the GPU and goes on in a new process."""
    results.put(lost.section, lost.row)
    command.say(f"{lost}\nrestarting")
    kept = [a for i, a in enumerate(given) if a != "--resume" and (i == 0 or given[i - 1] != "--resume")]
    sys.stdout.flush()
    again = [sys.executable, "-m", "benchmarks.gpu", *kept, "--resume", str(results.path)]
    os.execv(sys.executable, again)


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
    clock = clock_for(device, quick=rehearse)
    problem = "" if rehearse or arguments.skip_build or arguments.resume else build()
    if problem:
        command.say(f"WARNING: no CUDA kernels: {problem}")
    if arguments.resume:
        results = ResultsFile.load(arguments.resume)
        results.set("complete", False)
    else:
        results = command.start(arguments.out, device, clock, quick=rehearse)
    tests = not (rehearse or arguments.skip_tests)
    if tests:
        run_tests(results)
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
        _restart(given, lost, results)
    except KeyboardInterrupt:
        command.say(f"interrupted; what was measured is in {results.path}")
        raise SystemExit(130) from None
    status = command.finish(results, complete=finished)
    raise SystemExit(1 if failed(results) or problem else status)


if __name__ == "__main__":
    main()
