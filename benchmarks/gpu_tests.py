# SPDX-License-Identifier: Apache-2.0
"""The tests that ``make gpu`` runs: the op tests of the GPU backends, graphs, and small cases under compute-sanitizer.

Their time is bounded, so that there is some left to measure: whatever they did not get to, every number has its own
gate. Their whole output is in a log beside the results file, also when they are stopped.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command, machine
from benchmarks.results import ResultsFile

# Triton compiles for some 20 minutes for the tests of the ops in one process: a minute and a half on 16 cores, beside
# the tests themselves.
TEST_SECONDS = 240
GRAPH_SECONDS = 90
SANITIZER_SECONDS = 90
REPORT_SECONDS = 20  # that pytest has for its report when it is stopped
# Whole tests of the CUDA kernels whose sizes fill no vector and no block, and of one element.
SMALL = "test_matches_oracle and cuda and contiguous and (ragged or one) and (fp32 or bf16)"
GRAPHS = "tests/inference/test_graphs.py"
CUDA_FOLDERS = [str(Path(home) / "bin") for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
_VERDICT = re.compile(r"\b(PASSED|FAILED|ERROR)\b")
_TEST = re.compile(r"\S+::\S+")


def run_ops(results: ResultsFile, *, seconds: float = TEST_SECONDS) -> None:
    """Runs the op tests of the GPU backends, once per results file, in which their outcome goes."""
    # One module that does not import is one failure, not the end of all.
    selection = ["tests/ops", "-k", "cuda or triton", "--continue-on-collection-errors"]
    _test(results, selection, seconds, parallel=True)


def run_graphs(results: ResultsFile) -> None:
    """Runs the tests of real CUDA graphs, once per results file, where the pipelines' requirements are installed."""
    try:
        importlib.import_module("sdxl_fast.inference")
    except ImportError as error:
        command.say(f"tests of CUDA graphs skipped: {error}")
        return
    _test(results, [GRAPHS, "-m", "gpu"], GRAPH_SECONDS)


def sanitize(results: ResultsFile) -> None:
    """Runs small cases of the CUDA kernels under compute-sanitizer where it is installed, once per results file.

    It sees accesses outside of any allocation, so torch does not hand out parts of larger ones meanwhile.
    """
    tool = shutil.which("compute-sanitizer", path=os.pathsep.join([os.environ.get("PATH", ""), *CUDA_FOLDERS]))
    if tool is None:
        command.say("compute-sanitizer is not installed")
        return
    memcheck = [tool, "--tool", "memcheck", "--error-exitcode", "1"]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    _test(results, ["tests/ops", "-k", SMALL], SANITIZER_SECONDS, under=memcheck, environment=environment)


def failed(results: ResultsFile) -> bool:
    """Whether a test of the run failed."""
    return any(found["passed"] is False for found in results.data["tests"])


def _test(
    results: ResultsFile,
    selection: Sequence[str],
    seconds: float,
    *,
    under: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
    parallel: bool = False,
) -> None:
    case = " ".join([*(Path(name).name for name in under[:1]), "pytest", *selection])
    if results.find("tests", {"case": case}) is not None:
        return
    command.say(case)
    spread = ["-n", str(machine.processors()), "--dist", "worksteal"] if parallel and _has_xdist() else []
    pytest = [*under, sys.executable, "-m", "pytest", "-v", "--no-header", "-p", "no:cacheprovider"]
    with _log(results, len(results.data["tests"])) as log:
        status = _run([*pytest, *spread, *selection], seconds, environment or {}, log)
        results.put("tests", {"case": case, **_outcome(status, log.read_text(errors="replace"), seconds)})


def _has_xdist() -> bool:
    return importlib.util.find_spec("xdist") is not None


@contextlib.contextmanager
def _log(results: ResultsFile, index: int) -> Iterator[Path]:
    """The log of the ``index``-th tests, beside the results file; one without a path keeps none."""
    if results.path is not None:
        yield results.path.with_name(f"{results.path.stem}_tests_{index}.log")
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "log"


def _run(arguments: Sequence[str], seconds: float, environment: Mapping[str, str], log: Path) -> int | None:
    """Runs a command into ``log`` and returns its exit status; None when its time was up, and it was stopped.

    It gets a process group of its own, of which nothing is left afterwards: what still computes on the GPU would slow
    down what is measured next.
    """
    with log.open("w") as output:
        process = subprocess.Popen(
            arguments,
            cwd=machine.ROOT,
            env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # pytest reports the failures so far
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(REPORT_SECONDS)
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _outcome(status: int | None, text: str, seconds: float) -> dict[str, Any]:
    """Returns whether pytest passed, None when it ran out of time with no failure so far, and its last line."""
    lines = text.strip().splitlines() or ["no output"]
    wrong = _tests(lines, "FAILED") | _tests(lines, "ERROR")
    if status is None:
        last = f"stopped after {seconds:g} s: {len(_tests(lines, 'PASSED'))} passed, {len(wrong)} failed by then"
        command.say("\n".join([*(f"FAILED {name}" for name in sorted(wrong)[:40]), last]))
        return {"passed": False if wrong else None, "outcome": last}
    command.say("\n".join(lines[-1:] if status == 0 else lines[-40:]))
    return {"passed": status == 0, "outcome": lines[-1].strip("= ")}


def _tests(lines: Sequence[str], verdict: str) -> set[str]:
    """Returns the tests that verbose output gives a verdict, with the process that ran them before it or not."""
    found = set()
    for line in lines:
        said, test = _VERDICT.search(line), _TEST.search(line)
        if said is not None and test is not None and said[1] == verdict:
            found.add(test[0])
    return found
