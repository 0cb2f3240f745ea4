# SPDX-License-Identifier: Apache-2.0
"""What CMake decides about CUDA in a tree that was configured before, and where it looks for CUTLASS's headers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
CMAKE = shutil.which("cmake", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))

pytestmark = pytest.mark.skipif(CMAKE is None, reason="CMake is not installed")

FINDS = """cmake_minimum_required(VERSION 3.24)
project(finds LANGUAGES NONE)
include(cmake/cuda.cmake)
sdxl_fast_find_cutlass(headers)
message(STATUS "headers: ${headers}")
"""


def _configure(source: Path, build: Path, *defined: str, **environment: str) -> subprocess.CompletedProcess[str]:
    cleared = {name: value for name, value in os.environ.items() if name not in ("SDXL_FAST_CUDA", "CUTLASS_DIR")}
    command = [str(CMAKE), "-S", str(source), "-B", str(build), *(f"-D{each}" for each in defined)]
    return subprocess.run(command, env={**cleared, **environment}, capture_output=True, text=True, timeout=300)


def test_the_environment_decides_in_a_tree_that_was_configured_before(tmp_path: Path) -> None:
    first = _configure(CSRC, tmp_path, "SDXL_FAST_PYTHON=OFF", SDXL_FAST_CUDA="off")
    assert first.returncode == 0, first.stderr
    assert _configure(CSRC, tmp_path).returncode == 0
    again = _configure(CSRC, tmp_path, SDXL_FAST_CUDA="perhaps")
    assert again.returncode and "SDXL_FAST_CUDA is 'perhaps'" in again.stderr


def _headers(folder: Path) -> Path:
    (folder / "cutlass").mkdir(parents=True)
    (folder / "cutlass" / "cutlass.h").touch()
    return folder


def test_cutlass_is_found_beside_the_sources_and_where_the_environment_says(tmp_path: Path) -> None:
    source, build = tmp_path / "csrc", tmp_path / "build"
    shutil.copytree(CSRC / "cmake", source / "cmake")
    (source / "CMakeLists.txt").write_text(FINDS)
    no_package = "CMAKE_DISABLE_FIND_PACKAGE_Python=ON"

    def found(**environment: str) -> str:
        done = _configure(source, build, no_package, **environment)
        assert done.returncode == 0, done.stderr
        return next(line for line in done.stdout.splitlines() if "headers:" in line).partition("headers:")[2].strip()

    assert found() == ""
    beside = _headers(tmp_path / ".cutlass-4.2.0" / "cutlass_library" / "source" / "include")
    assert Path(found()).resolve() == beside.resolve()
    own = _headers(tmp_path / "own" / "include")
    assert Path(found(CUTLASS_DIR=str(tmp_path / "own"))).resolve() == own.resolve()
