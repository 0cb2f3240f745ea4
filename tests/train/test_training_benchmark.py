# SPDX-License-Identifier: Apache-2.0
"""The training benchmark: its peer computes the same steps, one that does not is refused, and what the row says."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from sdxl_fast.train.config import LightningConfig, load_recipe

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks import training  # noqa: E402
from benchmarks.plain_training import PlainLoop  # noqa: E402
from benchmarks.results import ResultsFile  # noqa: E402
from benchmarks.suite import GATE_FAILED, stage_verdicts  # noqa: E402
from benchmarks.training_ground import Ground, RandomSource, Scene  # noqa: E402

PLAIN = list(training.PLAIN)


def test_the_plain_loop_has_our_gradients() -> None:
    verdicts = training.gate()
    assert list(verdicts) == [*PLAIN, training.OURS]
    assert all(verdict.passed for verdict in verdicts.values()), verdicts


def test_a_loop_that_computes_something_else_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    real = PlainLoop.real
    monkeypatch.setattr(PlainLoop, "real", lambda self, start: 1.01 * real(self, start))
    verdicts = training.gate()
    assert not any(verdict.passed for verdict in verdicts.values())
    monkeypatch.setattr(training, "gate", lambda device: verdicts)
    row = training.measure(rounds=1, steps=1, batch=4, threads=1)
    assert row["about"].startswith("Nothing to compare")
    assert all(GATE_FAILED in found["refused"] for found in row["contestants"].values())


def test_what_the_row_says_of_memory() -> None:
    held = {PLAIN[0]: 400, PLAIN[1]: 600, training.OURS: 300}
    said = training.about({name: {"memory_bytes": size * training.MIB} for name, size in held.items()})
    assert "sdxl_fast 300 MiB" in said and "ours over the leaner plain one 0.75" in said


def test_what_the_row_says_of_the_host() -> None:
    runs = [{"memory_bytes": 2, "kernel_seconds": 0.5}, {"memory_bytes": 3, "kernel_seconds": 0.6}]
    entry = training._entry(runs, [1.0, 1.0])
    assert (entry["memory_bytes"], entry["kernel_share"]) == (3, 0.5)
    plain = training._entry([{"memory_bytes": 4, "kernel_seconds": 0.95}], [1.0])
    said = training.about({training.OURS: entry, PLAIN[0]: plain})
    assert said.endswith(f"the GPU computes: {training.OURS} 50% (waits for the host), {PLAIN[0]} 95%.")
    assert "kernel_share" not in training._entry([{"memory_bytes": 2}], [1.0])


def test_one_that_runs_out_of_memory_does_not_take_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(name: str, *args: Any) -> dict[str, Any]:
        if name == PLAIN[0]:
            raise RuntimeError(f"{name} ended with 1: out of memory")
        return {"seconds": [2.0 if name in PLAIN else 1.0], "memory_bytes": 100}

    passed = training.Verdict(True, "as it should be")
    monkeypatch.setattr(training, "gate", lambda device: dict.fromkeys((*PLAIN, training.OURS), passed))
    monkeypatch.setattr(training, "_in_a_process", run)
    row = training.measure(threads=1, rounds=2, steps=1, batch=4)
    assert row["contestants"][PLAIN[0]]["refused"].endswith("ended with 1: out of memory")
    assert row["contestants"][training.OURS]["stages"][training.TIMED]["rounds"] == 2
    assert row["ratios"][training.TIMED]["median"] == 2.0


def test_a_row_is_judged_by_the_faster_and_the_leaner_plain_loop() -> None:
    seconds = {PLAIN[0]: [3.0, 3.0], PLAIN[1]: [2.0, 4.0], training.OURS: [2.0, 2.0], training.COMPILED: [1.0, 2.0]}
    held = dict(zip(seconds, (500, 400, 300, 290), strict=True))
    contestants = {name: {"memory_bytes": held[name]} for name in seconds}
    row = {"contestants": contestants, **training.judged("sdxl", seconds, contestants)}
    (_, speed, fast), (what, share, lean) = stage_verdicts(row)
    assert (speed, fast) == (2.25, True)
    assert share == 290 / 400 and not lean and what == f"{training.COMPILED}, at most 0.7 of {PLAIN[1]}'s memory"
    contestants[training.COMPILED]["memory_bytes"] = 285
    assert stage_verdicts(row)[1][2]
    assert training.judged("embedded", seconds, {PLAIN[0]: contestants[PLAIN[0]]}) == {"ratios": {}, "targets": []}


def test_frozen_weights_and_recomputation_are_the_same_on_both_sides() -> None:
    """As SDXL's size asks for: frozen networks in bf16, what trains in float32, blocks computed anew."""
    settings = ("frozen=bf16", "gradient_checkpointing=true", "batch=2")
    task = Ground.lay(Scene(), *settings).ours()
    loop = Ground.lay(Scene(), *settings).plain(channels_last=True)
    for student, taught, d in (
        (task.student.unet, task.teacher.unet, task.discriminator),
        (loop.student, loop.teacher, loop.discriminator),
    ):
        assert {p.dtype for p in taught.parameters()} == {torch.bfloat16}
        assert {p.dtype for p in student.parameters() if not p.requires_grad} == {torch.bfloat16}
        assert {p.dtype for p in [*d.parameters(), *student.parameters()] if p.requires_grad} == {torch.float32}
        assert student.is_gradient_checkpointing and student.training
    assert sum(p.numel() for p in task.student.unet.parameters()) == sum(p.numel() for p in loop.student.parameters())
    start = training._starts(task, "student")
    with sdpa_kernel(SDPBackend.MATH):
        loop._descend(loop.d_loss(start), loop.d_optimizer)
        loop._descend(loop.g_loss(start), loop.optimizer)
        assert {"d_loss", "g_loss"} <= task.step(0).keys()


def test_sdxls_scene_is_the_recipe_for_one_gpu() -> None:
    scene = Scene("sdxl", "cpu", recompute=True)
    config = load_recipe(scene.recipe, scene.settings)
    assert isinstance(config, LightningConfig)
    assert (config.accumulate, config.gradient_checkpointing, config.frozen) == (1, True, "bf16")
    assert next(stage for stage in config.stages if stage.name == "4-step").phases[0].condition
    source = RandomSource(scene.pipeline)
    assert source.shapes == [(4, 128, 128)] and (source.tokens, source.width, source.pooled) == (77, 2048, 1280)


@pytest.mark.slow
def test_each_contestant_is_timed_in_a_process_of_its_own(tmp_path: Path) -> None:
    results = ResultsFile.create(tmp_path, "training", {"device": "made up", "date": "2020-01-01"})
    training.write(results, training.measure(rounds=1, steps=1, batch=4, threads=torch.get_num_threads()))
    (row,) = ResultsFile.load(tmp_path / "training.json").data["end_to_end"]
    for name in training.NAMES:
        contestant = row["contestants"][name]
        assert contestant["stages"][training.TIMED]["best"] > 0
        assert contestant["memory_bytes"] > 30 * training.MIB, "weights, gradients and moments alone"
