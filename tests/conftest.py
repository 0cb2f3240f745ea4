# SPDX-License-Identifier: Apache-2.0
"""Set-up of the whole test run, and a count of what this machine could not run."""

from __future__ import annotations

import collections
import ctypes
import importlib
import os
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

# Triton decides when a kernel is defined whether it is interpreted, so this has to stand before any kernel module is
# imported. Without a GPU the interpreter is the only way to run them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
else:  # cuDNN's convolutions round float32 to TF32 unless told otherwise, a thousand times what the bounds allow
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


# Processes of a parallel run (pytest -n) share the cores: two that each use all of them slow one another many times.
if "PYTEST_XDIST_WORKER_COUNT" in os.environ:
    threads = max(1, len(os.sched_getaffinity(0)) // int(os.environ["PYTEST_XDIST_WORKER_COUNT"]))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)  # for the processes that tests start


CSRC = pathlib.Path(__file__).parent.parent / "csrc"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of tests that take longer than the default run has."""
    parser.addoption("--soak-calls", type=int, default=500, help="random calls of the slow test of test_soak.py")
    parser.addoption("--every-architecture", action="store_true", help="compile kernels for all, not for some")
    parser.addoption(
        "--diffusers-tests", metavar="DIR", help="a checkout of diffusers, whose SDXL tests are to pass too"
    )


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A tiny SDXL pipeline with random weights, structured like the embedded one; not to be written to."""
    from sdxl_fast.testing.toy import toy_pipeline

    return toy_pipeline(tmp_path_factory.mktemp("toy") / "toy")


@pytest.fixture
def networks_read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The folders of the networks whose weights are read during the test."""
    from sdxl_fast.models import loading

    read: list[str] = []
    load = loading._load_network

    def noted(folder: pathlib.Path, name: str, *others: Any, **more: Any) -> Any:
        read.append(name)
        return load(folder, name, *others, **more)

    monkeypatch.setattr(loading, "_load_network", noted)
    return read


@pytest.fixture(scope="session")
def tiny_vae(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An AutoencoderTiny with random weights that fits the toy pipeline; not to be written to."""
    from diffusers import AutoencoderTiny

    torch.manual_seed(0)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(8,) * 3,
        decoder_block_out_channels=(8,) * 3,
        num_encoder_blocks=(1,) * 3,
        num_decoder_blocks=(1,) * 3,
    )
    folder = tmp_path_factory.mktemp("vae") / "taesdxl"
    vae.save_pretrained(folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The CUDA sources compiled for this CPU over their emulation."""
    from sdxl_fast.testing import emulation

    return emulation.build(CSRC, tmp_path_factory.mktemp("emulation") / "libemulation.so")


@pytest.fixture
def kernels(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """(fwd, bwd) of an op as its Python adapter makes them for "cuda", on CPU tensors full of NaN where unwritten."""
    from sdxl_fast.ops import _native
    from sdxl_fast.testing import emulation

    guards: list[torch.Tensor] = []

    def scratch(size: int, like: torch.Tensor) -> torch.Tensor | None:
        buffer = torch.full((size + 256,), 0xFF, dtype=torch.uint8)  # NaN as floats
        buffer[size:] = emulation.GUARD
        guards.append(buffer[size:])
        return buffer

    binding = emulation.binding(library, CSRC)
    monkeypatch.setattr(_native, "binding", lambda device: binding)
    monkeypatch.setattr(_native, "scratch", scratch)
    monkeypatch.setattr(_native, "guard", lambda device, function: function)
    monkeypatch.setitem(_native.TAIL, "cuda", lambda x: 0)
    library.sdxl_fast_emulation_configure(4, 0)
    torch.use_deterministic_algorithms(True)
    yield lambda op: importlib.import_module(f"sdxl_fast.ops.{op}")._native_kernels("cuda")[:2]
    torch.use_deterministic_algorithms(False)
    for guard in guards:
        assert bool((guard == emulation.GUARD).all()), "a kernel wrote past its workspace"


def _minutes(item: pytest.Item) -> float:
    """What a slow test takes on one core, as its marker says."""
    marker = item.get_closest_marker("slow")
    return 0.0 if marker is None else float(marker.kwargs.get("minutes", 1))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest tests begin first, or the last core ends late; tests marked ``gpu`` skip without one."""
    items.sort(key=_minutes, reverse=True)
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
