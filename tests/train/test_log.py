"""Where metrics go: JSON lines always, TensorBoard and Weights & Biases where asked for and installed."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from sdxl_fast.train.config import load_recipe
from sdxl_fast.train.log import Log


def _module(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def test_a_line_goes_to_every_logger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[Any] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            said.append(("board", Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            said.append(("board", name, value, step))

        def close(self) -> None:
            said.append(("board", "closed"))

    run = SimpleNamespace(
        log=lambda values, step: said.append(("wandb", values, step)), finish=lambda: said.append(("wandb", "finished"))
    )
    _module(monkeypatch, "torch.utils.tensorboard", SummaryWriter=Writer)
    _module(
        monkeypatch,
        "wandb",
        init=lambda **about: said.append(("wandb", about["name"], about["resume"], about["id"])) or run,
    )
    config = load_recipe("emoji_lcm", ["loggers=[tensorboard, wandb]"])
    with Log(tmp_path, config, "stage", 24) as log:
        log.write({"images": 48, "loss": 0.5})
        log.sheet(48, {"sheet_sharpness": 0.25})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"images": 48, "loss": 0.5}
    assert json.loads((tmp_path / "sheets.jsonl").read_text()) == {"images": 48, "sheet_sharpness": 0.25}
    board = [entry[1:] for entry in said if entry[0] == "board"]
    assert board == [("tensorboard", 25), ("loss", 0.5, 48), ("sheet_sharpness", 0.25, 48), ("closed",)]
    other = [entry[1:] for entry in said if entry[0] == "wandb"]
    name = (tmp_path / "wandb-id.txt").read_text()
    assert other == [("stage", "allow", name), ({"loss": 0.5}, 48), ({"sheet_sharpness": 0.25}, 48), ("finished",)]
    Log(tmp_path, config, "stage", 24)
    assert said[-1] == ("wandb", "stage", "allow", name), "a process that goes on goes on there too"


@pytest.mark.parametrize(("logger", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")])
def test_a_logger_that_is_not_installed_is_named(
    logger: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=f"loggers has {logger}, which needs: pip install"):
        Log(tmp_path, load_recipe("emoji_lcm", [f"loggers=[{logger}]"]), "stage")
