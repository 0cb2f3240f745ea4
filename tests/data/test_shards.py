"""Shards: what is written can be read, by this package at random and by webdataset; damage is noticed."""

from __future__ import annotations

import pickle
import random
import shutil
import threading
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_fast.data import shards
from sdxl_fast.data.shards import EMPTY_PROMPT, INDEX, Index, LatentShards, Sample, parse, scan
from sdxl_fast.errors import DataError

webdataset = pytest.importorskip("webdataset", reason="the extra data is not installed")

SHAPES = [(4, 8, 8), (4, 6, 10), (4, 10, 6)]


def _sample(number: int) -> Sample:
    draw = torch.Generator().manual_seed(number)
    shape = SHAPES[number % 5 % 3]
    facts = {
        "source": f"{number}.png",
        "original_size": [number, number + 1],
        "crop": [2, 3],
        "target_size": [shape[1] * 8, shape[2] * 8],
    }
    tensors = [torch.randn(size, generator=draw).half() for size in (shape, (7, 6), (5,))]
    return Sample(f"{number:06d}", *tensors, caption=f"caption {number}, é", facts=facts)  # type: ignore[misc]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three shards of 20 samples in three buckets."""
    path = tmp_path_factory.mktemp("shards")
    rows, files = [], []
    for shard in range(3):
        with open(path / f"{shard}.tar", "wb") as file, webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer:
            for number in range(20 * shard, 20 * shard + 20):
                writer.write(_sample(number).members())
        files.append((f"{shard}.tar", (path / f"{shard}.tar").stat().st_size))
        for key, first, length in scan(path / f"{shard}.tar"):
            rows.append((shard, first, length, int(key) % 5 % 3))
    Index(files, SHAPES, torch.tensor(rows)).save(path)
    save_file({"prompt_embeds": torch.ones(7, 6).half(), "pooled": torch.zeros(5).half()}, path / EMPTY_PROMPT)
    return path


def _equal(one: Sample, other: Sample) -> bool:
    tensors = all(torch.equal(getattr(one, name), getattr(other, name)) for name in shards.TENSORS)
    return tensors and (one.key, one.caption, one.facts) == (other.key, other.caption, other.facts)


def test_samples_are_read_as_written_in_any_order(folder: Path) -> None:
    data = LatentShards(folder)
    assert len(data) == 60 and data.shapes == SHAPES
    positions = list(range(60))
    random.Random(0).shuffle(positions)
    for position in positions:
        found = data[position]
        assert _equal(found, _sample(position))
        assert found.latents.dtype == torch.float16
    assert found.time_ids == [position, position + 1, 2, 3, *_sample(position).facts["target_size"]]
    assert data.empty_prompt["prompt_embeds"].dtype == torch.float32
    assert {name: list(rows.shape) for name, rows in data.empty_prompt.items()} == {
        "prompt_embeds": [7, 6],
        "pooled": [5],
    }
    for outside in (-1, 60):
        with pytest.raises(IndexError):
            data[outside]


def test_webdataset_reads_them(folder: Path) -> None:
    pattern = f"{folder}/{{0..2}}.tar"
    found = list(webdataset.WebDataset(pattern, shardshuffle=False).decode())
    assert len(found) == 60
    for number, sample in enumerate(found):
        wanted = _sample(number)
        assert (sample["__key__"], sample["txt"], sample["json"]) == (wanted.key, wanted.caption, wanted.facts)
        for name in shards.TENSORS:
            assert torch.equal(torch.from_numpy(sample[f"{name}.npy"]), getattr(wanted, name))


def test_members_are_not_compressed_and_files_repeat(folder: Path, tmp_path: Path) -> None:
    content = (folder / "0.tar").read_bytes()
    assert _sample(0).latents.numpy().tobytes() in content
    with (
        open(tmp_path / "0.tar", "wb") as file,
        webdataset.TarWriter(file, encoder=False, mtime=0.0) as writer,
    ):
        for number in range(20):
            writer.write(_sample(number).members())
    assert (tmp_path / "0.tar").read_bytes() == content


def test_a_batch_has_one_shape_and_its_own_conditions(folder: Path) -> None:
    data = LatentShards(folder)
    seen = set()
    for step in range(15):
        latents, condition = data.batch(4, seed=1, images=4 * step)
        positions = data.positions(4, seed=1, images=4 * step)
        wanted = [_sample(position) for position in positions]
        assert latents.dtype == torch.float32 and latents.shape[0] == 4
        assert torch.equal(latents, torch.stack([sample.latents for sample in wanted]).float())
        assert torch.equal(condition["prompt_embeds"], torch.stack([s.prompt_embeds for s in wanted]).float())
        assert torch.equal(condition["pooled"], torch.stack([sample.pooled for sample in wanted]).float())
        assert condition["time_ids"].tolist() == [sample.time_ids for sample in wanted]
        assert {rows.dtype for rows in condition.values()} == {torch.float32}
        seen.update(positions)
    assert len(seen) == 60  # 24, 24 and 12 samples: whole batches, so this was one epoch


def test_buckets_smaller_than_a_batch_are_named_once(folder: Path) -> None:
    data = LatentShards(folder)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.positions(12, seed=0, images=0)
    with pytest.warns(UserWarning, match=r"batches of 16 hold samples several times .*: 4x10x6 \(12\); prepare"):
        data.positions(4, seed=0, images=0, world_size=4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.positions(16, seed=0, images=16)


def test_resuming_needs_the_number_of_images_alone(folder: Path) -> None:
    whole = [LatentShards(folder).positions(4, seed=1, images=images) for images in range(0, 400, 4)]
    later = LatentShards(folder)
    assert [later.positions(4, seed=1, images=images) for images in range(200, 400, 4)] == whole[50:]
    other_seed = [later.positions(4, seed=2, images=images) for images in range(0, 400, 4)]
    assert other_seed != whole
    assert [later.positions(4, seed=1, images=images) for images in range(0, 400, 4)] == whole


def test_many_threads_and_few_open_files(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_OPEN_FILES", 1)
    data, failures = LatentShards(folder), list[int]()

    def work(seed: int) -> None:
        draw = random.Random(seed)
        for position in (draw.randrange(60) for _ in range(60)):
            if not _equal(data[position], _sample(position)):
                failures.append(position)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(data._files) == 1


def test_it_can_be_sent_to_a_worker_process(folder: Path) -> None:
    assert _equal(pickle.loads(pickle.dumps(LatentShards(folder)))[33], _sample(33))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("no index", "is missing: `sdxl-fast data prepare` writes it"),
        ("index of something else", "its format is None"),
        ("half an index", "damaged"),
        ("missing shard", r"1\.tar is missing, the index says"),
        ("longer shard", r"1\.tar has \d+ bytes, the index says"),
        ("no samples", "no samples"),
    ],
)
def test_what_cannot_be_right_is_refused(folder: Path, tmp_path: Path, damage: str, message: str) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    if damage == "no index":
        (copy / INDEX).unlink()
    elif damage == "index of something else":
        save_file({"rows": torch.zeros(1, 4, dtype=torch.int64)}, copy / INDEX)
    elif damage == "half an index":
        (copy / INDEX).write_bytes((copy / INDEX).read_bytes()[:100])
    elif damage == "missing shard":
        (copy / "1.tar").unlink()
    elif damage == "longer shard":
        with open(copy / "1.tar", "ab") as file:
            file.write(b"\0")
    else:
        Index([], [], torch.zeros(0, 4, dtype=torch.int64)).save(copy)
    with pytest.raises(DataError, match=message):
        LatentShards(copy)


def test_an_index_that_points_elsewhere_is_noticed_when_read(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    rows = load_file(copy / INDEX)["rows"]
    index = Index.load(copy)
    for change, message in (
        ((0, 512, 0, 0), "not a sample"),  # one member too few
        ((0, 7, 0, 0), "not a sample"),
        ((0, 0, 5000, 0), "not a sample"),  # into the next one
        ((0, 0, 0, 1), r"latents are \[4, 8, 8\], the index says \[4, 6, 10\]"),
    ):
        Index(index.shards, index.shapes, rows + torch.tensor(change) * (torch.arange(60) == 0)[:, None]).save(copy)
        with pytest.raises(DataError, match=message):
            LatentShards(copy)[0]


def test_pickles_are_refused() -> None:
    import io

    import numpy as np

    members = _sample(0).members()
    out = io.BytesIO()
    np.save(out, np.array([print], dtype=object), allow_pickle=True)
    tar = io.BytesIO()
    with webdataset.TarWriter(tar, encoder=False) as writer:
        writer.write(members | {"pooled.npy": out.getvalue()})
    with pytest.raises(DataError, match="not a sample"):
        parse(tar.getvalue(), "here")
