"""The loop every recipe runs in: step, log, preview, checkpoint, resume. Progress is counted in images."""

from __future__ import annotations

import json
import signal
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..eval.plots import plot_losses
from . import checkpoint
from .config import (
    AddConfig,
    AnyConfig,
    LightningConfig,
    OptimizerConfig,
    RunConfig,
    VaeConfig,
    cache_folder,
    load_recipe,
)


class Task(ABC):
    """What a run trains: networks, optimisers and one step. The loop owns counting, logging and checkpoints."""

    parts: dict[str, checkpoint.Stateful]
    batch: int

    @abstractmethod
    def step(self, images: int) -> dict[str, float]:
        """One optimisation step on the batch that begins after `images` images; returns what to log."""

    @abstractmethod
    def preview(self, path: Path) -> None:
        """Writes a contact sheet with fixed seeds."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the trained result in diffusers' folder format."""


def learning_rate(config: OptimizerConfig, images: int, total: int) -> float:
    """The rate for the batch beginning after `images` of `total` images."""
    warm = min(1.0, (images + 1) / config.warmup) if config.warmup else 1.0
    left = min(1.0, (total - images) / config.decay) if config.decay else 1.0
    return config.lr * warm * max(left, config.final)


def make_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the parameters; fused where torch has it for their device."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, eps=config.eps, weight_decay=config.weight_decay, fused=True
    )


def optimize(
    optimizer: torch.optim.Optimizer, loss: torch.Tensor, config: OptimizerConfig, images: int, total: int
) -> float:
    """Backward, clip, step at the scheduled rate; returns the gradient norm before clipping.

    Raises:
        FloatingPointError: the loss or a gradient is not finite; nothing was updated.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    norm = torch.nn.utils.clip_grad_norm_(parameters, config.max_grad_norm)
    if not torch.isfinite(norm):
        raise FloatingPointError(f"gradient norm is {norm.item()} with loss {loss.item()} after {images} images")
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, images, total)
    optimizer.step()
    return norm.item()


class _StopRequest:
    """Turns the first SIGTERM or SIGINT into a flag that the loop reads between steps."""

    def __init__(self) -> None:
        self.set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.set = True


def fit(task: Task, config: RunConfig, total: int, folder: Path, *, resume: bool, label: str) -> bool:
    """Trains `task` to `total` images in `folder`, from its newest checkpoint if `resume`; False when asked to stop.

    Every `log_every` images one line goes to `metrics.jsonl`; every `checkpoint_every` and at the end
    a checkpoint, a contact sheet and the loss curves are written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images = _restore(task, folder) if resume else 0
    stop = _StopRequest()
    # On short sequences torch's CPU flash kernel is slower than the plain products: 92 against 129 images/s for the
    # embedded teacher (bf16, 16 tokens, one core).
    attention = sdpa_kernel(SDPBackend.MATH) if config.torch_device.type == "cpu" else nullcontext()
    sums: defaultdict[str, list[float]] = defaultdict(list)
    started, logged = time.perf_counter(), images
    with (
        attention,
        open(folder / "metrics.jsonl", "a") as metrics,
        tqdm(total=total, initial=images, unit="img", desc=label, mininterval=5.0) as bar,
    ):
        while images < total and not stop.set:
            for name, value in task.step(images).items():
                sums[name].append(value)
            images += task.batch
            bar.update(task.batch)
            if images - logged >= config.log_every or images >= total:
                rate = (images - logged) / (time.perf_counter() - started)
                line = {name: sum(values) / len(values) for name, values in sums.items()}
                metrics.write(json.dumps({"images": images, "images_per_second": rate, **line}) + "\n")
                metrics.flush()
                bar.set_postfix({name: f"{value:.3g}" for name, value in line.items()})
                sums.clear()
                started, logged = time.perf_counter(), images
            if images // config.checkpoint_every > (images - task.batch) // config.checkpoint_every:
                _save(task, folder, images, config.keep_checkpoints)
    if images < total:  # asked to stop: soon
        checkpoint.save(folder, task.parts, {"images": images}, keep=config.keep_checkpoints)
        return False
    _save(task, folder, images, config.keep_checkpoints)
    return True


def _save(task: Task, folder: Path, images: int, keep: int) -> None:
    """A checkpoint, its contact sheet, and the loss curves up to it."""
    checkpoint.save(folder, task.parts, {"images": images}, keep=keep)
    task.preview(folder / f"sheet-{images:09d}.png")
    if (folder / "metrics.jsonl").stat().st_size:
        plot_losses(folder / "metrics.jsonl", folder / "losses.png", title=folder.name)


def _restore(task: Task, folder: Path) -> int:
    """Loads the newest checkpoint and drops metric lines written after it; the images it stands at."""
    newest = checkpoint.latest(folder)
    if newest is None:
        return 0
    images = int(checkpoint.load(newest, task.parts)["images"])
    path = folder / "metrics.jsonl"
    if path.is_file():
        lines = [line for line in path.read_text().splitlines() if json.loads(line)["images"] <= images]
        path.write_text("".join(line + "\n" for line in lines))
    return images


def run_folder(name: str) -> Path:
    """The folder of a run by name in the cache, or a path as given."""
    return Path(name) if Path(name).is_dir() else cache_folder() / "runs" / name


def export_of(name: str) -> Path:
    """What a run exported, by the run's name or folder; a folder without `export` is taken as an export itself."""
    folder = run_folder(name)
    return folder / "export" if (folder / "export").is_dir() else folder


def run(recipe: str | Path, overrides: list[str], *, resume: str | None = None, dry_run: bool = False) -> Path:
    """Runs a recipe and returns the folder of its exported result.

    Args:
        recipe: path of a YAML recipe, or the name of one of the package's.
        overrides: `a.b=value` settings that replace the recipe's.
        resume: "latest" goes on from the newest checkpoint of the run; None starts anew and refuses a folder in use.
        dry_run: print what would run and stop.

    Raises:
        ValueError: bad recipe or `resume`, or the run's folder already holds a run.
    """
    config = load_recipe(recipe, overrides)
    folder = cache_folder() / "runs" / config.run
    if resume not in (None, "latest"):
        raise ValueError(f"--resume is {resume!r}; allowed: latest")
    if dry_run:
        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False) + f"# runs in {folder}")
        return folder
    if resume is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds a run; pass --resume latest, or another name with --set run=NAME")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    finished = _run_kind(config, folder, resume is not None)
    print(f"{folder / 'export'}" if finished else f"stopped; `--resume latest` goes on in {folder}")
    return folder / "export"


def _run_kind(config: AnyConfig, folder: Path, resume: bool) -> bool:
    if isinstance(config, LightningConfig):
        from .stages import run_stages

        return run_stages(config, folder, resume=resume)
    task: Task
    if isinstance(config, VaeConfig):
        from .vae import VaeTask

        task = VaeTask(config)
    elif isinstance(config, AddConfig):
        from .add import AddTask

        task = AddTask(config, folder)
    else:
        from .teacher import TeacherTask

        task = TeacherTask(config, folder)
    if not fit(task, config, config.images, folder, resume=resume, label=config.run):
        return False
    task.export(folder / "export")
    return True
