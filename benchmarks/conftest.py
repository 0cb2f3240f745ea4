# SPDX-License-Identifier: Apache-2.0
"""``pytest benchmarks``: the same contestants and cases under pytest-benchmark, each after its gate."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.e2e.bench_one_step import OURS, STOCK
from benchmarks.measure import Prepared
from benchmarks.suite import OpBench, Options, Work, contestants
from sdxl_fast import OneStepPipeline
from sdxl_fast.errors import ModelError
from sdxl_fast.testing.toy import toy_pipeline

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="benchmarks: small shapes, to try the code")


@functools.lru_cache(maxsize=1)
def _prepared(op: str, work: Work, quick: bool) -> Prepared:
    """The inputs and the gate of a case, kept while pytest goes through its contestants and modes."""
    return Prepared(work, Options(DEVICE, sets=1 if quick else None))


@dataclass(frozen=True)
class Entry:
    """One contestant on one case."""

    work: Work
    mode: str
    contestant: str
    quick: bool

    def __str__(self) -> str:
        return f"{self.work.case.name}-{self.work.dtype}-{self.mode}-{self.contestant}".replace(" ", "-")

    def run(self, benchmark: Any) -> None:
        """Judges the contestant, then hands its call to pytest-benchmark."""
        bench = self.work.bench
        prepared = _prepared(bench.subject.op, self.work, self.quick)
        contestant = next(c for c in contestants(bench, DEVICE, compile=False) if c.name == self.contestant)
        try:
            detail = prepared.judge(contestant)
        except LookupError as reason:
            if prepared.unavailable(contestant) is None:
                pytest.fail(str(reason))
            pytest.skip(f"backend {contestant.backend}: {reason}")
        calls = itertools.cycle(prepared.calls(contestant, self.mode))
        benchmark.group = " ".join(self.work.key(self.mode).values())
        benchmark.extra_info["gate"] = detail

        def call() -> None:
            next(calls)()
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark(call)


def _entries(bench: OpBench, quick: bool) -> Iterator[Entry]:
    names = [c.name for c in contestants(bench, DEVICE, compile=False)]
    for case, dtype in itertools.product(bench.cases(DEVICE, quick=quick), bench.dtypes):
        work = Work(bench, case, dtype, bench.modes)
        for mode, name in itertools.product(bench.modes, names):
            yield Entry(work, mode, name, quick)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Gives an op's test its contestants and cases, and the test of a model its two ways to run."""
    if "entry" in metafunc.fixturenames:
        entries = list(_entries(metafunc.module.BENCH, metafunc.config.getoption("--quick")))
        metafunc.parametrize("entry", entries, ids=str)
    if "arrangement" in metafunc.fixturenames:
        metafunc.parametrize("arrangement", [OURS, STOCK])


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> OneStepPipeline:
    """The embedded pipeline; a tiny one with random weights under --quick."""
    if request.config.getoption("--quick"):
        return OneStepPipeline.from_pretrained(toy_pipeline(tmp_path_factory.mktemp("toy") / "toy"), device=DEVICE)
    try:
        return OneStepPipeline.from_pretrained(device=DEVICE)
    except ModelError as reason:
        pytest.skip(str(reason))
