# SPDX-License-Identifier: Apache-2.0
"""The claims: what they compare exists, the rule that turns numbers into sentences, and a run on a toy pipeline."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from torch import Tensor

ROOT = Path(__file__).parent.parent.parent
sys.path.append(str(ROOT))  # benchmarks/ is not installed

from benchmarks.claims import __main__ as command  # noqa: E402
from benchmarks.claims import page, rules  # noqa: E402
from benchmarks.claims.claims import CLAIMS, Comparison  # noqa: E402
from benchmarks.claims.draw import Drawer  # noqa: E402
from benchmarks.claims.rules import judge  # noqa: E402
from benchmarks.claims.start import NotRunError, StoppedError, committed_run, regressed_unit  # noqa: E402
from benchmarks.claims.turns import BusyError, alone  # noqa: E402
from benchmarks.claims.variants import LIGHTNING, TUNED, VARIANTS  # noqa: E402
from benchmarks.claims.work import Options, Workshop  # noqa: E402
from sdxl_fast.train import checkpoint, trainer  # noqa: E402
from sdxl_fast.train.config import AdversarialPhase, StageConfig, load_recipe  # noqa: E402
from sdxl_fast.train.stages import units_of  # noqa: E402
from sdxl_fast.train.trainer import run  # noqa: E402

SHARP = Comparison("a@4", "b@4", "sharpness")


# ---- what is declared ----


def test_claims_compare_variants_that_exist_in_steps_they_are_drawn_in() -> None:
    assert len({claim.name for claim in CLAIMS}) == len(CLAIMS)
    for claim in CLAIMS:
        assert claim.comparisons and claim.says[-1] != "." and claim.source
        assert all(comparison.metric in rules.METRICS for comparison in claim.comparisons)
        for side in claim.sides:
            name, _, steps = side.partition("@")
            assert int(steps) in VARIANTS[name].steps, side
    used = {name for claim in CLAIMS for name in claim.variants}
    lightning = [variant for variant in VARIANTS.values() if variant.recipe == LIGHTNING]
    teachers = {phase.get("teacher") for v in lightning for phase in (v.stage or {}).get("phases", ())} - {None}
    taught = {f"start-{name}" for name in teachers | {variant.start for variant in lightning}}
    assert VARIANTS.keys() == used | taught | {v.base for v in VARIANTS.values() if v.base}
    headline = [claim.name for claim in CLAIMS if len(claim.seeds) == 3]
    assert headline == ["blur", "relaxed-d", "x0-form", "levels-of-d"]


def test_compared_lightning_variants_are_as_long() -> None:
    """Of one start all train on as many images, so that only what is named differs."""
    lengths: dict[str, set[int]] = {}
    for variant in VARIANTS.values():
        if variant.recipe == LIGHTNING:
            stage = StageConfig.model_validate(variant.stage)
            images = stage.images + stage.convert_images + sum(phase.images for phase in stage.phases)
            lengths.setdefault(str(variant.start), set()).add(images)
    assert lengths == {"8-step": {24_000}, "2-step": {32_000}}


@pytest.mark.parametrize("name", [n for n, v in VARIANTS.items() if v.recipe is not None])
def test_every_variant_is_a_valid_recipe(name: str) -> None:
    variant = VARIANTS[name]
    recipe = {LIGHTNING: "emoji_lightning", TUNED: "emoji_teacher"}.get(str(variant.recipe), str(variant.recipe))
    config = load_recipe(recipe, list(variant.settings))
    default = load_recipe(recipe)
    assert variant.recipe == LIGHTNING or config != default
    if variant.recipe == LIGHTNING:
        names = [stage.name for stage in default.stages]  # type: ignore[union-attr]
        assert variant.start in names
        for phase in StageConfig.model_validate(variant.stage).phases:
            assert isinstance(phase, AdversarialPhase) and phase.d_warmup < phase.images


# ---- drawing ----


@pytest.mark.parametrize("sampler", ["ancestral", "consistency"])
def test_a_sample_depends_on_its_seed_and_sampler_alone(sampler: Any, teacher_folder: Path) -> None:
    pipe: Any = StableDiffusionXLPipeline.from_pretrained(teacher_folder)
    prompts, seeds = ["red square", "blue square"], [3, 4]
    few = Drawer(pipe, "epsilon", 4, sampler)(prompts, seeds)
    torch.testing.assert_close(few[1:], Drawer(pipe, "epsilon", 4, sampler)(prompts[1:], seeds[1:]), rtol=0, atol=1e-4)
    assert few.shape[1] == 3 and few.min() >= 0 and few.max() <= 1
    walked = Drawer(pipe, "epsilon", 4)(prompts, seeds)
    assert not torch.allclose(few, walked, atol=1e-2)
    one = Drawer(pipe, "epsilon", 1, sampler)(prompts, seeds)
    torch.testing.assert_close(one, Drawer(pipe, "epsilon", 1)(prompts, seeds), rtol=1e-3, atol=1e-3)


# ---- a run ----


class Grid:
    """Pictures averaged down to 4 x 4, in place of a feature network."""

    def __call__(self, images: Tensor) -> Tensor:
        return torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1)

    def provenance(self) -> dict[str, str | int]:
        return {"network": "grid", "input_size": 4}


@pytest.fixture
def workshop(lightning_recipe: Path, cache: Path, tmp_path: Path) -> Workshop:
    """A toy run down to one step's regression, with a full branch that nothing goes on from."""
    tree = yaml.safe_load(lightning_recipe.read_text())
    first, few = tree["stages"][:2]
    lora = {**few["phases"][0], "images": 4, "d_warmup": 0}
    stage = {"loss": "adversarial", "phases": [lora]}
    two = {**stage, "name": "2-step", "steps": 2, "timesteps": [499, 999]}
    alone = {"condition": True, "trains": "full", "images": 4, "adversarial_weight": 0.0, "regression_weight": 1.0}
    one = {**stage, "name": "1-step", "steps": 1, "convert_images": 4, "phases": [{**alone, "name": "regression"}]}
    few = {**few, "phases": [lora, {**few["phases"][2], "images": 4}]}
    tree["stages"] = [{**first, "images": 4}, few, {**stage, "name": "4-step", "steps": 4}, two, one]
    path = tmp_path / "source.yaml"
    path.write_text(yaml.safe_dump(tree))
    run(path, ["run=source"])
    return Workshop(_options(tmp_path))


def _options(tmp_path: Path) -> Options:
    return Options("source", tmp_path / "out", pictures=12, scale=1e-9, extractor=Grid())


@pytest.fixture
def trainings(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The labels of what is trained."""
    seen: list[str] = []
    fit = trainer.fit

    def noting(*arguments: Any, label: str, **more: Any) -> bool:
        seen.append(label)
        return fit(*arguments, label=label, **more)

    monkeypatch.setattr("sdxl_fast.train.stages.fit", noting)
    monkeypatch.setattr("sdxl_fast.train.trainer.fit", noting)
    yield seen


def test_claims_are_run_written_and_not_run_twice(workshop: Workshop, tmp_path: Path, trainings: list[str]) -> None:
    blur = next(claim for claim in CLAIMS if claim.name == "blur")
    assert command.work_off([blur], workshop, [0]) == []
    out = tmp_path / "out"
    names = {"four-d", "four-mse", "one-d", "one-mse", "start-8-step", "start-4-step", "start-1-step"}
    assert {path.stem for path in (out / "results").glob("*.json")} == {f"{name}-0" for name in names}
    assert {path.stem for path in (out / "results").glob("*.png")} == {
        f"{name}-0-{steps}" for name in names for steps in VARIANTS[name].steps
    }
    assert trainings.count("03-4-step-lora-d") == 1 and "03-4-step-mse" in trainings
    assert sorted(label for label in trainings if "1-step" in label) == ["07-1-step-full-d", "07-1-step-mse"]
    assert len(trainings) == 4, "what they start from is not run again"
    found = json.loads((out / "results" / "one-d-0.json").read_text())
    row = found["rows"]["1"]
    assert found["images"] == 4 and found["images_before"] == 24, "two units inside one step, and four LoRAs' before"
    assert row["images"] == 12 and row["flow"] > 0 and row["grain"] > 0
    assert row["replicates"].keys() == set(rules.METRICS) - {"diversity"}
    for name, values in row["replicates"].items():
        offset = row["kid"] - row["kid_excess"] if name == "kid_excess" else 0.0
        assert len(values) == 6 and min(values) <= row[name] + offset <= max(values), name
    assert found["d_accuracy"] and all(0 <= accuracy <= 1 for accuracy in found["d_accuracy"])
    assert json.loads((out / "results" / "one-mse-0.json").read_text())["d_accuracy"] == []
    text = (out / "claims.md").read_text()
    assert f"{len(CLAIMS) - 1} not run" in text and "**Not run**: ADD needs" in text
    assert "![blur](sheets/blur.png)" in page.write(CLAIMS, out)
    assert "| four-mse@4 | LoRA, MSE to the teacher | 1 |" in text
    assert f"| [{CLAIMS[-1].says}](#{CLAIMS[-1].name}) | not run | – |" in text

    trainings.clear()
    again = Workshop(_options(tmp_path))
    assert command.work_off([blur], again, [0]) == [] and trainings == []
    assert json.loads((out / "results" / "one-d-0.json").read_text()) == found
    (out / "results" / "one-d-0.json").unlink()
    assert again.result(VARIANTS["one-d"], 0)["rows"]["1"]["sha256"] == row["sha256"] and trainings == []
    seeds = [again.result(VARIANTS["four-d"], seed)["rows"]["4"]["sha256"] for seed in (0, 1)]
    assert seeds[0] != seeds[1]
    trainings.clear()
    shutil.rmtree(again.folder(VARIANTS["start-4-step"], 0))  # as on another machine, to which only results came
    (out / "sheets" / "blur.png").unlink()
    (out / "results" / "one-d-0.json").unlink()
    assert again.result(VARIANTS["one-d"], 0)["rows"]["1"]["flow"] == row["flow"] and trainings == []
    page.write(CLAIMS, out)
    assert (out / "sheets" / "blur.png").is_file()
    other = Workshop(replace(_options(tmp_path), pictures=13))
    assert other.result(VARIANTS["start-8-step"], 0)["rows"]["8"]["images"] == 13, "asked otherwise, drawn anew"


def test_a_training_that_was_stopped_goes_on(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = workshop.result(VARIANTS["four-d"], 3)
    stopping = {**VARIANTS["four-d"].stage}  # type: ignore[dict-item]
    variant = replace(VARIANTS["four-d"], about="stopped", stage=stopping)
    save, count = checkpoint.save, 0

    def dies(*arguments: Any, **more: Any) -> Any:
        nonlocal count
        count += 1
        if count == 2:
            raise OSError("no space left")
        return save(*arguments, **more)

    longer = replace(workshop.options, scale=2 * 4 / 24_000)
    shop = Workshop(longer)
    monkeypatch.setattr(checkpoint, "save", dies)
    with pytest.raises(OSError, match="no space"):
        shop.result(variant, 3)
    monkeypatch.setattr(checkpoint, "save", save)
    units = list(shop.folder(variant, 3).glob("03-*"))
    assert len(units) == 1 and checkpoint.latest(units[0]) is not None
    assert shop.result(variant, 3)["rows"]["4"]["sha256"] != whole["rows"]["4"]["sha256"]
    unbroken = replace(variant, about="in one go")
    assert shop.result(unbroken, 3)["rows"]["4"]["sha256"] == shop.result(variant, 3)["rows"]["4"]["sha256"]


def test_a_start_that_is_not_there_is_named(workshop: Workshop, cache: Path, tmp_path: Path) -> None:
    with pytest.raises(NotRunError, match="holds no run of kind lightning"):
        Workshop(Options("nobody", tmp_path))
    with pytest.raises(NotRunError, match="has no stage '16-step'"):
        workshop.result(replace(VARIANTS["four-d"], start="16-step"), 0)
    (cache / "runs" / "source" / "01-8-step-lora-d" / "student.safetensors").unlink()
    claim = next(claim for claim in CLAIMS if claim.name == "flow")
    refused = command.work_off([claim], workshop, None)
    assert len(refused) == 3 and "no finished student of stage '8-step'" in refused[0]
    assert judge(claim, page.by_side(page.read_results(tmp_path / "out" / "results"))).word == "not run"


def test_one_that_fails_keeps_none_from_being_tried_and_being_stopped_ends_all(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def result(self: Workshop, variant: Any, seed: int) -> Any:
        tried.append(variant.name)
        if variant.name == stops:
            raise StoppedError("stopped")
        raise ValueError("no such thing")

    monkeypatch.setattr(Workshop, "result", result)
    flow = next(claim for claim in CLAIMS if claim.name == "flow")
    stops = ""
    assert command.work_off([flow], workshop, [0]) == [f"{name}: ValueError: no such thing" for name in flow.variants]
    assert tried == flow.variants
    tried.clear()
    stops = flow.variants[1]
    assert command.work_off([flow], workshop, [0])[-1] == "stopped" and tried == flow.variants[:2]


def test_two_processes_share_the_work(workshop: Workshop, monkeypatch: pytest.MonkeyPatch) -> None:
    flow = next(claim for claim in CLAIMS if claim.name == "flow")
    first, *others = flow.variants
    measured, order, other_process = Workshop._measured, [], ExitStack()

    def measuring(self: Workshop, variant: Any, seed: int) -> dict[str, Any]:
        with pytest.raises(BusyError), alone(self.folder(variant, seed)):
            pass
        order.append(variant.name)
        other_process.close() if variant.name == others[-1] else None
        return measured(self, variant, seed)

    monkeypatch.setattr(Workshop, "_measured", measuring)
    other_process.enter_context(alone(workshop.folder(VARIANTS[first], 0)))
    assert not command.work_off([flow], workshop, [0])
    assert [name for name in order if name in flow.variants] == [*others, first]
    alike = replace(flow, comparisons=(Comparison(f"{first}@4", f"{first}@4", "flow"),), also=())
    with alone(workshop.folder(VARIANTS[first], 1)):
        assert f"another process is at {first}-1-" in command.work_off([alike], workshop, [1])[0]


def test_all_can_start_from_what_is_committed(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every checkpoint that a variant starts from lies in the repository and fits the recipe."""
    monkeypatch.chdir(ROOT)
    shop = Workshop(Options("embedded", tmp_path, extractor=Grid()))
    assert shop.source == committed_run() and shop.source.is_relative_to(cache)
    last = regressed_unit(shop.config)
    assert last is not None and last.phase is not None and not last.phase.adversarial_weight
    done = {json.loads(line)["unit"] for line in (shop.source / "chain.jsonl").read_text().splitlines()}
    for variant in VARIANTS.values():
        assert len(shop.key(variant, 0)) == 12
        if variant.recipe == LIGHTNING:
            path = tmp_path / "variant.yaml"
            path.write_text(yaml.safe_dump(shop.recipe(variant, 0)))
            units = units_of(load_recipe(path))  # type: ignore[arg-type]
            ground = {unit.folder(Path()).name for unit in units[: shop._units_before(variant)]}
            assert ground <= done and len(units) > len(ground)
    for name, kind in (("8", "epsilon"), ("4", "epsilon"), ("2", "epsilon"), ("1", "sample")):
        assert shop.pipeline(VARIANTS[f"start-{name}-step"], 0)[1] == kind


@pytest.mark.slow(minutes=2)
def test_all_claims_run(workshop: Workshop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    monkeypatch.setattr(trainer, "plot_losses", lambda *args, **kwargs: None)  # a third of the time, tested elsewhere
    claims = [claim for claim in CLAIMS if claim.name != "other-style"]  # which needs the pictures of two styles
    assert command.work_off(claims, workshop, [0]) == []
    found = page.by_side(page.read_results(tmp_path / "out" / "results"))
    assert all(judge(claim, found).word != "not run" for claim in claims)
    assert {path.stem for path in (tmp_path / "out" / "sheets").iterdir()} == {claim.name for claim in claims}
