# SPDX-License-Identifier: Apache-2.0
"""Building the native library for the GPU that is here, and starting again with it."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import torch

from benchmarks import command, machine


@dataclasses.dataclass(frozen=True)
class Built:
    """What a build came to.

    Attributes:
        problem: why the CUDA kernels cannot be used now, or "".
        installed: whether the library was installed just now; a process that was running before does not find it.
    """

    problem: str
    installed: bool


def cuda_problem() -> str:
    """Returns why the native library cannot serve the GPU, or "": asked in a fresh process, since a load is kept."""
    return _asked("from sdxl_fast import native; print(native.unavailable_reason('cuda') or '')")


def _asked(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=machine.ROOT, capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else f"sdxl_fast does not import: {done.stderr.strip()[-300:]}"


def matrix_problem() -> str:
    """Returns why the matrix kernels, which are for compute capability 9.0 alone, are missing on such a GPU, or ""."""
    if torch.cuda.get_device_capability() != (9, 0):
        return ""
    return _asked("from sdxl_fast.ops import _hopper; print(_hopper.unavailable_reason() or '')")


def build() -> Built:
    """Builds the native library for the GPU that is here, if need be."""
    problem = cuda_problem()
    if not problem:
        return Built("", installed=False)
    command.say(f"building the CUDA kernels ({problem})")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-build-isolation", "--no-deps", "-e", "."]
    environment = {**os.environ, "SDXL_FAST_CUDA": "on"}
    started = time.monotonic()
    done = subprocess.run(install, cwd=machine.ROOT, env=environment)
    command.say(f"build: exit status {done.returncode} after {time.monotonic() - started:.0f} s")
    return Built(cuda_problem(), installed=done.returncode == 0)


def build_and_restart(module: str, given: Sequence[str], *, deadline: float = math.inf) -> str:
    """Builds if need be, and starts the module again when that installed something: an editable install's import hook
    is set up when Python starts, so this process would find no library to measure.

    Args:
        module: of the command that is running.
        given: its arguments.
        deadline: seconds of the monotonic clock, handed on as ``--minutes``.

    Returns:
        why there are no CUDA kernels, or "".
    """
    built = build()
    if built.problem:
        command.say(f"WARNING: no CUDA kernels: {built.problem}")
        return built.problem
    missing = matrix_problem()
    if missing:
        command.say(f"WARNING: {missing}")
    if built.installed:
        again(module, [*given, "--skip-build"], deadline=deadline)
    return built.problem


def again(module: str, given: Sequence[str], *, deadline: float = math.inf) -> None:
    """Replaces this process by ``python -m module given``, for the minutes that are left until ``deadline``."""
    left = [] if deadline == math.inf else ["--minutes", f"{max((deadline - time.monotonic()) / 60, 0.01):.2f}"]
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *given, *left])
