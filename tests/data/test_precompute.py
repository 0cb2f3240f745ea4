"""`data prepare`: samples are what the pipeline makes of the pictures, and everything dropped is counted and listed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sdxl_fast.data import part
from sdxl_fast.data.config import PrepareConfig
from sdxl_fast.data.encoders import Encoders
from sdxl_fast.data.filters import Filters
from sdxl_fast.data.precompute import prepare
from sdxl_fast.data.shards import LatentShards
from sdxl_fast.errors import DataError
from sdxl_fast.models.conditioning import encode_prompts
from sdxl_fast.testing.pictures import encoded, good_files, good_rows, picture, prepare_small, write_folder, write_tar

pytest.importorskip("webdataset", reason="the extra data is not installed")


def _dropped(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "dropped.jsonl").read_text().splitlines()]


def test_samples_are_what_the_pipeline_makes_of_the_pictures(source: Path, made: Path, toy_folder: Path) -> None:
    data = LatentShards(made)
    assert len(data) == 20
    encoders = Encoders(toy_folder, device="cpu", precision="fp32")
    found = {sample.facts["source"]: sample for sample in (data[position] for position in range(20))}
    assert found.keys() == {f"{k:04d}.png" for k in range(20)}
    for number, (height, width, target, resized) in enumerate(
        [(48, 48, (32, 32), (32, 32)), (40, 72, (24, 40), (24, 43)), (72, 40, (40, 24), (43, 24))]
    ):
        sample = found[f"{number:04d}.png"]
        crop = [(resized[0] - target[0] + 1) // 2, (resized[1] - target[1] + 1) // 2]
        assert sample.time_ids == [height, width, *crop, *target]
        image = Image.open(source / f"{number:04d}.png").resize(resized[::-1], Image.Resampling.LANCZOS)
        image = image.crop((crop[1], crop[0], crop[1] + target[1], crop[0] + target[0]))
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.no_grad():
            latents = encoders.vae.encode(pixels).latent_dist.mode() * encoders.vae.config.scaling_factor
            caption = f"a picture of {number}"
            embeds, pooled = encode_prompts([caption], encoders.tokenizers, encoders.text_encoders)
        assert sample.caption == caption
        for have, want in ((sample.latents, latents), (sample.prompt_embeds, embeds), (sample.pooled, pooled)):
            torch.testing.assert_close(have, want[0].half())
        assert sample.facts["aesthetic"] == 6.0 and sample.facts["sharpness"] > 50
    with torch.no_grad():
        empty, _ = encode_prompts([""], encoders.tokenizers, encoders.text_encoders)
    torch.testing.assert_close(data.empty_prompt["prompt_embeds"], empty[0].half().float())


def test_batches_come_from_what_was_made(made: Path) -> None:
    data = LatentShards(made)
    assert sorted(data.shapes) == [(4, 6, 10), (4, 8, 8), (4, 10, 6)]
    seen = Counter(position for step in range(4) for position in data.positions(5, seed=0, images=5 * step))
    assert len(seen) >= 18 and max(seen.values()) == 1
    latents, condition = data.batch(5, seed=0, images=0)
    assert latents.shape[0] == 5 and condition["time_ids"].shape == (5, 6)


def test_random_crops_repeat_and_differ(source: Path, toy_folder: Path, tmp_path: Path) -> None:
    crops = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare_small(source, tmp_path / name, toy_folder, crop="random", seed=seed)
        data = LatentShards(tmp_path / name)
        crops.append({s.facts["source"]: tuple(s.facts["crop"]) for s in (data[k] for k in range(len(data)))})
    assert crops[0] == crops[1] != crops[2]
    assert len({crop for crop in crops[0].values() if crop != (0, 0)}) > 2


def _mixed_rows() -> list[tuple[Any, bytes | None]]:
    """One row or more for every way to be left out, between good ones."""
    good, image = good_rows(9), encoded(picture(100))

    def row(name: str, content: bytes | None = image, **facts: Any) -> tuple[Any, bytes | None]:
        return {"file_name": name, "text": "a thing", **facts}, content

    blurred = picture(101).filter(ImageFilter.GaussianBlur(8))
    return [
        *good[:3],
        ("{not json", None),
        row("empty_caption.png", text=" ... "),
        row("null_caption.png", text=None),
        row("ugly.png", aesthetic=5.5),
        row("unscored.png", encoded(picture(102))),
        row("gone.png", None),
        *good[3:6],
        row("truncated.png", image[: len(image) // 2]),
        row("page.jpg", b"<html>404 not found</html>"),
        row("small.png", encoded(picture(103, 33, 32))),
        row("soft.png", encoded(blurred)),
        row("copy_in_part.png", good[4][1], text="the same picture again"),
        row("copy_of_first_part.webp", good[0][1]),
        row("infinite.png", encoded(picture(104)), text="a caption of infinity"),
        row("long.png", encoded(picture(105)), text="word " * 200),
        *good[6:],
    ]


REASONS = {
    "bad record": 1, "no caption": 2, "aesthetic": 1, "no picture": 1, "unreadable": 2, "too small": 1, "blurred": 1,
    "duplicate": 2, "not finite": 1,
}  # fmt: skip


@pytest.fixture
def infinity(monkeypatch: pytest.MonkeyPatch) -> None:
    """The text encoders overflow on a caption about infinity."""
    texts = Encoders.texts

    def overflowing(self: Encoders, captions: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, pooled = texts(self, captions)
        for row, caption in enumerate(captions):
            if "infinity" in caption:
                embeds[row, 1, 2] = float("inf")
        return embeds, pooled

    monkeypatch.setattr(Encoders, "texts", overflowing)


@pytest.mark.usefixtures("infinity")
def test_every_reason_is_counted_and_listed_and_the_counts_add_up(toy_folder: Path, tmp_path: Path) -> None:
    rows = _mixed_rows()
    report = prepare_small(write_folder(tmp_path / "set", rows), tmp_path / "out", toy_folder, rows_per_shard=9)
    assert report.dropped == REASONS
    assert (report.input, report.kept) == (len(rows), len(rows) - sum(REASONS.values()))
    assert sum(report.buckets.values()) == report.kept
    assert (report.unscored, report.truncated_captions, report.damaged) == (2, 1, [])
    assert json.loads((tmp_path / "out" / "report.json").read_text())["dropped"] == REASONS
    listed = _dropped(tmp_path / "out")
    assert Counter(entry["reason"] for entry in listed) == REASONS
    assert all(entry["detail"] for entry in listed)
    by_name = {entry["name"]: entry for entry in listed}
    assert by_name["copy_of_first_part.webp"]["detail"] == "of a picture in 000000.tar"
    assert by_name["infinite.png"]["reason"] == "not finite"
    data = LatentShards(tmp_path / "out")
    kept = {data[position].facts["source"] for position in range(len(data))}
    assert kept == {f"{k:04d}.png" for k in range(9)} | {"unscored.png", "long.png"}
    summary = (tmp_path / "out" / "report.md").read_text()
    assert f"{report.kept} of {report.input} pictures kept" in summary
    for name in ("metadata.jsonl:4", "gone.png", "truncated.png", "page.jpg", "infinite.png"):
        assert f"- {name}: " in summary
    assert "soft.png" not in summary


def test_duplicates_stay_when_asked(toy_folder: Path, tmp_path: Path) -> None:
    rows = good_rows(2)
    rows += [({**facts, "file_name": f"again{k}.png"}, content) for k, (facts, content) in enumerate(rows)]
    folder = write_folder(tmp_path / "set", rows)
    for keep, kept in ((True, 4), (False, 2)):
        filters = Filters(min_side=32, deduplicate=not keep)
        report = prepare_small(folder, tmp_path / f"{keep}", toy_folder, filters=filters, rows_per_shard=2)
        assert (report.kept, report.dropped["duplicate"]) == (kept, 4 - kept)


@pytest.mark.usefixtures("infinity")
@pytest.mark.parametrize("batch", [1, 2, 4])
def test_a_copy_of_a_picture_that_was_dropped_is_kept(toy_folder: Path, tmp_path: Path, batch: int) -> None:
    image = good_rows(1)[0][1]
    captions = ("a caption of infinity", "a thing", "the same thing")
    rows = [({"file_name": f"{k}.png", "text": caption}, image) for k, caption in enumerate(captions)]
    report = prepare_small(write_folder(tmp_path / "set", rows), tmp_path / "out", toy_folder, batch=batch)
    assert (report.kept, report.dropped["not finite"], report.dropped["duplicate"]) == (1, 1, 1)
    assert LatentShards(tmp_path / "out")[0].caption == "a thing"


def test_damaged_tars_are_listed_and_do_not_stop_the_rest(toy_folder: Path, tmp_path: Path) -> None:
    for number in range(4):
        write_tar(tmp_path / "tars" / f"{number}.tar", good_files(3, 3 * number))
    broken = tmp_path / "tars" / "1.tar"
    broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 3])
    (tmp_path / "tars" / "2.tar").write_bytes(b"")
    write_tar(tmp_path / "tars" / "3.tar", [("README", b"about"), *good_files(3, 9)])
    report = prepare_small(f"{tmp_path}/tars/{{0..4}}.tar", tmp_path / "out", toy_folder)
    assert report.strays == 1 and "1 files in the tars" in report.text()
    assert [Path(name).name for name, _ in report.damaged] == ["1.tar", "2.tar", "4.tar"]
    assert report.input == report.kept + sum(report.dropped.values())
    assert 6 <= report.kept < 9
    summary = (tmp_path / "out" / "report.md").read_text()
    assert "3 input files could not be read to their end" in summary and "4.tar: FileNotFoundError" in summary
    assert not (tmp_path / "out" / "000002.tar").exists()  # a shard without samples is no file


def test_latents_that_stay_infinite_are_dropped(
    source: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    latents = Encoders.latents

    def broken(self: Encoders, pictures: Any) -> torch.Tensor:
        found = latents(self, pictures)
        found[0] = float("nan")
        return found

    monkeypatch.setattr(Encoders, "latents", broken)
    report = prepare_small(source, tmp_path / "out", toy_folder, batch=2)
    assert report.dropped["not finite"] > 0 and report.kept == 20 - report.dropped["not finite"]
    data = LatentShards(tmp_path / "out")
    assert all(bool(data[position].latents.isfinite().all()) for position in range(len(data)))


def test_few_pictures_wait_for_their_bucket(
    source: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory is bounded however many buckets there are: the fullest goes first when too many wait."""
    monkeypatch.setattr(part, "PENDING_BATCHES", 1)
    batches, add, most = [], part.Part.add, 0
    latents = Encoders.latents
    monkeypatch.setattr(Encoders, "latents", lambda self, many: batches.append(len(many)) or latents(self, many))

    def watched(self: part.Part, candidate: Any) -> None:
        nonlocal most
        add(self, candidate)
        most = max(most, sum(map(len, self.pending.values())))

    monkeypatch.setattr(part.Part, "add", watched)
    report = prepare_small(source, tmp_path / "out", toy_folder, rows_per_shard=20, batch=5)
    assert report.kept == sum(batches) == 20
    assert most < 5 and max(batches) < 5 and len(batches) > 4


def test_nothing_kept_is_a_report_not_a_crash(source: Path, toy_folder: Path, tmp_path: Path) -> None:
    report = prepare_small(source, tmp_path / "out", toy_folder, filters=Filters(min_side=500))
    assert (report.kept, report.dropped["too small"], report.shards) == (0, 20, 0)
    with pytest.raises(DataError, match="no samples"):
        LatentShards(tmp_path / "out")


def test_the_embedded_pipeline(tmp_path: Path) -> None:
    """Its own encoders and size, by default."""
    rows = [({"file_name": f"{k}.png", "text": "red apple"}, encoded(picture(k, 80, 80 + 16 * k))) for k in range(3)]
    config = PrepareConfig(
        source=str(write_folder(tmp_path / "set", rows)), out=tmp_path / "out", filters=Filters(min_side=64)
    )
    report = prepare(config)
    assert report is not None and report.kept == 3
    data = LatentShards(tmp_path / "out")
    assert data[0].latents.shape == (8, 8, 8)
    assert data[0].prompt_embeds.shape[1] == 128


def test_without_webdataset_it_says_what_to_install(
    source: Path, toy_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "webdataset", None)
    with pytest.raises(DataError, match=r"pip install 'sdxl-fast\[data\]'"):
        prepare_small(source, tmp_path / "out", toy_folder)
    assert not (tmp_path / "out").exists()
