# SPDX-License-Identifier: Apache-2.0
"""The benchmarks of whole pipelines: who may be timed, what is counted, what the file says."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # benchmarks are part of the checkout, not of the package

from benchmarks import report, stage_plot  # noqa: E402
from benchmarks.e2e import __main__ as everything  # noqa: E402
from benchmarks.e2e import bench_cold_start, bench_pipelines, floor, peers, profile, random_model  # noqa: E402
from benchmarks.e2e.bench_pipelines import AGAINST_COMPILED, AGAINST_STOCK, MODES, Request  # noqa: E402
from benchmarks.results import ResultsFile  # noqa: E402
from benchmarks.suite import stage_verdicts  # noqa: E402
from benchmarks.timing import summarise  # noqa: E402
from sdxl_fast import OneStepPipeline, ops  # noqa: E402
from sdxl_fast.models.config import TOY  # noqa: E402
from sdxl_fast.testing.toy import toy_pipeline  # noqa: E402

RATES = {"float32": 1e9, "bfloat16": 1e9}
CEILINGS = {"copy_bytes_per_s": 1e12, "copies": {"torch": 1e12}, "matrix_flops_per_s": RATES}
MACHINE = {"device": "made up", "date": "2020-01-01", "device_type": "cpu"}
STAGES = {*peers.STAGES, "total"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return toy_pipeline(tmp_path_factory.mktemp("toy") / "toy", few_steps=())


def test_pipelines_draw_the_same_and_are_timed_by_stage(folder: Path, tmp_path: Path) -> None:
    results = ResultsFile.create(tmp_path, "made-up", MACHINE)
    results.set("ceilings", CEILINGS)
    others = {"float8": True, "third_parties": True}
    request = Request(str(folder), "bfloat16", 2, rounds=3, budget_s=0.0, size=(64, 32), **others)
    said: list[str] = []
    for _ in range(2):
        bench_pipelines.run([request], "cpu", results, tell=said.append)
    rows = results.data["end_to_end"]
    assert len(said) == len(rows) == len(MODES)
    for row in rows:
        assert row["case"] == "batch 2, 64x32 px"
        for name in (*peers.STOCK, *peers.OURS, peers.FLOAT8):
            found = row["contestants"][name]
            assert set(found["stages"]) == STAGES, found
            medians = {stage: time["median"] for stage, time in found["stages"].items()}
            assert all(time["rounds"] == 3 for time in found["stages"].values())
            assert medians["unet"] > 0 and sum(medians.values()) - medians["total"] <= 1.2 * medians["total"]
        for name in peers.THIRD_PARTIES:
            assert "No module named" in row["contestants"][name]["refused"]
        assert "PSNR" in row["contestants"][peers.FLOAT8]["gate"]
        assert set(row["ratios"]) == {AGAINST_STOCK}
        assert row["floor"]["total"] == pytest.approx(sum(row["floor"].values()) - row["floor"]["total"])
    page, bars = report.write(results)
    assert bars.name == "made-up_stages.png" and bars.stat().st_size > 1000
    text = page.read_text()
    assert f"({bars.name})" in text and "of floor" in text and "Floor of this machine" in text


def test_a_pipeline_that_draws_something_else_is_not_timed(folder: Path) -> None:
    setting = peers.Setting(folder, torch.float32, "cpu")
    made: dict[str, Any] = {
        name: make(setting) for name, make in peers.makers(compile=False, float8=False, third_parties=False).items()
    }

    class Mirrored:
        def picture(self, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
            found: np.ndarray = made[peers.OURS[1]].picture(prompts, -latents)
            return found

    class Broken:
        def picture(self, prompts: list[str], latents: torch.Tensor) -> np.ndarray:
            raise KeyError("no such kernel")

    refused: dict[str, str] = {}
    contestants = {**made, peers.OURS[0]: Mirrored(), peers.COMPILED: Broken()}
    gates = bench_pipelines.judge(contestants, setting, torch.randn(1, 4, 8, 8), refused)
    assert [name for name, gate in gates.items() if not gate.passed] == [peers.OURS[0]]
    assert set(refused) == {peers.COMPILED} and "no such kernel" in refused[peers.COMPILED]


def test_the_floor_counts_what_is_needed(folder: Path) -> None:
    """The decoder's work by hand: an upsampling's convolution counts four taps of nine; batches are proportional."""
    needed = floor.work(folder, 1, (32, 32))
    assert floor.work(folder, 3, (32, 32))["unet"][0] == 3 * needed["unet"][0]
    assert floor.work(folder, 1, (64, 32))["vae"][0] >= 2 * needed["vae"][0]  # attention grows faster
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae")
    flops = 0

    def count(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
        nonlocal flops
        if isinstance(module, torch.nn.Conv2d):
            taps = 4 if id(module) in folded else module.kernel_size[0] ** 2
            flops += 2 * output.numel() * module.in_channels * taps
        else:
            flops += 2 * output.numel() * module.in_features  # type: ignore[operator]

    folded = {id(block.upsamplers[0].conv) for block in vae.decoder.up_blocks if block.upsamplers is not None}
    for module in vae.decoder.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        vae.decoder(torch.zeros(1, 4, 8, 8))
    middle = vae.decoder.mid_block.attentions[0]
    flops += 2 * 2 * (8 * 8) ** 2 * middle.inner_dim
    assert needed["vae"] == (flops, sum(p.numel() for p in vae.decoder.parameters()))


def test_a_profile_names_the_work_and_how_fast_it_runs(folder: Path) -> None:
    pipe = OneStepPipeline.from_pretrained(folder, device="cpu")
    side = pipe.default_size
    flops = floor.by_kind(pipe.unet.config, pipe.vae.config, 1, (side, side), pipe.tokenizer.model_max_length)
    needed = floor.work(folder, 1, (side, side))
    assert {name: sum(kinds.values()) for name, kinds in flops.items()} == {n: needed[n][0] for n in ("unet", "vae")}
    found = profile.stages(pipe, 1, flops)
    for name, parts in found.items():
        assert {"convolutions", "products", "attention", "norms"} <= {kind for kind in parts if parts[kind].calls}, name
        accounted = sum(part.seconds for kind, part in parts.items() if kind != "all")
        assert 0.5 * parts["all"].seconds < accounted <= 1.01 * parts["all"].seconds
        text = profile.table(name, parts, 1e12)
        assert "| norms |" in text and "FLOP/s" in text
    assert profile.kind_of("cutlass_linear_geglu") == "products" and profile.kind_of("aten::add_") == "other"
    assert not hasattr(ops.group_norm_silu, "__wrapped__")


def test_the_floor_is_products_or_weights() -> None:
    needed = {"unet": (10**9, 1), "vae": (1, 25 * 10**10)}
    assert floor.seconds(needed, "float32", CEILINGS) == {"unet": 1.0, "vae": 1.0, "total": 2.0}
    assert floor.seconds(needed, "float64", CEILINGS) == {}


def test_targets_are_judged_by_what_was_measured() -> None:
    request = Request(None, batch=1, compile=True)
    targets = bench_pipelines.targets_of(request, "cpu", MODES[0], (64, 64))
    times = {peers.STOCK[0]: 3.0, peers.STOCK[1]: 2.0, peers.COMPILED: 0.9, peers.OURS[1]: 1.0}
    ratios = bench_pipelines.ratios_of({name: [time] * 3 for name, time in times.items()})
    assert (ratios[AGAINST_STOCK]["median"], ratios[AGAINST_COMPILED]["median"]) == (2.0, 0.9)
    row = {"contestants": {}, "ratios": ratios, "targets": targets}
    assert [(value, reached) for _, value, reached in stage_verdicts(row)] == [(2.0, True), (0.9, False)]
    assert bench_pipelines.targets_of(request, "cpu", MODES[1], (64, 64)) == []
    assert bench_pipelines.targets_of(dataclasses.replace(request, batch=2), "cpu", MODES[0], (64, 64)) == []


def test_targets_in_seconds_and_in_memory() -> None:
    request = Request(random_model.RANDOM_SDXL, "bfloat16", compile=True, float8=True)
    targets = bench_pipelines.targets_of(request, "cuda", MODES[0], (1024, 1024))
    found = {name: {"stages": {"total": summarise([0.030]).as_dict()}} for name in (peers.OURS[1], peers.FLOAT8)}
    row = {"contestants": found, "ratios": {}, "targets": targets}
    assert [v[1:] for v in stage_verdicts(row)] == [(30.0, True), (30.0, False), (None, False)]
    target = {"contestant": "a", "memory_of": "b"}
    for mine, reached in ((100, True), (101, True), (120, False)):
        held = {"a": {"memory_bytes": mine}, "b": {"memory_bytes": 100}}
        assert stage_verdicts({"contestants": held, "targets": [target]})[0][1:] == (mine / 100, reached)
    assert stage_verdicts({"contestants": {}, "targets": [target]})[0][1:] == (None, False)


def test_a_cold_start_is_a_process_by_its_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    code = {
        "sleeps": 'tell("imports")\ntime.sleep(0.2)\ntell("loading")\nkept = bytearray(300_000_000)\n',
        "fails": 'raise ValueError("no " + PROMPT)\n',
    }
    monkeypatch.setattr(bench_cold_start, "CODE", code)
    results = ResultsFile.create(None, "", {})
    said: list[str] = []
    request = bench_cold_start.Request(None, "float32", rounds=1)
    for _ in range(2):
        bench_cold_start.run([request], "cpu", results, tell=said.append)
    assert len(said) == 1 and "peak memory" in said[0]
    found = results.data["end_to_end"][0]["contestants"]
    stages = {stage: times["median"] for stage, times in found["sleeps"]["stages"].items()}
    assert set(stages) == set(bench_cold_start.STAGES)
    assert stages["loading"] >= 0.2
    assert stages["total"] == pytest.approx(sum(stages.values()) - stages["total"])
    assert found["sleeps"]["memory_bytes"] > 300_000_000
    assert "no a red apple" in found["fails"]["refused"]


def test_stacks_add_up_to_the_total() -> None:
    found = {"stages": {s: summarise([t]).as_dict() for s, t in (("unet", 0.2), ("vae", 0.1), ("total", 0.35))}}
    assert stage_plot.parts(found) == pytest.approx({"unet": 200, "vae": 100, "rest": 50})
    assert not stage_plot.plot({"end_to_end": []}, Path("never"))


def test_random_weights_make_a_folder_that_draws(tmp_path: Path) -> None:
    with random_model.folder(TOY, torch.bfloat16, "cpu") as folder:
        contestant = peers.makers(compile=False, float8=False, third_parties=False)[peers.OURS[1]]
        made = contestant(peers.Setting(folder, torch.bfloat16, "cpu"))
        assert np.isfinite(made.picture(["a red apple"], torch.randn(1, 4, 8, 8))).all()
    assert not folder.exists()


def test_one_command_covers_batches_sizes_and_peers() -> None:
    cpu = everything.requests(everything._arguments(["--device", "cpu"]))
    assert [(r.model, r.batch, r.size, r.compile, r.float8) for r in cpu] == [
        (None, 1, None, True, False),
        (None, 8, None, True, False),
    ]
    arguments = everything._arguments(["--device", "cpu"])
    arguments.device = "cuda"  # as it parses where there is one
    gpu = everything.requests(arguments)
    assert all(r.model == random_model.RANDOM_SDXL and r.dtype == "bfloat16" and r.float8 for r in gpu)
    assert [r.batch for r in gpu if r.size == (1024, 1024)] == [1, 2, 4, 8]
    assert {r.size for r in gpu if r.batch == 1} == {(1024, 1024), (512, 512), (768, 768), (1216, 832)}
    assert [r.compile for r in gpu] == [True, *[False] * (len(gpu) - 1)]
    with pytest.raises(SystemExit):
        everything._arguments(["--size", "1000"])
