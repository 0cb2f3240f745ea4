# SPDX-License-Identifier: Apache-2.0
"""What ``make gpu`` does around the measurements: building, starting again, tests with bounded time and a log."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks import build, gpu, gpu_tests, machine, training  # noqa: E402
from benchmarks.e2e import __main__ as everything  # noqa: E402
from benchmarks.e2e import bench_one_step  # noqa: E402
from benchmarks.ops import benches  # noqa: E402
from benchmarks.results import ResultsFile  # noqa: E402
from benchmarks.suite import Options, place  # noqa: E402
from benchmarks.timing import CpuClock, GraphClock, kernel_seconds, without_graph  # noqa: E402
from sdxl_fast import OneStepPipeline  # noqa: E402
from sdxl_fast.inference.graphs import GraphCache  # noqa: E402
from sdxl_fast.inference.runner import runner_of  # noqa: E402


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that took this process's place."""
    found: list[list[str]] = []
    monkeypatch.setattr(build.os, "execv", lambda path, arguments: found.append(arguments[1:]))
    return found


@pytest.mark.parametrize(
    ("built", "restarts"),
    [
        (build.Built("", installed=True), True),
        (build.Built("", installed=False), False),  # it was there
        (build.Built("no nvcc", installed=True), False),  # for the CPU alone
        (build.Built("no nvcc", installed=False), False),
    ],
)
def test_what_was_just_installed_is_measured_by_a_new_process(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], built: build.Built, restarts: bool
) -> None:
    monkeypatch.setattr(build, "build", lambda: built)
    monkeypatch.setattr(build, "matrix_problem", lambda: "")
    assert build.build_and_restart("benchmarks.gpu", ["--out", "x"]) == built.problem
    assert started == ([["-m", "benchmarks.gpu", "--out", "x", "--skip-build"]] if restarts else [])


def test_missing_matrix_kernels_are_told(
    monkeypatch: pytest.MonkeyPatch, started: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(build, "build", lambda: build.Built("", installed=False))
    monkeypatch.setattr(build, "_asked", lambda code: "the matrix kernels were not built" if "_hopper" in code else "")
    for capability, told in (((8, 9), False), ((9, 0), True)):
        monkeypatch.setattr(build.torch.cuda, "get_device_capability", lambda found=capability: found)
        assert build.build_and_restart("benchmarks.gpu", []) == ""
        assert ("WARNING: the matrix kernels were not built" in capsys.readouterr().out) is told


@pytest.mark.parametrize(("status", "left"), [(0, ""), (1, "no nvcc")])
def test_build_says_whether_it_installed(monkeypatch: pytest.MonkeyPatch, status: int, left: str) -> None:
    problems = iter(["no library", left])
    monkeypatch.setattr(build, "cuda_problem", lambda: next(problems))
    monkeypatch.setattr(
        build.subprocess, "run", lambda *args, **kwargs: build.subprocess.CompletedProcess(args[0], status)
    )
    assert build.build() == build.Built(left, installed=status == 0)
    monkeypatch.setattr(build, "cuda_problem", lambda: "")
    assert build.build() == build.Built("", installed=False)


def test_a_new_process_has_the_time_that_is_left(started: list[list[str]]) -> None:
    build.again("benchmarks.gpu", ["--minutes", "10"], deadline=time.monotonic() + 90)
    *given, option, minutes = started[0]
    assert given == ["-m", "benchmarks.gpu", "--minutes", "10"] and option == "--minutes"
    assert math.isclose(float(minutes), 1.5, abs_tol=0.02)


def _tests(tmp_path: Path, text: str) -> str:
    path = tmp_path / "test_made_up.py"
    path.write_text(text)
    return str(path)


@pytest.mark.parametrize("parallel", [False, True])
def test_failures_and_the_log_outlive_a_timeout(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], parallel: bool
) -> None:
    monkeypatch.setattr(gpu_tests.machine, "processors", lambda: 1)
    monkeypatch.setattr(gpu_tests, "REPORT_SECONDS", 1)
    results = ResultsFile.create(tmp_path, "made-up", {})
    pid = tmp_path / "pid"

    class Impatient(subprocess.Popen):  # type: ignore[type-arg]
        """Its time is up as soon as the last test runs, however busy this machine is."""

        def wait(self, timeout: float | None = None) -> int:
            if timeout != 5:
                return super().wait(timeout)
            while self.poll() is None and not (pid.is_file() and pid.read_text()):
                time.sleep(0.05)
            raise subprocess.TimeoutExpired("pytest", 5)

    monkeypatch.setattr(gpu_tests.subprocess, "Popen", Impatient)
    text = f"""
import os, pathlib, subprocess, time
def test_right(): pass
def test_wrong(): raise AssertionError("told in the log")
def test_long():
    child = subprocess.Popen(["sleep", "1000"])
    pathlib.Path({str(pid)!r}).write_text(str(child.pid))
    time.sleep(1000)
"""
    gpu_tests._test(results, [_tests(tmp_path, text)], 5, parallel=parallel)
    (row,) = results.data["tests"]
    assert row["passed"] is False and row["outcome"] == "stopped after 5 s: 1 passed, 1 failed by then"
    assert "test_made_up.py::test_wrong" in capsys.readouterr().out
    log = (tmp_path / "made-up_tests_0.log").read_text()
    assert "test_wrong" in log
    _wait_for_end(int(pid.read_text()))


def _wait_for_end(pid: int) -> None:
    """Nothing of what was stopped goes on: a zombie nobody waits for is all that may be left."""
    for _ in range(50):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return
        except OSError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} still runs")


def test_outcome_of_tests_that_end() -> None:
    lines = "tests/a.py::one PASSED [ 50%]\ntests/a.py::two FAILED [100%]\n=== 1 failed, 1 passed in 1.00s ==="
    assert gpu_tests._outcome(1, lines, 9.0) == {"passed": False, "outcome": "1 failed, 1 passed in 1.00s"}
    assert gpu_tests._outcome(0, "=== 2 passed ===", 9.0) == {"passed": True, "outcome": "2 passed"}
    parallel = "[gw3] [ 50%] PASSED tests/a.py::one \n[gw1] [100%] PASSED tests/a.py::two"
    stopped = {"passed": None, "outcome": "stopped after 9 s: 2 passed, 0 failed by then"}
    assert gpu_tests._outcome(None, parallel, 9.0) == stopped


def test_graphs_are_tested_where_the_pipelines_can_be_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultsFile.create(None, "", {})
    with monkeypatch.context() as blocked:
        blocked.setitem(sys.modules, "sdxl_fast.inference", None)
        gpu_tests.run_graphs(results)
    assert not results.data["tests"]
    monkeypatch.setitem(sys.modules, "sdxl_fast.inference", ModuleType("a stand-in"))
    monkeypatch.setattr(gpu_tests, "_run", lambda arguments, seconds, environment, log: log.write_text("passed") and 0)
    gpu_tests.run_graphs(results)
    case = f"pytest {gpu_tests.GRAPHS} -m gpu"
    assert results.data["tests"] == [{"case": case, "passed": True, "outcome": "passed"}]
    assert "pytest.mark.gpu" in (ROOT / gpu_tests.GRAPHS).read_text()


def test_small_cases_run_under_compute_sanitizer_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = ResultsFile.create(None, "", {})
    monkeypatch.setattr(gpu_tests, "CUDA_FOLDERS", [])
    monkeypatch.setenv("PATH", str(tmp_path))
    gpu_tests.sanitize(results)
    assert not results.data["tests"] and not gpu_tests.failed(results)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(
        f'#!/bin/sh\necho "$PYTORCH_NO_CUDA_MEMORY_CACHING $*" > {tmp_path}/asked\nexit $(cat {tmp_path}/code)\n'
    )
    tool.chmod(0o755)
    for code in (0, 1):
        (tmp_path / "code").write_text(str(code))
        results = ResultsFile.create(None, "", {})
        with monkeypatch.context() as paths:
            paths.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")
            gpu_tests.sanitize(results)
        (row,) = results.data["tests"]
        assert row["case"].startswith("compute-sanitizer pytest tests/ops -k") and row["passed"] is (code == 0)
        assert gpu_tests.failed(results) is (code == 1)
    asked = (tmp_path / "asked").read_text()
    assert asked.startswith("1 --tool memcheck --error-exitcode 1") and f"{sys.executable} -m pytest" in asked


def test_float32_is_not_rounded_to_tf32() -> None:
    """No gate of a float32 convolution would pass on what cuDNN does unless told otherwise."""
    parts = torch.backends.cudnn, torch.backends.cuda.matmul
    before = [part.allow_tf32 for part in parts]
    try:
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
        machine.full_float32()
        assert not any(part.allow_tf32 for part in parts)
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def test_what_was_prepared_in_an_order_keeps_it() -> None:
    """As on a GPU the phases are: C_in innermost, which the kernel would otherwise copy at every call."""
    bench = next(b for b in benches() if b.subject.op == "upsample_conv2d")
    phases = torch.empty(6, 4, 4, 5).permute(3, 0, 1, 2)
    x = torch.empty(1, 5, 2, 3)
    placed = place({"x": x, "phases": phases}, bench.layout, bench.ordered)
    assert placed["phases"].permute(1, 2, 3, 0).is_contiguous()
    assert placed["x"].is_contiguous(memory_format=torch.channels_last)


class _Event:
    """An event of a GPU that takes a second for everything before it."""

    count = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        _Event.count += 1.0
        self.at = _Event.count

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, end: _Event) -> float:
        return 1e3 * (end.at - self.at)


def test_what_no_graph_can_hold_is_timed_by_events_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = next(b for b in benches() if b.subject.op == "lora_merge")
    assert not bench.captured
    clock = without_graph(GraphClock())
    assert clock.name == "CUDA events" and without_graph(CpuClock()).name == CpuClock.name
    monkeypatch.setattr(torch.cuda, "Event", _Event)
    called: list[int] = []
    timed = clock.prepare([lambda: called.append(0), lambda: called.append(1)])
    assert timed.sample() == 1.0  # one call outlasts what a sample has to
    assert called == [0, 1, 0, 1, 0]


def test_stages_are_captured_by_the_clock_alone(toy_folder: Path) -> None:
    """No graph is replayed within the clock's, and one captured while it warms up would take memory for nothing."""
    pipe = OneStepPipeline.from_pretrained(toy_folder, dtype=torch.float32, device="cpu")
    runners = [runner_of(network) for network in (pipe.unet, pipe.vae)]
    held = [GraphCache(_Capturer(), budget=1) for _ in runners]
    for runner, cache in zip(runners, held, strict=True):
        runner.graphs = cache
    ways = bench_one_step.arrangements(pipe)
    request = bench_one_step.Request(str(toy_folder), "float32", rounds=1)
    found = bench_one_step._time_graphs(pipe, ways, request, CpuClock(0.0))
    assert all("median" in found[name][stage] for name in ways for stage in bench_one_step.STAGES)
    assert [runner.graphs for runner in runners] == held
    assert not any(cache.stats.uncaptured for cache in held)


class _Capturer:
    """Captures nothing."""

    def busy(self) -> bool:
        return False

    def capture(self, stage: Any, inputs: Any) -> Any:
        raise RuntimeError("a graph within a graph")


def _ops_of(asked: list[Any]) -> Any:
    return lambda self, listed, **rest: asked.append({work.bench.subject.op for work in listed})


def test_the_most_valuable_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that is taken away after ten minutes has drawn a picture and timed every op."""
    asked: list[Any] = []
    for name in ("models", "training"):
        monkeypatch.setattr(gpu.Session, name, lambda self, *models, **rest: asked.append(models))
    monkeypatch.setattr(gpu.Session, "ops", _ops_of(asked))
    monkeypatch.setattr(gpu_tests, "_test", lambda results, selection, *args, **rest: asked.append(selection[0]))
    results = ResultsFile.create(None, "", {})
    stages = gpu.plan(gpu.Session("cuda", CpuClock(), results, Options("cuda")))
    for _, stage in stages:
        stage()
    assert asked[:4] == [(gpu.RANDOM,), {b.subject.op for b in benches()}, "tests/ops", gpu_tests.GRAPHS]
    assert asked[-3:-1] == [("embedded",), ("sdxl",)]


def test_training_is_a_row_once_or_says_why_not(monkeypatch: pytest.MonkeyPatch) -> None:
    results = ResultsFile.create(None, "", {})
    session = gpu.Session("cpu", CpuClock(), results, Options("cpu"))
    measured: list[int] = []

    def measure(*, batch: int, scene: Any, **rest: Any) -> dict[str, Any]:
        measured.append(batch)
        if scene.model == "sdxl":
            raise RuntimeError("CUDA out of memory")
        return {**training.key(scene, batch), "about": "", "contestants": {}}

    monkeypatch.setattr(training, "measure", measure)
    for model in ("embedded", "embedded", "sdxl"):
        session.training(model)
    assert measured == [48, 1]
    first, second = results.data["end_to_end"]
    assert "skipped" not in first and second["skipped"] == "CUDA out of memory"


def test_kernels_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Profile:
        def __enter__(self) -> Profile:
            return self

        def __exit__(self, *error: object) -> None:
            pass

        def key_averages(self) -> list[Any]:
            kinds = torch.autograd.DeviceType
            of = {kinds.CUDA: 3e5, kinds.CPU: 9e9}
            return [SimpleNamespace(device_type=kind, self_device_time_total=us) for kind, us in of.items()]

    monkeypatch.setattr(torch.profiler, "profile", lambda activities: Profile())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert kernel_seconds(lambda: None) == 0.3


def test_whole_pipelines_are_written_where_one_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("OUT", raising=False)
    assert everything._arguments([]).out == Path("benchmarks/results")
    monkeypatch.setenv("OUT", str(tmp_path))
    assert everything._arguments([]).out == tmp_path
    assert everything._arguments(["--out", "elsewhere"]).out == Path("elsewhere")
