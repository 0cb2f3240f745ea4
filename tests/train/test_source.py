"""A distillation on prepared shards: pictures of several shapes, each with its own size conditioning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from sdxl_fast.testing.pictures import good_rows, prepare_small, write_folder
from sdxl_fast.train import stages
from sdxl_fast.train.bench import make_bench
from sdxl_fast.train.config import LightningConfig, load_recipe
from sdxl_fast.train.source import Shards
from sdxl_fast.train.trainer import run

pytest.importorskip("webdataset", reason="the extra data is not installed")


@pytest.fixture(scope="module")
def shards(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("shards")
    prepare_small(write_folder(place / "pictures", good_rows(16)), place / "out", teacher_folder)
    return place / "out"


@pytest.fixture(scope="module")
def recipe(lightning_recipe: Path, shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree = yaml.safe_load(lightning_recipe.read_text())
    del tree["data"]
    tree |= {"shards": str(shards), "preview_prompts": ["a cat"], "batch": 2, "stages": tree["stages"][:2]}
    path = tmp_path_factory.mktemp("recipe") / "shards.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


def test_batches_carry_their_own_text_and_sizes(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe)
    assert isinstance(config, LightningConfig)
    bench = make_bench(config, tmp_path)
    assert isinstance(bench.source, Shards)
    latents, condition = bench.batch(0, "use")
    again, _ = bench.batch(0, "use")
    assert torch.equal(latents, again)
    assert condition["time_ids"].shape == (2, 6) and len(condition["pooled"]) == 2
    of_next, others = latents, bench.batch(0, "use", text_of_next=True)[1]
    assert torch.equal(others["pooled"], condition["pooled"].flip(0)), "of two samples the next is the other"
    assert torch.equal(others["time_ids"], condition["time_ids"])
    bench.share = slice(1, 2)
    half, its = bench.batch(0, "use")
    assert torch.equal(half, of_next[1:]) and torch.equal(its["pooled"], condition["pooled"][1:])


def test_the_discriminator_takes_every_shape(recipe: Path, tmp_path: Path) -> None:
    config = load_recipe(recipe)
    assert isinstance(config, LightningConfig)
    bench = make_bench(config, tmp_path)
    lineage = stages.Lineage(bench, tmp_path)
    unit = next(unit for unit in lineage.units if unit.phase)
    assert unit.phase is not None
    d = lineage.discriminator_of(unit, unit.phase)
    seen = set()
    for images in range(0, 16, 2):
        x_t, t, condition = bench.inputs((999, 499), images, "probe")
        feature = d.features(x_t, t, condition)
        assert d.judge(feature, feature).shape == (2,)
        seen.add(tuple(x_t.shape[1:]))
    assert seen <= set(bench.source.shapes)


def test_a_run_on_shards(recipe: Path, cache: Path) -> None:
    run(recipe, [])
    assert len((cache / "runs" / "distil" / "chain.jsonl").read_text().splitlines()) == 4


def test_shards_need_prompts_for_the_contact_sheets(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="preview_prompts is empty"):
        make_bench(load_recipe(recipe, ["preview_prompts=[]"]), tmp_path)  # type: ignore[arg-type, type-var]
