# SPDX-License-Identifier: Apache-2.0
"""Contact sheets and loss curves: what is where on the sheet, and files that are whole or absent."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sdxl_fast.errors import DataError
from sdxl_fast.eval.plots import plot_losses, read_metrics, smooth
from sdxl_fast.eval.sheets import contact_sheet, draw_contact_sheet, to_pil

COLOURS = {"teacher": ["red", "lime"], "1 step": ["blue", "yellow"]}


def _columns(size: tuple[int, int] = (64, 64)) -> dict[str, list[Image.Image]]:
    return {name: [Image.new("RGB", size, colour) for colour in colours] for name, colours in COLOURS.items()}


def _count(sheet: Image.Image, colour: str) -> tuple[int, tuple[float, float]]:
    """How many pixels have exactly this colour, and their centre."""
    wanted = np.asarray(Image.new("RGB", (1, 1), colour))[0, 0]
    y, x = (np.asarray(sheet) == wanted).all(-1).nonzero()
    return len(x), (float(x.mean()), float(y.mean()))


def test_every_picture_is_in_its_row_and_column() -> None:
    sheet = draw_contact_sheet(_columns(), ["red apple", "sailboat"])
    found = {colour: _count(sheet, colour) for colours in COLOURS.values() for colour in colours}
    assert {count for count, _ in found.values()} == {128 * 128}  # 64 px are doubled
    centre = {colour: place for colour, (_, place) in found.items()}
    assert centre["red"][0] == centre["lime"][0] < centre["blue"][0] == centre["yellow"][0]
    assert centre["red"][1] == centre["blue"][1] < centre["lime"][1] == centre["yellow"][1]


def test_labels_are_drawn_and_stay_outside_the_pictures() -> None:
    long = "a red apple and a green one on a wooden table beside the open window of a house"
    sheet = draw_contact_sheet(_columns(), [long, "x"], factor=1)
    for colours in COLOURS.values():
        for colour in colours:
            assert _count(sheet, colour)[0] == 64 * 64
    plain = np.asarray(draw_contact_sheet({"": _columns()["teacher"]}, ["", ""]))
    dark = (np.asarray(sheet) < 100).all(-1).sum()
    assert dark > 200
    assert (plain < 100).all(-1).sum() == 0


def test_sheet_refusals(tmp_path: Path) -> None:
    columns = _columns()
    with pytest.raises(ValueError, match="at least one of each"):
        contact_sheet({}, ["a"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="has 2 pictures for 3 rows"):
        contact_sheet(columns, ["a", "b", "c"], tmp_path / "a.png")
    with pytest.raises(ValueError, match="one size"):
        contact_sheet({**columns, "8": _columns((32, 32))["1 step"]}, ["a", "b"], tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_sheet_file(tmp_path: Path) -> None:
    path = contact_sheet(_columns(), ["a", "b"], tmp_path / "new" / "sheet.png")
    with Image.open(path) as written:
        assert np.array_equal(np.asarray(written), np.asarray(draw_contact_sheet(_columns(), ["a", "b"])))
    assert [entry.name for entry in path.parent.iterdir()] == ["sheet.png"]


def test_to_pil_rounds() -> None:
    picture = to_pil(torch.tensor([0.0, 0.5, 1.2]).reshape(1, 3, 1, 1))[0]
    assert picture.getpixel((0, 0)) == (0, 128, 255)


def _write(path: Path, rows: list[dict[str, object]], end: str = "") -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + end)
    return path


def test_read_metrics_keeps_what_a_kill_left(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"images": 48, "loss": 2.0, "stage": "a"}, {"images": 96, "loss": 1.0, "gap": 5}]
    series = read_metrics(_write(tmp_path / "m.jsonl", rows, end='{"images": 144, "lo'))
    assert series == {"loss": ([48.0, 96.0], [2.0, 1.0]), "gap": ([96.0], [5.0])}


@pytest.mark.parametrize("damage", ['{"images": 1, "lo\n', "[]\n", '{"loss": 1}\n'])
def test_read_metrics_refuses_damage_elsewhere(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"images": 1, "loss": 1}\n' + damage + '{"images": 2, "loss": 1}\n')
    with pytest.raises(DataError, match="line 2"):
        read_metrics(path)


def test_smooth() -> None:
    assert smooth([3.0] * 5, span=4.0) == pytest.approx([3.0] * 5)
    decay = math.exp(-0.5)
    assert smooth([1.0, 0.0], span=2.0)[1] == pytest.approx(decay / (1.0 + decay))
    assert smooth([1.0, math.nan, 1.0], span=2.0) == pytest.approx([1.0] * 3)
    assert math.isnan(smooth([math.inf], span=2.0)[0])


def test_plot(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"images": i, "loss": 10.0 / i, "accuracy": 0.5, "norm": math.nan if i == 3 else 1.0, "x": -i}
        for i in range(1, 40)
    ]
    path = plot_losses(_write(tmp_path / "m.jsonl", rows), tmp_path / "out" / "loss.png", title="stage")
    with Image.open(path) as picture:
        assert picture.size == (1500, 600)  # four quantities: three columns, two rows
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 50
    assert [entry.name for entry in path.parent.iterdir()] == ["loss.png"]


def test_plot_refusals(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        plot_losses(tmp_path / "m.jsonl", tmp_path / "loss.png")
    with pytest.raises(DataError, match="holds no numbers"):
        plot_losses(_write(tmp_path / "m.jsonl", []), tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
