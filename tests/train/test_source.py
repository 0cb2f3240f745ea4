"""A distillation on prepared shards: pictures of several shapes, each with its own size conditioning, read ahead."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor

from sdxl_fast.data.shards import LatentShards
from sdxl_fast.errors import DataError
from sdxl_fast.random import derive_seed
from sdxl_fast.testing.pictures import good_rows, prepare_small, write_folder
from sdxl_fast.train import stages, trainer
from sdxl_fast.train.bench import Bench, make_bench
from sdxl_fast.train.config import LightningConfig, load_recipe
from sdxl_fast.train.source import Condition, Prefetch, Shards
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


# ---- reading ahead ----

WHOLE = slice(0, None)


def _readers() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("batches")]


@dataclass
class Noted:
    """A source that notes what is read of it and by which thread; after `broken` images it raises."""

    broken: int = -1
    read: list[tuple[str, int]] = field(default_factory=list)
    by: set[str] = field(default_factory=set)
    shapes: list[tuple[int, int, int]] = field(default_factory=lambda: [(1, 1, 1)])

    def batch(
        self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool
    ) -> tuple[Tensor, Condition]:
        self.read.append((f"{key[0]} {share.start} {text_of_next}", images))
        self.by.add(threading.current_thread().name.partition("_")[0])
        if images == self.broken:
            raise DataError(f"broken after {images} images")
        return torch.arange(images, images + count)[share], {"next": torch.tensor(text_of_next)}


def test_each_use_and_micro_batch_is_read_once_and_one_step_ahead() -> None:
    source = Noted()
    with Prefetch(source) as prefetch:
        for images in range(0, 40, 4):
            for use, of_next in (("d", False), ("d", True), ("s", False), ("s", False)):  # the last comes twice
                for share in (slice(0, 2), slice(2, 4)):
                    latents, condition = prefetch.batch(4, share, (use,), images, text_of_next=of_next)
                    assert latents.tolist() == list(range(images, images + 4))[share]
                    assert condition["next"] == of_next
    assert source.by == {"batches"} and not _readers()
    assert max(Counter(source.read).values()) == 1
    for stream in {stream for stream, _ in source.read}:
        read = sorted(images for of, images in source.read if of == stream)
        assert read in ([*range(0, 40, 4)], [*range(0, 44, 4)])  # that after the last may have been called off
    assert len(source.read) in range(6 * 10, 6 * 11 + 1)


def test_a_batch_is_read_while_the_step_before_it_lasts() -> None:
    read = threading.Event()

    class Slow(Noted):
        def batch(self, count: int, share: slice, key: Any, images: int, *, text_of_next: bool) -> Any:
            found = super().batch(count, share, key, images, text_of_next=text_of_next)
            if images == 4:
                read.set()
            return found

    with Prefetch(Slow()) as prefetch:
        prefetch.batch(4, WHOLE, ("d",), 0, text_of_next=False)
        assert read.wait(10)


def test_jumps_are_read_when_they_come() -> None:
    source, asked = Noted(), (0, 4, 400, 404, 8, 8, 0, 4)  # resumed, back, the same again, inputs that repeat
    with Prefetch(source) as prefetch:
        for images in asked:
            assert prefetch.batch(4, WHOLE, ("d",), images, text_of_next=False)[0][0] == images
    assert len(source.read) <= 2 * len(asked)


def test_an_error_comes_with_its_batch_and_ends_the_threads() -> None:
    source, asked = Noted(broken=8), list[int]()
    with pytest.raises(DataError, match="broken after 8 images"), Prefetch(source) as prefetch:
        for images in range(0, 40, 4):
            asked.append(images)
            prefetch.batch(4, WHOLE, ("d",), images, text_of_next=False)
    assert asked == [0, 4, 8] and not _readers()


@pytest.mark.gpu
def test_batches_for_a_gpu_are_pinned() -> None:
    with Prefetch(Noted(), pin=True) as prefetch:
        latents, condition = prefetch.batch(4, WHOLE, ("d",), 0, text_of_next=False)
        assert latents.is_pinned() and condition["next"].is_pinned()
        assert latents.to("cuda", non_blocking=True).tolist() == [0, 1, 2, 3]


@pytest.fixture(scope="module")
def many_uses(recipe: Path) -> Path:
    """The recipe with micro-batches, the text of the sample behind, a warm-up of D, and inputs that repeat."""
    tree = yaml.safe_load(recipe.read_text())
    phase = {"condition": False, "trains": "lora", "images": 8}
    regression = {**phase, "adversarial_weight": 0, "regression_weight": 1, "repeat": 4, "name": "repeat"}
    phases = [regression, {**phase, "name": "warm", "d_warmup": 4}]
    tree["stages"] = [{"name": "32-step", "steps": 32, "loss": "adversarial", "phases": phases}]
    tree |= {"accumulate": 2, "checkpoint_every": 2, "discriminator": {"misaligned_text": 1.0}}
    path = recipe.with_name("many-uses.yaml")
    path.write_text(yaml.safe_dump(tree))
    return path


def _weights(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.glob("*/*.safetensors"))}


def test_training_reads_ahead_and_ends_with_the_weights_of_one_that_does_not(
    many_uses: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    by, stop_at, batch = Counter[str](), 0, Shards.batch

    def noted(self: Shards, *args: Any, **options: Any) -> Any:
        by[threading.current_thread().name.partition("_")[0]] += 1
        if by.total() == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, *args, **options)

    monkeypatch.setattr(Shards, "batch", noted)
    monkeypatch.setattr(trainer, "_look", lambda *_: None)  # contact sheets take longer than all the rest
    run(many_uses, ["run=ahead"])
    assert by.keys() == {"batches"} and not _readers()
    stop_at = by.total() // 2
    by.clear()
    run(many_uses, ["run=stopped"])
    assert not (cache / "runs" / "stopped" / "published" / "toy_32step_lora.safetensors").exists() and not _readers()
    stop_at = 0
    run(many_uses, ["run=stopped"], resume="latest")
    by.clear()
    monkeypatch.setattr(Bench, "reading_ahead", lambda bench: nullcontext())
    run(many_uses, ["run=plain"])
    assert by.keys() == {"MainThread"}
    plain = _weights(cache / "runs" / "plain")
    assert len(plain) > 3
    for name in ("ahead", "stopped"):
        assert _weights(cache / "runs" / name) == plain


def test_a_damaged_sample_ends_the_training_at_its_batch(recipe: Path, shards: Path, cache: Path) -> None:
    config = load_recipe(recipe)
    assert isinstance(config, LightningConfig)
    unit, copy = stages.units_of(config)[0].folder(Path()).name, shards.with_name("damaged")
    data, key = LatentShards(shutil.copytree(shards, copy)), (config.seed, unit, "regression", "batch")
    first, second = (data.positions(2, seed=derive_seed(*key), images=images) for images in (0, 2))
    for position in set(second) - set(first):
        shard, byte, length, _ = data.index.rows[position].tolist()
        with open(copy / data.index.shards[shard][0], "r+b") as file:
            file.seek(byte)
            file.write(bytes(length))
    with pytest.raises(DataError, match=r"\.tar, byte \d+: not a sample"):
        run(recipe, [f"shards={copy}", "log_every=2"])
    lines = (cache / "runs" / "distil" / unit / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [2] and not _readers()
