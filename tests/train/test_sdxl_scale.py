"""The SDXL recipes on SDXL's true configuration: they run, and fit a machine of 24 GiB."""

from __future__ import annotations

import json
import math
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.large
@pytest.mark.parametrize("recipe", ["sdxl_lightning_80gb", "sdxl_add_80gb"])
def test_one_discriminator_and_one_student_step(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    command = [sys.executable, "-m", "sdxl_fast.testing.sdxl_scale", recipe]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    with capsys.disabled():
        print(f"\n{recipe}: peak {found['peak_gib']} GiB, {found['seconds_of_the_steps']} s; {found['logged']}")
    assert found["student_parameters"] == 196_751_360
    assert found["moved"] == [True, True]
    assert {"d_loss", "d_grad_norm", "g_loss", "grad_norm"} <= found["logged"].keys()
    assert all(math.isfinite(value) for value in found["logged"].values())
    assert found["peak_gib"] < 24
