# SPDX-License-Identifier: Apache-2.0
"""The benchmarks' arithmetic, gates, results file and command line, on shapes small enough to time nothing."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks import command, gpu, machine, report  # noqa: E402
from benchmarks.e2e import bench_fuse, bench_one_step, bench_pipelines  # noqa: E402
from benchmarks.gate import Gate, same_function  # noqa: E402
from benchmarks.measure import Prepared, measure  # noqa: E402
from benchmarks.ops import bench_geglu, benches  # noqa: E402
from benchmarks.results import ResultsFile  # noqa: E402
from benchmarks.suite import (  # noqa: E402
    FORWARD,
    LAYOUTS,
    Options,
    Target,
    Work,
    contestants,
    copy_share,
    stage_verdicts,
    verdicts,
    with_ratios,
    works,
)
from benchmarks.timing import CpuClock, interleave, quotient, sets_to_exceed, summarise  # noqa: E402
from sdxl_fast import ops  # noqa: E402

QUICK = Options("cpu", rounds=2, sets=1)
CEILINGS = {"copy_bytes_per_s": 100.0, "copies": {"torch": 100.0}, "matrix_flops_per_s": {"float32": 50.0}}


# ---- the arithmetic ----


def test_summary_of_samples() -> None:
    found = summarise([4.0, 1.0, 2.0, 3.0, 10.0])
    assert (found.median, found.low, found.high, found.best, found.rounds) == (3.0, 2.0, 4.0, 1.0, 5)
    assert found.spread == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="at least one"):
        summarise([])


def test_quotient_is_taken_round_by_round() -> None:
    """A round that was slow for both counts as any other; the quotient of the medians would be 15."""
    assert quotient([2.0, 30.0, 40.0], [1.0, 10.0, 2.0]).median == 3.0
    with pytest.raises(ValueError):
        quotient([1.0], [1.0, 2.0])


def test_sets_exceed_the_cache_twice() -> None:
    assert sets_to_exceed(32, 10) == 7
    assert sets_to_exceed(32, 1000) == 1


class _Ticks:
    """Samples that note who was asked, in order."""

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order = name, order

    def sample(self) -> float:
        self.order.append(self.name)
        return 1.0


def test_contestants_take_turns() -> None:
    order: list[str] = []
    samples = interleave({n: _Ticks(n, order) for n in "abc"}, rounds=3)
    assert "".join(order) == "abcbcacab" and samples == dict.fromkeys("abc", [1.0] * 3)
    assert len(interleave({"a": _Ticks("a", order)}, rounds=9, budget_s=0, least=2)["a"]) == 2


def _row(ours: float, same: float, other: float) -> dict[str, Any]:
    """A row of a made-up op that moves 80 bytes; times of our backend and of eager in its two layouts."""
    times = {"cpu": ours, "eager channels_last": same, "eager contiguous": other}
    entries = {
        name: {
            "gate": "ok",
            "layout": "contiguous" if "contiguous" in name else "channels_last",
            "seconds": summarise([t] * 3).as_dict(),
            "samples": [t] * 3,
        }
        for name, t in times.items()
    }
    key = {"op": "made_up", "case": "1x2", "dtype": "float32", "mode": FORWARD}
    copy = {"bytes": 200, "samples": [2.0] * 3}
    return {**key, "bytes": 80, "flops": 10, "sets": 1, "bytes_per_set": 40, "copy": copy, "contestants": entries}


def test_targets() -> None:
    """Against eager on the same tensor: 3 / 1; the faster layout, 2 / 1, is shown beside it. 80 of 100 bytes/s."""
    targets = (Target("1x2", "float32", 2.5, copy_share=0.9), Target("other", "float32", 1.0))
    row = with_ratios(_row(1.0, 3.0, 2.0), targets)
    assert row["baseline"] == "eager contiguous"
    assert row["contestants"]["cpu"]["speedup"]["median"] == 2.0
    (_, speedup, fast), (_, share, near) = verdicts(row)
    assert (speedup, fast) == (3.0, True)
    assert (share, near) == (pytest.approx(0.8), False)
    slow = with_ratios(_row(2.0, 3.0, 2.0), targets)
    assert [reached for _, _, reached in verdicts(slow)] == [False, False]


def test_what_the_registry_takes_may_not_be_slower_than_eager() -> None:
    """Half of the rounds are, for equals: only what is slower in three quarters of them is."""
    row = _row(1.0, 1.0, 1.0)
    row["chosen"] = "cpu"
    for times, reached in (([0.9, 1.1, 1.1], True), ([1.2, 1.1, 1.1], False)):
        row["contestants"]["cpu"] |= {"seconds": summarise(times).as_dict(), "samples": times}
        ((what, _, found),) = verdicts(with_ratios(row, ()))
        assert what.startswith("cpu, which the registry takes, no slower than eager") and found is reached
    row["chosen"] = "eager"
    assert not verdicts(row)


def test_share_of_the_copy_is_taken_round_by_round() -> None:
    """A machine whose memory is half as fast in two of three rounds, for the copy and for us: 80 % all the time."""
    row = _row(1.0, 1.0, 1.0)
    row["contestants"]["cpu"]["samples"], row["copy"]["samples"] = [1.0, 2.0, 2.0], [2.0, 4.0, 4.0]
    assert copy_share(row, "cpu") == pytest.approx(0.8)
    del row["copy"]
    assert copy_share(row, "cpu") is None


def test_target_of_what_was_not_timed_is_missed() -> None:
    row = _row(1.0, 3.0, 2.0)
    row["contestants"]["cpu"] = {"refused": "not built"}
    row = with_ratios(row, (Target("1x2", "float32", 1.0, copy_share=0.1),))
    assert [(value, reached) for _, value, reached in verdicts(row)] == [(None, False), (None, False)]


# ---- the gate ----


def _swapped(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    gate, value = x.chunk(2, -1)
    return value * torch.nn.functional.gelu(gate, approximate=approximate)


def _forgetful(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    y = torch.empty(*x.shape[:-1], x.shape[-1] // 2)
    y[:-1] = bench_geglu.stock(x[:-1], approximate=approximate)
    return y


def _scribbling(x: torch.Tensor, *, approximate: str) -> torch.Tensor:
    y = bench_geglu.stock(x, approximate=approximate)
    x[0, 0] = 1.0
    return y


@pytest.mark.parametrize(
    ("call", "passes"), [(bench_geglu.stock, True), (_swapped, False), (_forgetful, False), (_scribbling, False)]
)
def test_gate(call: Any, passes: bool) -> None:
    gate = Gate(bench_geglu.BENCH.subject, {"x": torch.randn(4, 32), "approximate": "none"}, None)
    assert gate.judge(call).passed is passes


def test_peer_has_to_compute_the_same_function() -> None:
    y = torch.randn(100)
    assert same_function({"y": y}, {"y": y.double()}).passed
    assert not same_function({"y": y * (1 + 1e-3)}, {"y": y.double()}).passed
    assert not same_function({"y": y / 0}, {"y": y.double()}).passed
    levels = torch.arange(8, dtype=torch.uint8)
    assert same_function({"y": levels + 1}, {"y": levels}).passed
    assert not same_function({"y": levels + 2}, {"y": levels}).passed


# ---- every op ----


def test_every_op_has_a_benchmark() -> None:
    assert sorted(bench.subject.op for bench in benches()) == sorted(ops.__all__)


@pytest.mark.parametrize("bench", benches(), ids=lambda bench: bench.subject.op)
def test_contestants_agree_with_the_oracle_and_are_timed(bench: Any) -> None:
    names = {c.name for c in contestants(bench, "cpu", compile=False)}
    for work in works(bench, bench.cases("cpu", quick=True)[:1]):
        rows = list(measure(work, QUICK, CpuClock(0.0)))
        assert [row["mode"] for row in rows] == list(bench.modes)
        for row in rows:
            assert set(row["contestants"]) == names
            for found in row["contestants"].values():
                assert "refused" not in found, found["refused"]
                assert len(found["samples"]) == 2 and found["speedup"]["median"] > 0
            assert row["bytes"] > 0 and row["flops"] >= 0


@pytest.mark.parametrize("bench", benches(), ids=lambda bench: bench.subject.op)
def test_targets_name_rows_that_are_measured(bench: Any) -> None:
    measured = {(c.name, dtype, mode) for c in bench.cpu_cases for dtype in bench.dtypes for mode in bench.modes}
    assert {(t.case, t.dtype, t.mode) for t in bench.targets} <= measured


def test_wrong_backend_is_refused_and_not_timed() -> None:
    bench = bench_geglu.BENCH
    work = Work(bench, bench.cases("cpu", quick=True)[0], "float32", (FORWARD,))
    entered = contestants(bench, "cpu", compile=False)
    entered[0] = dataclasses.replace(entered[0], call=_swapped)
    (row,) = measure(work, QUICK, CpuClock(0.0), entered=entered)
    assert "failed its gate" in row["contestants"]["cpu"]["refused"] and "seconds" not in row["contestants"]["cpu"]
    results = ResultsFile.create(None, "", {})
    results.put("rows", row)
    results.set("ceilings", CEILINGS)
    said: list[str] = []
    assert command.finish(results, tell=said.append) == 1
    assert any("FAILED ITS GATE" in line for line in said)


class _CompilerError(Exception):
    """Of no class that PyTorch's errors have, as Triton's are."""


def test_a_backend_that_does_not_compile_is_a_row_that_says_so() -> None:
    bench = bench_geglu.BENCH
    work = Work(bench, bench.cases("cpu", quick=True)[0], "float32", (FORWARD,))
    entered = contestants(bench, "cpu", compile=False)

    def broken(**values: Any) -> Any:
        raise _CompilerError("out of resource: shared memory")

    entered[0] = dataclasses.replace(entered[0], call=broken)
    (row,) = measure(work, QUICK, CpuClock(0.0), entered=entered)
    assert row["contestants"]["cpu"] == {"refused": "out of resource: shared memory"}
    assert "seconds" in row["contestants"]["eager"]


def test_a_whole_model_that_does_not_compile_is_a_row_that_says_so(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise _CompilerError("no such layout")

    monkeypatch.setattr(bench_one_step, "measure", broken)
    monkeypatch.setattr(bench_pipelines, "measure", broken)
    results = ResultsFile.create(None, "", {})
    request = bench_one_step.Request(str(toy_folder), "float32")
    bench_one_step.run([request], "cpu", CpuClock(0.0), results, tell=lambda text: None)
    bench_pipelines.run([bench_pipelines.Request(str(toy_folder))], "cpu", results, tell=lambda text: None)
    assert [row["skipped"] for row in results.data["end_to_end"]] == ["no such layout"] * 2


def test_inputs_rotate_in_the_layout_asked_for() -> None:
    bench = next(b for b in benches() if b.images)
    work = Work(bench, bench.cases("cpu", quick=True)[0], "float32", (FORWARD,))
    prepared = Prepared(work, Options("cpu", sets=3))
    sets = prepared.sets("channels_last")
    pictures = [next(v for v in values.values() if isinstance(v, torch.Tensor) and v.ndim == 4) for values, _ in sets]
    assert len({p.data_ptr() for p in pictures}) == 3 and not torch.equal(pictures[0], pictures[1])
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in pictures)


# ---- results and runs ----


def test_results_file_round_trip(tmp_path: Path) -> None:
    results = ResultsFile.create(tmp_path, "made-up", {"device": "made up", "date": "2020-01-01"})
    results.set("ceilings", CEILINGS)
    results.put("rows", with_ratios(_row(2.0, 3.0, 2.0), ()))
    results.put("rows", with_ratios(_row(1.0, 3.0, 2.0), (Target("1x2", "float32", 2.5),)))
    assert results.path is not None
    read = ResultsFile.load(results.path)
    assert read.data == results.data and len(read.data["rows"]) == 1
    report.write(read)
    page = results.path.with_suffix(".md").read_text()
    assert "was cut off" in page and "3.00x" in page and "| yes |" in page
    assert results.path.with_suffix(".png").stat().st_size > 1000
    (tmp_path / "other.json").write_text('{"format": 0}')
    with pytest.raises(ValueError, match="not a results file"):
        ResultsFile.load(tmp_path / "other.json")


def test_rows_that_are_there_are_not_measured_again() -> None:
    bench = bench_geglu.BENCH
    results = ResultsFile.create(None, "", {})
    results.set("ceilings", CEILINGS)
    listed = [Work(bench, bench.cases("cpu", quick=True)[0], "float32", (FORWARD,))]
    said: list[str] = []
    for _ in range(2):
        command.run_rows(listed, QUICK, CpuClock(0.0), results, tell=said.append)
    assert len(said) == len(results.data["rows"]) == 1
    command.run_rows([Work(bench, listed[0].case, "bfloat16", (FORWARD,))], QUICK, CpuClock(0.0), results, deadline=0)
    assert len(results.data["rows"]) == 1


def test_fused_networks_compute_the_same_and_are_timed(toy_folder: Path) -> None:
    results = ResultsFile.create(None, "", {})
    results.set("ceilings", CEILINGS)
    said: list[str] = []
    for _ in range(2):
        bench_fuse.run([bench_fuse.Request(str(toy_folder), 2, 3, 0.0)], results, tell=said.append)
    (row,) = results.data["end_to_end"]
    assert len(said) == 1 and said[0].count("target:") == len(bench_fuse.TARGETS) == len(row["ratios"])
    kinds = (bench_fuse.STOCK, bench_fuse.FUSED)
    assert set(row["contestants"]) == {f"{kind} {layout}" for kind in kinds for layout in LAYOUTS}
    assert all(set(found["stages"]) == set(bench_fuse.TARGETS) for found in row["contestants"].values())
    assert "targets reached:" in command.summary(results)
    row["ratios"] = {stage: {"median": 0.99, "high": 1.2} for stage in bench_fuse.TARGETS}
    assert [reached for _, _, reached in stage_verdicts(row)] == [False, False, True]
    del row["ratios"]["training step"]
    assert stage_verdicts(row)[-1][1:] == (None, False)


def test_a_fused_network_that_computes_something_else_is_refused(
    toy_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(network: torch.nn.Module, **_: Any) -> None:
        for name, parameter in network.named_parameters():
            if name.endswith("conv_in.weight"):
                parameter.data.mul_(1.01)

    monkeypatch.setattr(bench_fuse, "fuse", wrong)
    row = bench_fuse.measure(bench_fuse.Request(str(toy_folder), 1, 3, 0.0))
    fused = [found for name, found in row["contestants"].items() if name.startswith(bench_fuse.FUSED)]
    assert len(fused) == 2 and all("failed its gate" in found["refused"] for found in fused)
    assert not any(found["stages"] for found in fused) and not row["ratios"]


def test_one_step_is_timed_at_a_size_that_is_asked_for(toy_folder: Path) -> None:
    request = bench_one_step.Request(str(toy_folder), "float32", rounds=1, budget_s=0.0, size=64)
    results = ResultsFile.create(None, "", {})
    bench_one_step.run([request], "cpu", CpuClock(0.0), results, tell=lambda text: None)
    row = results.data["end_to_end"][0]
    assert row["case"] == "batch 1, 64 px"
    assert row["about"].startswith("64 px")
    assert all(found["stages"]["total"]["rounds"] == 1 for found in row["contestants"].values())


def test_a_run_that_is_cut_off_leaves_its_results(tmp_path: Path) -> None:
    results = ResultsFile.create(tmp_path, "made-up", {"device": "made up", "date": "2020-01-01"})
    results.set("ceilings", CEILINGS)

    def first() -> None:
        results.put("rows", with_ratios(_row(1.0, 3.0, 2.0), ()))

    def second() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gpu.run([("first", first), ("second", second)], results)
    assert results.path is not None
    assert len(json.loads(results.path.read_text())["rows"]) == 1 and results.path.with_suffix(".md").is_file()
    assert gpu.run([("late", second)], results, deadline=-math.inf) is False


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_command_line(tmp_path: Path) -> None:
    done = _python("benchmarks.ops.bench_geglu", "--quick", "--threads", "1", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("*.json")
    data = ResultsFile.load(file).data
    assert data["complete"] and data["machine"]["threads"] == 1 and "warm" in data["machine"]["allocator"]
    assert data["ceilings"]["copy_bytes_per_s"] > 0
    assert all(len(row["copy"]["samples"]) == 3 and min(row["copy"]["samples"]) > 0 for row in data["rows"])
    timed = [c for row in data["rows"] for c in row["contestants"].values()]
    assert len(timed) == 8 and all(c["seconds"]["median"] > 0 and c["gate"] for c in timed)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("benchmarks.ops.bench_geglu", "--threads", "0"), "--threads is 0; it must be at least 1"),
        (("benchmarks.gpu", "--rehearse", "--minutes", "0"), "--minutes is 0.0; it must be positive"),
    ],
)
def test_command_line_refuses(arguments: tuple[str, ...], said: str) -> None:
    done = _python(*arguments)
    assert done.returncode == 2 and said in done.stderr


@pytest.mark.skipif(not (ROOT / ".git").exists() or shutil.which("git") is None, reason="no git checkout")
def test_the_commit_is_that_of_these_sources_or_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert machine.commit().startswith(head.strip())
    for copy in (tmp_path, ROOT / "benchmarks"):  # the latter lies in a checkout that is not its own
        monkeypatch.setattr(machine, "ROOT", copy)
        assert machine.commit() == "unknown: the sources are no git checkout"
