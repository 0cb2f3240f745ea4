# SPDX-License-Identifier: Apache-2.0
"""Set-up of the whole test run, and a count of what this machine could not run."""

from __future__ import annotations

import collections
import os
import pathlib

import pytest
import torch

# Triton decides when a kernel is defined whether it is interpreted, so this has to stand before any kernel module is
# imported. Without a GPU the interpreter is the only way to run them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny SDXL pipeline with random weights, structured like the embedded one; not to be written to."""
    from sdxl_fast.testing.toy import toy_pipeline

    return toy_pipeline(tmp_path_factory.mktemp("toy") / "toy")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` skip without one, whatever ``-m`` selected."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints how many tests each unavailable backend skipped, and why."""
    reasons: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        if isinstance(report.longrepr, tuple):
            text = report.longrepr[2].removeprefix("Skipped: ")
            if text.startswith("backend "):
                reasons[text] += 1
    if reasons:
        terminalreporter.section("backends not run here")
        for text, count in reasons.most_common():
            terminalreporter.write_line(f"{count:5d} tests: {text}")
