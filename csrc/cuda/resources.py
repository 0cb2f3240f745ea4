# SPDX-License-Identifier: Apache-2.0
"""Compiles the CUDA sources for every supported GPU and writes what each kernel takes to RESOURCES.md.

    python csrc/cuda/resources.py                       # all architectures, rewrites RESOURCES.md
    python csrc/cuda/resources.py --arch 90a --print    # one of them, only shown
    python csrc/cuda/resources.py --source geglu        # the rows of one file, the others stay as they are

Needs nvcc, no GPU, and for the matrix kernels of hopper/ CUTLASS's headers: in CUTLASS_DIR, or in the package
nvidia-cutlass. Warnings are errors and so is a register spill.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
TABLE = HERE / "RESOURCES.md"
HOPPER = HERE / "hopper"
ARCHS = ("80", "86", "89", "90a", "100a", "120")
HOPPER_ARCHS = ("90a",)
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr", "--Werror=all-warnings")
HOST_FLAGS = "-Xcompiler=-Wall,-Wextra,-Werror"

_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads"
    r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.S,
)


@dataclass(frozen=True)
class Kernel:
    """One instantiation as ptxas reports it; sizes in bytes."""

    name: str
    arch: str
    registers: int
    spills: int
    shared: int


def sources() -> list[Path]:
    """The .cu files: one per op, and one per instantiation of the matrix kernel."""
    return [*sorted(HERE.glob("*.cu")), *sorted(HOPPER.glob("*.cu"))]


def is_host_side(source: Path) -> bool:
    """Whether a source only calls the matrix kernel, whose instantiations are files of their own."""
    return source.name == "run.cu" or '#include "matrix.h"' in source.read_text()


def archs_of(source: Path) -> tuple[str, ...]:
    """The architectures a source is compiled for."""
    return HOPPER_ARCHS if source.parent == HOPPER or is_host_side(source) else ARCHS


def instantiations() -> list[Path]:
    """The files of the matrix kernel's instantiations."""
    return [path for path in sorted(HOPPER.glob("*.cu")) if not is_host_side(path)]


def declared_kernels(files: Iterable[Path] | None = None) -> set[str]:
    """Names of all __global__ functions in some files and the headers here; by default in all sources."""
    headers = (*HERE.glob("*.cuh"), *HOPPER.glob("*.cuh"))
    text = "".join(path.read_text() for path in (*(files or sources()), *headers))
    return set(re.findall(r"__global__[^;{]*?\b(\w+_kernel)\s*\(", text))


def cutlass() -> Path | None:
    """The folder of CUTLASS's headers, or None where there is none."""
    candidates = [Path(folder) for folder in (os.environ.get("CUTLASS_DIR"),) if folder]
    candidates += [Path(folder) / "cutlass_library" / "source" for folder in HERE.parent.parent.glob(".cutlass-*")]
    package = importlib.util.find_spec("cutlass_library")
    if package is not None:
        candidates += [Path(folder) / "source" for folder in package.submodule_search_locations or ()]
    found = (path for folder in candidates for path in (folder / "include", folder))
    return next((path for path in found if (path / "cutlass" / "cutlass.h").is_file()), None)


def _flags_of(source: Path) -> list[str]:
    if source.parent != HOPPER:
        return []
    headers = cutlass()
    if headers is None:
        raise RuntimeError("the matrix kernels need CUTLASS: set CUTLASS_DIR or install nvidia-cutlass==4.2.0.0")
    return ["-isystem", str(headers), "-DCUTE_SM90_EXTENDED_MMA_SHAPES_ENABLED"]


def _plain_name(mangled: str, declared: Iterable[str]) -> str:
    """The declared kernel that a mangled name stands for.

    Mangling writes a name behind its length. Reading numbers from the left would go wrong: nvcc names an anonymous
    namespace after a hash of the path, whose digits can be anything.
    """
    found = [name for name in declared if f"{len(name)}{name}" in mangled]
    if len(found) != 1:
        raise ValueError(f"{mangled} is {' or '.join(sorted(found)) or 'no declared kernel'}")
    return found[0]


def compile_source(source: Path, arch: str, nvcc: str = "nvcc", target: Path | None = None) -> list[Kernel]:
    """Every kernel of one file for one architecture; the object goes to ``target`` if one is given.

    Raises RuntimeError with the compiler's text on any warning.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *FLAGS, *_flags_of(source), HOST_FLAGS, "-Xptxas=-v"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}"]
        command += ["-c", str(source), "-o", str(target or Path(folder) / "object.o")]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{run.stdout}{run.stderr}")
    kernels, declared = [], declared_kernels([source])
    for entry in _ENTRY.finditer(run.stdout + run.stderr):
        shared = re.search(r"(\d+) bytes smem", entry["rest"])
        spills = int(entry["stores"]) + int(entry["loads"])
        size = int(shared[1]) if shared else 0
        name = _plain_name(entry["name"], declared) + (f" {source.stem}" if source.parent == HOPPER else "")
        kernels.append(Kernel(name, arch, int(entry["registers"]), spills, size))
    return kernels


def rows(kernels: Iterable[Kernel], archs: Iterable[str]) -> dict[str, str]:
    """Per kernel its line: for each architecture the most registers and spilled bytes of its instantiations."""
    by_name: dict[str, dict[str, list[Kernel]]] = defaultdict(lambda: defaultdict(list))
    for kernel in kernels:
        by_name[kernel.name][kernel.arch].append(kernel)
    lines = {}
    for name, of in by_name.items():
        every = [kernel for group in of.values() for kernel in group]
        cells = [
            f"{max(k.registers for k in of[arch])} / {max(k.spills for k in of[arch])}" if arch in of else "-"
            for arch in archs
        ]
        count, shared = len(every) // len(of), max(k.shared for k in every)
        lines[name] = f"| `{name}` | {count} | {shared} | " + " | ".join(cells) + " |"
    return lines


def committed_rows() -> dict[str, str]:
    """What ``rows`` returned when the table was written."""
    return {line.split("`")[1]: line for line in TABLE.read_text().splitlines() if line.startswith("| `")}


def table(lines: dict[str, str], archs: Iterable[str]) -> str:
    """Markdown of all rows, by name."""
    head = ["kernel", "instantiations", "shared memory", *(f"sm_{arch}" for arch in archs)]
    text = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *(lines[name] for name in sorted(lines))]
    return "\n".join(text) + "\n"


def compiler_version(nvcc: str = "nvcc") -> str:
    """As `13.0.88`: register allocation changes even between builds of one release."""
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return re.findall(r"V([\d.]+)", text)[0]


HEADER = """# What the CUDA kernels take

Generated by `resources.py` with nvcc {compiler}. For each architecture: the most registers of any instantiation
(element type, vector width, layout, activation) and the bytes it spills, which must be 0; - where it is not built.
Shared memory in bytes, static; `product_kernel`, of which every instantiation is a row, takes at launch what is left of
227 KiB in whole stages of its ring.

"""


def main(argv: list[str] | None = None) -> int:
    """Returns 1 if anything spills."""
    parser = argparse.ArgumentParser(description="Registers, spills and shared memory of every CUDA kernel.")
    parser.add_argument("--arch", action="append", choices=ARCHS, help="default: all")
    parser.add_argument("--source", action="append", help="only this file, as geglu or bf16_160; other rows stay")
    parser.add_argument("--print", action="store_true", dest="show", help="show the table instead of writing it")
    args = parser.parse_args(argv)
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        parser.error("nvcc is not on PATH")
    unknown = set(args.source or ()) - {source.stem for source in sources()}
    if unknown:
        parser.error(f"no such source: {', '.join(sorted(unknown))}")
    if args.arch and not args.show:
        parser.error("the table is of all architectures: --arch goes with --print")
    archs = [arch for arch in ARCHS if arch in (args.arch or ARCHS)]
    kernels = [
        kernel
        for source in sources()
        if args.source is None or source.stem in args.source
        for arch in archs_of(source)
        if arch in archs
        for kernel in compile_source(source, arch, nvcc)
    ]
    found = rows(kernels, archs)
    if args.show:
        print(table(found, archs), end="")
    else:
        kept = committed_rows() if args.source else {}
        TABLE.write_text(HEADER.format(compiler=compiler_version(nvcc)) + table(kept | found, archs))
    return int(any(k.spills for k in kernels))


if __name__ == "__main__":
    sys.exit(main())
