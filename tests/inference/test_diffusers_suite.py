"""diffusers' own SDXL pipeline tests on optimized pipelines: whatever passes on stock ones passes on these.

Needs a checkout of diffusers of the installed version: `pytest tests/inference/test_diffusers_suite.py
--diffusers-tests DIR`.
"""

from __future__ import annotations

import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

FILES = (
    "stable_diffusion_xl/test_stable_diffusion_xl.py",
    "stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
    "stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py",
    "controlnet/test_controlnet_sdxl.py",
)


def _run(checkout: Path, report: Path, *options: str) -> tuple[set[str], set[str]]:
    """Names of the tests that passed and of those that did not."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "sdxl_fast.testing.diffusers_suite",
    ]
    files = [f"tests/pipelines/{file}" for file in FILES if (checkout / "tests" / "pipelines" / file).is_file()]
    subprocess.run([*command, f"--junitxml={report}", *options, *files], cwd=checkout, check=False)
    passed, failed = set(), set()
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
        elif case.find("skipped") is None:
            passed.add(name)
    return passed, failed


@pytest.mark.slow
def test_what_passes_on_stock_pipelines_passes_on_optimized_ones(pytestconfig: pytest.Config, tmp_path: Path) -> None:
    given = pytestconfig.getoption("diffusers_tests")
    if given is None:
        pytest.skip("needs --diffusers-tests DIR, a checkout of diffusers")
    checkout = Path(given).resolve()
    stock, _ = _run(checkout, tmp_path / "stock.xml", "--sdxl-fast-stock")
    assert len(stock) > 50, "too few tests ran to say anything"
    passed, failed = _run(checkout, tmp_path / "optimized.xml")
    assert not stock & failed, "\n".join(sorted(stock & failed))
    assert stock <= passed
