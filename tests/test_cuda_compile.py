# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compile without a warning or a spill, and the committed table of resources is theirs."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

CUDA = Path(__file__).parent.parent / "csrc" / "cuda"


def _tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cuda_resources", CUDA / "resources.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


tool = _tool()
needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


def _committed() -> dict[str, dict[str, tuple[int, int]]]:
    """{kernel: {architecture: (registers, spilled bytes)}} of RESOURCES.md."""
    header, rows = [], {}
    for line in tool.TABLE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == "kernel":
            header = [name.removeprefix("sm_") for name in cells[3:]]
        elif cells[0].startswith("`"):
            pairs = [tuple(map(int, cell.split("/"))) for cell in cells[3:]]
            rows[cells[0].strip("`")] = dict(zip(header, pairs, strict=True))
    return rows


def test_table_covers_every_kernel_and_architecture() -> None:
    committed = _committed()
    assert set(committed) == tool.declared_kernels(), "run python csrc/cuda/resources.py"
    for name, row in committed.items():
        assert set(row) == set(tool.ARCHS)
        assert all(spills == 0 and 0 < registers < 255 for registers, spills in row.values()), name


def _assert_as_committed(source: Path, arch: str) -> None:
    kernels = tool.compile_source(source, arch)
    assert kernels, "ptxas reported no kernel"
    assert not [kernel for kernel in kernels if kernel.spills]
    committed = _committed()
    written_by = re.search(r"nvcc ([\d.]+\d)", tool.TABLE.read_text())
    assert written_by is not None
    # Another compiler allocates a little differently; far more than that means the table is stale.
    slack = 0 if written_by[1] == tool.compiler_version() else 24
    for name in {kernel.name for kernel in kernels}:
        registers = max(kernel.registers for kernel in kernels if kernel.name == name)
        assert abs(registers - committed[name][arch][0]) <= slack, f"{name}: {registers}; python csrc/cuda/resources.py"


# Seconds each; group_norm_silu.cu takes a quarter of a minute on one core.
QUICK = ("forward_diffusion.cu", "geglu.cu")


@needs_nvcc
def test_a_sample_compiles_as_in_the_table() -> None:
    """One quick source for one architecture, chosen by the text of all: every change of the kernels draws anew."""
    files = sorted(path for path in CUDA.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    drawn = int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:8], "big")
    pairs = list(itertools.product(QUICK, tool.ARCHS))
    name, arch = pairs[drawn % len(pairs)]
    _assert_as_committed(CUDA / name, arch)


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("arch", tool.ARCHS)
@pytest.mark.parametrize("name", [path.name for path in tool.sources()])
def test_every_source_compiles_as_in_the_table(name: str, arch: str) -> None:
    _assert_as_committed(CUDA / name, arch)


def test_a_kernel_is_found_behind_any_hash() -> None:
    """nvcc puts the hash of the file's path before the name; here its digits name lengths of their own."""
    for digits in ("00000000", "40c2", "9a1", "3"):
        mangled = f"_ZN42_GLOBAL__N__{digits}_8_geglu_cu_671422ae16geglu_fwd_kernelIfLi4EEEvPKT_PS1_ll"
        assert tool._plain_name(mangled, tool.declared_kernels()) == "geglu_fwd_kernel"
    with pytest.raises(ValueError, match="no declared kernel"):
        tool._plain_name("_Z12other_kernelv", tool.declared_kernels())


@needs_nvcc
def test_a_spill_and_a_warning_are_seen(tmp_path: Path) -> None:
    spilling = tmp_path / "spilling.cu"
    spilling.write_text(
        "__global__ void __launch_bounds__(1024, 2) greedy_kernel(const float* x, float* y) {\n"
        "    float a[48];\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 48; ++i) a[i] = x[i * 1024 + threadIdx.x];\n"
        "    __syncthreads();\n"
        "    float sum = 0;\n"
        "#pragma unroll\n"
        "    for (int i = 0; i < 48; ++i) y[i * 1024 + threadIdx.x] = (sum += a[i] * a[47 - i]);\n"
        "}\n"
    )
    (kernel,) = tool.compile_source(spilling, "90a")
    assert kernel.name == "greedy_kernel" and kernel.spills > 0
    warning = tmp_path / "warning.cu"
    warning.write_text("__global__ void idle_kernel() { int unused; }\n")
    with pytest.raises(RuntimeError, match="unused"):
        tool.compile_source(warning, "90a")
