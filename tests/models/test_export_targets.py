"""Where exports go: what lies there already, and what names are taken for."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from sdxl_fast.models import export
from sdxl_fast.models.source import open_model


def test_a_folder_of_other_things_is_not_replaced(toy_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(ValueError, match="is not a pipeline folder, which would be replaced"):
        export.export_folder(open_model(toy_folder), tmp_path)
    with pytest.raises(ValueError, match="is not a pipeline folder"):
        export.export_folder(open_model(toy_folder), tmp_path / "thesis.tex")
    with pytest.raises(ValueError, match=r"exists and is no \.safetensors file"):
        export.export_unet(open_model(toy_folder), tmp_path / "thesis.tex")
    assert os.listdir(tmp_path) == ["thesis.tex"]


def test_what_lies_beside_a_pipeline_is_not_deleted(toy_folder: Path, tmp_path: Path) -> None:
    target = Path(shutil.copytree(toy_folder, tmp_path / "clone"))
    (target / ".git").mkdir()
    for name in ("thesis.txt", "README.md"):
        (target / name).touch()
    before = sorted(target.rglob("*"))
    with pytest.raises(ValueError, match=r"no part of an exported pipeline: \.git, thesis\.txt; move that away"):
        export.export_folder(open_model(toy_folder), target)
    assert sorted(target.rglob("*")) == before
    (target / ".git").rmdir()
    (target / "thesis.txt").unlink()
    export.export_folder(open_model(toy_folder), target)
    assert not (target / "README.md").exists()
