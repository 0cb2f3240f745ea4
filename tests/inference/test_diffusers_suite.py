"""diffusers' own SDXL tests on optimized pipelines: whatever passes on stock ones passes on these.

Needs a checkout of diffusers of about the installed version and what its tests import, `pip install parameterized
requests-mock torchsde`. With `=`, or pytest takes DIR for tests of its own:

    pytest -s -m slow tests/inference/test_diffusers_suite.py --diffusers-tests=DIR

Pipelines of T2I-Adapter and PAG are not here: adapters and guidance of that kind run by the modules.
"""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

FILES = (
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl.py",
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_img2img.py",
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_inpaint.py",
    "pipelines/stable_diffusion_xl/test_stable_diffusion_xl_instruction_pix2pix.py",
    "pipelines/controlnet/test_controlnet_sdxl.py",
    "pipelines/controlnet/test_controlnet_sdxl_img2img.py",
    "pipelines/controlnet/test_controlnet_inpaint_sdxl.py",
    "lora/test_lora_layers_sdxl.py",
)


def _run(checkout: Path, file: str, report: Path, *options: str) -> tuple[set[str], set[str]]:
    """Names of the tests that passed and of those that did not."""
    plugins = ["-p", "no:cacheprovider", "-p", "sdxl_fast.testing.diffusers_suite"]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-W", "ignore", *plugins]
    subprocess.run([*command, f"--junitxml={report}", *options, f"tests/{file}"], cwd=checkout, check=False)
    passed, failed = set(), set()
    for case in ET.parse(report).getroot().iter("testcase"):
        name = f"{case.get('classname')}::{case.get('name')}"
        if case.find("failure") is not None or case.find("error") is not None:
            failed.add(name)
        elif case.find("skipped") is None:
            passed.add(name)
    return passed, failed


@pytest.mark.slow(minutes=3)
@pytest.mark.parametrize("file", FILES)
def test_what_passes_on_stock_pipelines_passes_on_optimized_ones(
    file: str, pytestconfig: pytest.Config, tmp_path: Path
) -> None:
    given = pytestconfig.getoption("diffusers_tests")
    if given is None:
        pytest.skip("needs --diffusers-tests=DIR, a checkout of diffusers")
    checkout = Path(given).resolve()
    stock, unable = _run(checkout, file, tmp_path / "stock.xml", "--sdxl-fast-stock")
    print(f"{file}: stock passed {len(stock)}, failed {sorted(unable)}")
    assert len(stock) > 15, "too few tests ran to say anything"
    counts = tmp_path / "calls.json"
    passed, failed = _run(checkout, file, tmp_path / "optimized.xml", "--sdxl-fast-calls", str(counts))
    print(f"{file}: optimized passed {len(passed)}, failed {sorted(failed)}")
    assert not stock & failed, "\n".join(sorted(stock & failed))
    assert stock <= passed, f"not run: {sorted(stock - passed)}"
    for network, ways in json.loads(counts.read_text()).items():
        assert ways["packed"] > sum(ways.values()) / 5, f"{network} ran by its modules: {ways}"
