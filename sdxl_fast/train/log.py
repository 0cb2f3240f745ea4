"""Where a run's metrics go: JSON lines always, TensorBoard and Weights & Biases when the recipe asks."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..files import replacing
from . import distributed
from .config import RunConfig


class Log:
    """Metrics of one run or stage; of several processes the first writes.

    Args:
        folder: where `metrics.jsonl` is appended to.
        config: its `loggers` are opened.
        label: name of the run or stage.
        images: where it begins or goes on; what TensorBoard was told of later, by a process that was killed, goes.

    Raises:
        ValueError: a logger is not installed.
    """

    def __init__(self, folder: Path, config: RunConfig, label: str, images: int = 0) -> None:
        self._path = folder / "metrics.jsonl"
        self._board: Any = None
        self._wandb: Any = None
        if not distributed.is_first():
            return
        self._path.touch()
        if "tensorboard" in config.loggers:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError("loggers has tensorboard, which needs: pip install tensorboard") from None
            self._board = SummaryWriter(  # type: ignore[no-untyped-call]
                str(folder / "tensorboard"), purge_step=images + 1
            )
        if "wandb" in config.loggers:
            try:
                import wandb
            except ImportError:
                raise ValueError("loggers has wandb, which needs: pip install wandb") from None
            about = {"name": label, "dir": folder, "config": config.model_dump(mode="json")}
            self._wandb = wandb.init(project="sdxl_fast", id=_wandb_id(folder), resume="allow", **about)

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *error: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()

    def write(self, line: dict[str, float]) -> None:
        """One line; `images` is where it stands."""
        if not distributed.is_first():
            return
        _append(self._path, line)
        values = {name: value for name, value in line.items() if name != "images"}
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, int(line["images"]))
        if self._wandb is not None:
            self._wandb.log(values, step=int(line["images"]))

    def sheet(self, images: int, facts: dict[str, float]) -> None:
        """What was measured on a contact sheet goes to `sheets.jsonl`, and where else metrics go."""
        if not distributed.is_first():
            return
        _append(self._path.with_name("sheets.jsonl"), {"images": images, **facts})
        if self._board is not None:
            for name, value in facts.items():
                self._board.add_scalar(name, value, images)
        if self._wandb is not None:
            self._wandb.log(facts, step=images)

    def warn(self, images: int, warnings: list[str]) -> None:
        """Shows warnings above the progress bar and keeps them in `warnings.jsonl`."""
        if not distributed.is_first():
            return
        for warning in warnings:
            tqdm.write(f"warning: {self._path.parent.name}, {images:,} images: {warning}")
            _append(self._path.with_name("warnings.jsonl"), {"images": images, "warning": warning})


def _wandb_id(folder: Path) -> str:
    """Under which a run or stage goes on in W&B: drawn once and kept in its folder."""
    path = folder / "wandb-id.txt"
    if not path.is_file():
        with replacing(path) as writing:
            writing.write_text(uuid.uuid4().hex)
    return path.read_text()


def _append(path: Path, line: dict[str, Any]) -> None:
    with open(path, "a") as file:
        file.write(json.dumps(line) + "\n")
