"""`sdxl-fast data prepare` as a command."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from sdxl_fast import cli
from sdxl_fast.testing.pictures import contents, encoded, good_rows, picture, prepare_small, write_folder

pytest.importorskip("webdataset", reason="the extra data is not installed")


def _command(capsys: pytest.CaptureFixture[str], *arguments: Any) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        cli.main(["data", "prepare", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(caught.value.code or 0), captured.out, captured.err


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 good pictures in four shards' worth of rows, the last with two."""
    return write_folder(tmp_path_factory.mktemp("source") / "set", good_rows(20))


def test_the_command(
    source: Path,
    toy_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "out"
    arguments = [source, "--out", out, "--model", toy_folder, "--rows-per-shard", 6, "--device", "cpu"]
    for rank, expected in ((1, "shards are missing"), (0, "20 of 20 pictures kept")):  # as torchrun says who one is
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, printed, _ = _command(capsys, *arguments)
        assert code == 0 and expected in printed
    prepare_small(source, tmp_path / "wanted", toy_folder)
    assert contents(out) == contents(tmp_path / "wanted")
    code, printed, _ = _command(capsys, *arguments, "--crop", "random")
    assert code == 2


def test_the_minimum_side_is_the_models_own_whatever_the_resolution(
    toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*good_rows(2), ({"file_name": "small.png", "text": "a"}, encoded(picture(9, 32, 32)))]
    folder = write_folder(tmp_path / "set", rows)
    arguments = [folder, "--model", toy_folder, "--resolution", 16, "--buckets", "square", "--device", "cpu"]
    for options, kept in (([], 2), (["--min-side", 16], 3)):
        _, printed, _ = _command(capsys, *arguments, *options, "--out", tmp_path / str(kept))
        assert f"{kept} of 3 pictures kept" in printed


def test_nothing_kept_is_reported_and_a_failure(
    source: Path, toy_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [source, "--out", tmp_path / "out", "--model", toy_folder, "--min-side", 500, "--device", "cpu"]
    code, printed, err = _command(capsys, *arguments)
    assert code == 2 and "0 of 20 pictures kept" in printed
    assert "none of 20 pictures was kept" in err and err.count("\n") == 1
    assert (tmp_path / "out" / "report.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/nowhere"], "no such folder"),
        (["SOURCE", "--buckets", "33x32"], "multiples of 8"),
        (["SOURCE", "--crop", "left"], "'center' or 'random'"),
        (["SOURCE", "--model", "/nowhere"], "/nowhere: no such folder or file"),
        (["SOURCE", "--resolution", "36"], "multiples of 8"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(
    source: Path,
    toy_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    given = [source if argument == "SOURCE" else argument for argument in arguments]
    if "--resolution" in given:
        given += ["--buckets", "square"]
    model = [] if "--model" in given else ["--model", toy_folder]
    code, _, err = _command(capsys, *given, *model, "--out", tmp_path / "out")
    assert code == 2 and err.startswith("sdxl-fast: error: ") and err.count("\n") == 1
    assert message in err
    assert not (tmp_path / "out").exists()
