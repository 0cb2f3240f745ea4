# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels compile without a warning or a spill, and the committed table of resources is theirs."""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import re
import shutil
import subprocess
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
            pairs = {arch: cell for arch, cell in zip(header, cells[3:], strict=True) if cell != "-"}
            rows[cells[0].strip("`")] = {arch: tuple(map(int, cell.split("/"))) for arch, cell in pairs.items()}
    return rows


def test_table_covers_every_kernel_and_architecture() -> None:
    committed = _committed()
    products = {f"product_kernel {path.stem}" for path in tool.instantiations()}
    expected = tool.declared_kernels() - {"product_kernel"} | products
    assert set(committed) == expected, "run python csrc/cuda/resources.py"
    for name, row in committed.items():
        assert set(row) == set(tool.HOPPER_ARCHS if name in products else tool.ARCHS)
        assert all(spills == 0 and 0 < registers < 255 for registers, spills in row.values()), name


def _assert_as_committed(source: Path, arch: str) -> None:
    kernels = tool.compile_source(source, arch)
    assert bool(kernels) != tool.is_host_side(source), "ptxas reported no kernel, or one too many"
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


def _draw(count: int) -> int:
    """A number below `count` drawn by the text of all kernels: every change of them draws anew."""
    files = sorted(path for path in CUDA.iterdir() if path.suffix in (".cu", ".cuh", ".h"))
    return int.from_bytes(hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()[:8], "big") % count


@needs_nvcc
def test_a_sample_compiles_as_in_the_table() -> None:
    """One quick source for one architecture."""
    pairs = list(itertools.product(QUICK, tool.ARCHS))
    name, arch = pairs[_draw(len(pairs))]
    _assert_as_committed(CUDA / name, arch)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every source for one of its architectures, another one for the next, or with --every-architecture for all."""
    if "arch" in metafunc.fixturenames:
        every = metafunc.config.getoption("every_architecture")
        pairs = []
        for index, path in enumerate(path for path in tool.sources() if path.parent == CUDA):
            archs = tool.archs_of(path)
            drawn = archs if every else [archs[(_draw(len(archs)) + index) % len(archs)]]
            pairs += [(path.name, arch) for arch in drawn]
        metafunc.parametrize(("name", "arch"), pairs)


@needs_nvcc
@pytest.mark.slow
def test_every_source_compiles_as_in_the_table(name: str, arch: str) -> None:
    _assert_as_committed(CUDA / name, arch)


def _cuobjdump() -> str | None:
    """The toolkit's, or the one Triton brings."""
    found = shutil.which("cuobjdump")
    package = importlib.util.find_spec("triton")
    if found is None and package is not None and package.origin is not None:
        found = shutil.which(str(Path(package.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"))
    return found


# Of the instantiations of the matrix kernel one of each element type, drawn by the text of all.
PRODUCTS = [path.stem for path in tool.instantiations()]
_TEXT = b"".join(path.read_bytes() for path in sorted(tool.HOPPER.iterdir()))
DRAWN = [
    names[int.from_bytes(hashlib.sha256(_TEXT).digest()[:8], "big") % len(names)]
    for names in ([name for name in PRODUCTS if name.startswith(dtype)] for dtype in ("bf16", "e4m3"))
]


@needs_nvcc
@pytest.mark.slow
@pytest.mark.skipif(tool.cutlass() is None, reason="CUTLASS's headers are not installed")
@pytest.mark.parametrize("name", DRAWN)
def test_matrix_kernels_use_the_tensor_cores_of_hopper(name: str, tmp_path: Path) -> None:
    """No spill, the warp-group products of their dtype (HGMMA, QGMMA for float8), and none that wait for each other."""
    target = tmp_path / "object.o"
    (kernel,) = tool.compile_source(tool.HOPPER / f"{name}.cu", "90a", target=target)
    assert kernel.name == f"product_kernel {name}" and kernel.spills == 0
    assert kernel.registers <= _committed()[kernel.name]["90a"][0]
    dump = _cuobjdump()
    if dump is None:
        pytest.skip("no cuobjdump")
    sass = subprocess.run([dump, "-sass", str(target)], capture_output=True, text=True, check=True).stdout
    columns = re.findall(r"([HQ])GMMA\.64x(\d+)x", sass)
    wanted = ("Q" if name.startswith("e4m3") else "H", name.split("_")[1])
    assert set(columns) == {wanted}
    assert "UTMALDG" in sass  # and its operands come by TMA


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
