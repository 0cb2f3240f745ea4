"""A small image folder, and the shards of it, made once."""

from __future__ import annotations

from pathlib import Path

import pytest

from sdxl_fast.testing.pictures import good_rows, prepare_small, write_folder


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 good pictures in four shards' worth of rows, the last with two."""
    return write_folder(tmp_path_factory.mktemp("source") / "set", good_rows(20))


@pytest.fixture(scope="session")
def made(source: Path, toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That set, prepared in one go."""
    out = tmp_path_factory.mktemp("made") / "out"
    prepare_small(source, out, toy_folder)
    return out
