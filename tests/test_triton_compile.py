# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel, as its launcher launches it, becomes machine code for every supported GPU without a spill."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from sdxl_fast.triton_kernels._attention_config import SHARED_BYTES

KERNELS = Path(__file__).parent.parent / "triton_kernels"
# Kernels with more registers than this leave fewer than two programs of four warps per scheduler.
MAX_REGISTERS = 168
# Attention and products live on registers and shared memory instead of occupancy, up to what a program may have.
MAX_RESIDENT_REGISTERS = 255
PRODUCTS = {"conv2d_kernel", "linear_geglu_kernel", "linear_kernel", "upsample_conv2d_kernel"}


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A Python where Triton compiles: this one may be interpreting, which is decided when kernels are defined."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


OTHERS = (80, 89, 100, 120)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Hopper in every dtype, and two others, drawn by the kernels' text; with --every-architecture all of them."""
    if "arch" in metafunc.fixturenames:
        text = b"".join(path.read_bytes() for path in sorted(KERNELS.glob("*.py")))
        first = hashlib.sha256(text).digest()[0] % 2
        drawn = OTHERS if metafunc.config.getoption("every_architecture") else OTHERS[first::2]
        found = [pytest.param(90, ("float32", "bfloat16", "float16"), id="sm_90")]
        found += [pytest.param(arch, ("bfloat16",), id=f"sm_{arch}", marks=pytest.mark.slow) for arch in drawn]
        metafunc.parametrize(("arch", "dtypes"), found)


def test_every_kernel_compiles_without_spills(arch: int, dtypes: tuple[str, ...], tmp_path: Path) -> None:
    report = tmp_path / "resources.json"
    flags = [flag for dtype in dtypes for flag in ("--dtype", dtype)]
    run = _python("-m", "sdxl_fast.triton_kernels._compile", "--arch", str(arch), *flags, "--json", str(report))
    assert run.returncode == 0, run.stdout + run.stderr
    print(run.stdout)
    results = json.loads(report.read_text())
    assert {r["arch"] for r in results} == {arch}
    resident = [r for r in results if "_attention_" in r["kernel"] or r["kernel"] in PRODUCTS]
    streaming = [r for r in results if r not in resident]
    assert {r["kernel"] for r in resident} > PRODUCTS
    assert not [r for r in resident if not 0 < r["registers"] <= MAX_RESIDENT_REGISTERS]
    assert not [r for r in streaming if not 0 < r["registers"] <= MAX_REGISTERS]
    assert not [r for r in results if r["registers"] * r["threads"] > 65536]  # an SM has no more: it would not launch
    assert max(r["shared_bytes"] for r in streaming) <= 48 * 1024
    assert max(r["shared_bytes"] for r in resident) <= SHARED_BYTES[arch]


def test_a_kernel_without_a_case_is_named() -> None:
    run = _python(
        "-c",
        "from sdxl_fast.triton_kernels import _compile\n"
        "import torch\n"
        "assert len(_compile.entry_points()) >= 23\n"
        "_compile.CASES = tuple(case for case in _compile.CASES if case is not _compile._geglu_cases)\n"
        "_compile.all_launches((torch.bfloat16,))\n",
    )
    assert run.returncode != 0
    assert "no compile case reaches ['geglu_bwd_kernel', 'geglu_fwd_kernel'" in run.stderr


def test_a_spill_is_seen() -> None:
    run = _python(
        "-c",
        "import dataclasses, torch\n"
        "from sdxl_fast.triton_kernels import _compile\n"
        "launches = _compile.all_launches((torch.bfloat16,))\n"
        "launch, fn = next(p for p in launches.items() if p[0].kernel == 'group_norm_silu_bwd_sums_kernel')\n"
        "squeezed = dataclasses.replace(launch, options=(*launch.options, ('maxnreg', 24)))\n"
        "print('stack', _compile.compile_launch(squeezed, fn, 90).stack_bytes)\n",
    )
    assert run.returncode == 0, run.stderr
    assert int(run.stdout.split()[-1]) > 0


def test_bare_name_is_refused() -> None:
    import sdxl_fast.triton_kernels

    root = Path(sdxl_fast.triton_kernels.__file__).parent
    code = (
        "import importlib.util, sys\n"
        f"spec = importlib.util.spec_from_file_location('triton_kernels', {str(root / '__init__.py')!r})\n"
        "spec.loader.exec_module(importlib.util.module_from_spec(spec))\n"
    )
    run = _python("-c", code)
    assert run.returncode != 0
    assert "import `sdxl_fast.triton_kernels` instead" in run.stderr
