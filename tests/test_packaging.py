# SPDX-License-Identifier: Apache-2.0
"""The distributions: a source archive that builds, and a wheel that holds the package and nothing else.

The wheel is built from the unpacked source archive, so that a file the archive forgets is missed here, not by a user.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import textwrap
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.+)"', PROJECT, re.MULTILINE).group(1)

# One cold native build serves all of them.
pytestmark = [pytest.mark.slow(minutes=4), pytest.mark.xdist_group("packaging")]


def _build(kind: str, source: Path, out: Path) -> Path:
    """Runs the build backend in `source` as `python -m build --no-isolation` does; returns what it made."""
    code = f"import sys; from scikit_build_core.build import build_{kind}; print(build_{kind}(sys.argv[1]))"
    # Warnings of the native build are errors here: a wheel for strangers has none.
    environment = {**os.environ, "SDXL_FAST_CUDA": "off", "SKBUILD_CMAKE_DEFINE": "SDXL_FAST_WERROR=ON"}
    environment["PATH"] = sysconfig.get_path("scripts") + os.pathsep + environment["PATH"]
    command = [sys.executable, "-c", code, str(out)]
    run = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    return out / run.stdout.split()[-1]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return _build("sdist", ROOT, tmp_path_factory.mktemp("sdist"))


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("from_sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data") if hasattr(tarfile, "data_filter") else archive.extractall(folder)
    (source,) = folder.iterdir()
    yield _build("wheel", source, tmp_path_factory.mktemp("wheel"))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def names(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return [name for name in archive.namelist() if not name.endswith("/")]


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("unpacked")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def _tracked(*patterns: str) -> set[str]:
    listed = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listed.splitlines())


def _run(unpacked: Path, code: str) -> str:
    """Runs code where `sdxl_fast` is the unpacked wheel and everything else is what is installed.

    Without `site`, so that no .pth file of an editable installation puts the checkout in the way.
    """
    paths = dict.fromkeys([str(unpacked), sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *sys.path])
    known = [path for path in paths if path and Path(path).resolve() != ROOT]
    program = f"import sys; sys.path[:] = {known!r}\n" + textwrap.dedent(code)
    run = subprocess.run(
        [sys.executable, "-S", "-c", program], cwd=unpacked.parent, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_source_archive_is_complete(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    missing = {name for name in _tracked() if (ROOT / name).is_file()} - held
    assert not {name for name in missing if not name.startswith(".git")}


def test_wheel_holds_the_package_and_nothing_else(names: list[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert tops == {"sdxl_fast", f"sdxl_fast-{VERSION}.dist-info"}
    assert not [name for name in names if name.endswith((".cpp", ".cu", ".cuh", ".h", ".o", ".pyc"))]


def test_wheel_has_every_file_of_the_package(names: list[str]) -> None:
    expected = _tracked("sdxl_fast") | {f"sdxl_fast/{name}" for name in _tracked("triton_kernels")}
    assert {name for name in expected if name.endswith((".py", ".yaml", ".json", ".typed"))} <= set(names)
    assert expected - set(names) == set()


def test_wheel_has_the_native_parts_and_the_licence(names: list[str]) -> None:
    assert "sdxl_fast/lib/libsdxl_fast.so" in names
    assert len([name for name in names if re.fullmatch(r"sdxl_fast/_C\.[\w.-]+\.so", name)]) == 1
    assert any(re.search(r"dist-info/(licenses/)?LICENSE$", name) for name in names)


def test_wheel_is_for_this_python_and_platform(wheel: Path) -> None:
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    assert re.fullmatch(rf"sdxl_fast-{re.escape(VERSION)}-{tag}-{tag}-linux_\w+\.whl", wheel.name)


def test_metadata_names_the_command_and_the_requirements(unpacked: Path) -> None:
    (info,) = unpacked.glob("*.dist-info")
    assert "sdxl-fast = sdxl_fast.cli:main" in (info / "entry_points.txt").read_text()
    metadata = (info / "METADATA").read_text()
    assert "Requires-Dist: torch>=2.11" in metadata
    # In the core it would replace the Triton that torch's CUDA builds bring.
    assert re.search(r"^Requires-Dist: triton>=3\.6; .*extra == ['\"]triton", metadata, re.MULTILINE)
    assert "License-Expression: Apache-2.0" in metadata


def test_unpacked_wheel_works_by_itself(unpacked: Path) -> None:
    out = _run(
        unpacked,
        """
        import torch, sdxl_fast, sdxl_fast.triton_kernels
        from sdxl_fast import native, ops, use_backend
        with use_backend("cpu"):
            x = torch.randn(2, 8, 5, 5)
            y = ops.group_norm_silu(x, None, None, num_groups=4)
        torch.testing.assert_close(y, torch.nn.functional.silu(torch.nn.functional.group_norm(x, 4)))
        print(sdxl_fast.__file__, sdxl_fast.triton_kernels.__file__, native.load().__file__, native.library_path(),
              sep="\\n")
        print(sdxl_fast.__version__, native.build_info()["version"])
        """,
    ).splitlines()
    assert all(Path(line).is_relative_to(unpacked) for line in out[:4]), out
    assert out[4].split() == [VERSION, VERSION]


def test_the_bare_kernel_module_stays_out_of_reach(unpacked: Path) -> None:
    """`triton_kernels` is another project's name; engines that look for it must not find ours."""
    out = _run(unpacked, "import importlib.util; print(importlib.util.find_spec('triton_kernels'))")
    assert out.strip() == "None"
    # And where the folder itself is on the path, as in the checkout, it refuses.
    run = subprocess.run([sys.executable, "-c", "import triton_kernels"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode != 0 and "sdxl_fast.triton_kernels" in run.stderr
