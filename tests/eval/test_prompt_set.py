# SPDX-License-Identifier: Apache-2.0
"""Pictures of a prompt file: read, drawn once, cut."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sdxl_fast.errors import DataError
from sdxl_fast.eval.patches import centre_patch
from sdxl_fast.eval.prompt_set import batches, draw_set, pictures_of, read_prompts
from sdxl_fast.eval.sheets import to_pil

PROMPTS = [f"prompt {k}" for k in range(11)]


class Painter:
    """Draws noise by the seed and counts what it was asked for."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.asked: list[str] = []
        self.stop_after = stop_after

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        if self.stop_after is not None and len(self.asked) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked += prompts
        pictures = [torch.rand(3, 24, 32, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        return torch.stack(pictures)


def test_a_stopped_set_goes_on_with_the_same_pictures(tmp_path: Path) -> None:
    whole = draw_set(tmp_path / "whole", PROMPTS, Painter(), batch=4)
    first, second = Painter(stop_after=4), Painter()
    with pytest.raises(KeyboardInterrupt):
        draw_set(tmp_path / "halves", PROMPTS, first, batch=4)
    halves = draw_set(tmp_path / "halves", PROMPTS, second, batch=3)
    assert first.asked + second.asked == PROMPTS
    assert [file.read_bytes() for file in halves] == [file.read_bytes() for file in whole]
    assert len({file.read_bytes() for file in whole}) == len(PROMPTS), "each prompt has a seed of its own"
    third = Painter()
    assert draw_set(tmp_path / "halves", PROMPTS, third) == halves and third.asked == []


def test_pictures_are_not_waited_for_and_empty_ones_drawn_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", synced.append)
        files = draw_set(tmp_path, PROMPTS, Painter())
    assert len(synced) < len(PROMPTS), "but the record of the settings is"
    content = files[3].read_bytes()
    files[3].write_bytes(b"")
    again = Painter()
    assert draw_set(tmp_path, PROMPTS, again) == files and again.asked == [PROMPTS[3]]
    assert files[3].read_bytes() == content


def test_pictures_of_other_settings_are_not_mixed(tmp_path: Path) -> None:
    draw_set(tmp_path, PROMPTS, Painter(), settings={"steps": 1})
    with pytest.raises(DataError, match="other steps"):
        draw_set(tmp_path, PROMPTS, Painter(), settings={"steps": 2})
    with pytest.raises(DataError, match="other prompts"):
        draw_set(tmp_path, PROMPTS[::-1], Painter(), settings={"steps": 1})


def test_prompt_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\n two \nthree\n")
    assert read_prompts(tmp_path / "a.txt", 2) == ["one", "two"]
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two", "id": 3}\n')
    assert read_prompts(tmp_path / "b.jsonl") == ["one", "two"]
    (tmp_path / "c.txt").write_bytes("one\r\n\u2028two\n".encode("utf-8-sig"))
    assert read_prompts(tmp_path / "c.txt") == ["one", "two"], "neither a byte order mark nor ends of lines stay"
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for name in ("empty.txt", "latin.txt", "none.txt"):
        with pytest.raises(DataError, match=name):
            read_prompts(tmp_path / name)


@pytest.mark.parametrize(
    "line", ['"a"', '["a"]', "7", '{"text": 5}', '{"text": " "}', '{"caption": "one"}', "{", "one"]
)
def test_a_line_without_text_is_named(line: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n\n' + line + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl line 3: is "):
        read_prompts(tmp_path / "a.jsonl")
    assert read_prompts(tmp_path / "a.jsonl", 1) == ["one"]


def test_the_patch_is_the_middle_at_native_resolution() -> None:
    images = torch.arange(400 * 301, dtype=torch.float32).reshape(1, 1, 400, 301).expand(1, 3, -1, -1)
    patch = centre_patch(images)
    assert patch.shape == (1, 3, 299, 299)
    assert torch.equal(patch, images[:, :, 50:349, 1:300])
    assert torch.equal(centre_patch(images[..., :200, :200]), images[..., :200, :200])


def test_batches_hold_one_size_and_keep_the_order(tmp_path: Path) -> None:
    sizes = [8, 8, 16, 16, 16, 8]
    for index, side in enumerate(sizes):
        to_pil(torch.full((1, 3, side, side), index / 10))[0].save(tmp_path / f"{index}.png")
    found = list(batches(pictures_of(tmp_path), 2))
    assert [tuple(part.shape[::3]) for part in found] == [(2, 8), (2, 16), (1, 16), (1, 8)]
    order = torch.cat([part[:, 0, 0, 0] for part in found])
    torch.testing.assert_close(order, torch.arange(6) / 10, atol=1 / 255, rtol=0)
    with pytest.raises(DataError, match="no pictures"):
        (tmp_path / "empty").mkdir()
        pictures_of(tmp_path / "empty")
