"""The loop every recipe runs in: step, log, preview, checkpoint, resume. Progress is counted in images."""

from __future__ import annotations

import json
import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from ..eval.plots import plot_losses
from ..files import replacing
from . import checkpoint, distributed
from .base import export_of, run_folder
from .config import (
    AddConfig,
    AnyConfig,
    DistillationConfig,
    LcmConfig,
    LightningConfig,
    RunConfig,
    VaeConfig,
    cache_folder,
    load_recipe,
)
from .export import PUBLISHED
from .interruptions import STOP, StepAbandonedError, clear_temporaries
from .log import Log
from .monitor import Monitor, facts_of_sheet
from .optimizers import Update, learning_rate, make_optimizer

__all__ = ["Task", "Update", "export_of", "fit", "learning_rate", "make_optimizer", "means_of", "run", "run_folder"]


Facts = dict[str, float | torch.Tensor]
"""What a step has to log: numbers, or tensors of one that are fetched only then, as fetching waits for the GPU."""


class Task(ABC):
    """What a run trains: networks, optimisers and one step. The loop owns counting, logging and checkpoints."""

    parts: dict[str, checkpoint.Stateful]
    batch: int
    updates: tuple[Update, ...] = ()
    """What moves its networks, in the order of a step: the discriminator's, if there is one, and the other's."""
    seen: dict[int, dict[str, torch.Tensor]]
    """What the last gradient was made of, by the first sample of each micro-batch: kept for the guard against values
    that are not finite."""
    drawn: torch.Tensor | None = None
    """The pictures [N, 3, H, W] in -1..1 of the last contact sheet, for the monitor."""

    @abstractmethod
    def step(self, images: int) -> Facts:
        """One optimisation step on the batch that begins after `images` images; returns what to log."""

    def reading_ahead(self) -> AbstractContextManager[None]:
        """Inside, batches that take time to read are read before their step; here are none."""
        return nullcontext()

    @abstractmethod
    def preview(self, path: Path) -> None:
        """Writes a contact sheet with fixed seeds."""

    @abstractmethod
    def export(self, folder: Path) -> None:
        """Writes the trained result in diffusers' folder format."""


def means_of(facts: Mapping[str, Sequence[float | torch.Tensor]]) -> dict[str, float]:
    """The mean of each entry; what are tensors, one number each on one device, is fetched together."""
    found = [value for values in facts.values() for value in values if isinstance(value, torch.Tensor)]
    fetched = iter(torch.stack(found).tolist() if found else [])
    numbers = {
        name: [next(fetched) if isinstance(value, torch.Tensor) else value for value in values]
        for name, values in facts.items()
    }
    return {name: sum(values) / len(values) for name, values in numbers.items()}


def fit(task: Task, config: RunConfig, total: int, folder: Path, *, resume: bool, label: str) -> bool:
    """Trains `task` to `total` images in `folder`, from its newest checkpoint if `resume`; False when asked to stop.

    Every `log_every` images one line goes to `metrics.jsonl`; every `checkpoint_every` and at the end
    a checkpoint, a contact sheet and the loss curves are written; a contact sheet also before the first step. Of
    several processes the first writes.

    Raises:
        FloatingPointError: a loss or gradient is not finite; what each process saw of the batch lies in
            `not-finite-<images>-rank<r>.safetensors`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    torch.use_deterministic_algorithms(config.deterministic)
    images = resumed = _restore(task, config, folder) if resume else 0
    device, monitor = config.torch_device, Monitor(folder / "sheets.jsonl")
    # On short sequences torch's CPU flash kernel is slower than the plain products: 92 against 129 images/s for the
    # embedded teacher (bf16, 16 tokens, one core).
    attention = sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else nullcontext()
    sums: defaultdict[str, list[float | torch.Tensor]] = defaultdict(list)
    with (
        STOP.watching(),
        attention,
        task.reading_ahead(),
        Log(folder, config, label, images) as log,
        tqdm(
            total=total, initial=images, unit="img", desc=label, mininterval=5.0, disable=not distributed.is_first()
        ) as bar,
    ):
        if not images:
            _look_before(task, folder)
        started, logged = time.perf_counter(), images
        while images < total and not distributed.agreed(STOP.set):
            try:
                step = task.step(images)
            except StepAbandonedError:
                break
            except FloatingPointError as error:
                raise FloatingPointError(f"{error}; {_keep_batch(task, folder, images)}") from None
            for name, value in step.items():
                sums[name].append(value)
            images += task.batch
            bar.update(task.batch)
            if images - logged >= config.log_every or images >= total:
                line = distributed.average(means_of(sums))
                rate = (images - logged) / (time.perf_counter() - started)
                log.write({"images": images, "images_per_second": rate, **line})
                log.warn(images, monitor.check(line))
                bar.set_postfix({name: f"{value:.3g}" for name, value in line.items()})
                sums.clear()
                started, logged = time.perf_counter(), images
            due = images // config.checkpoint_every > (images - task.batch) // config.checkpoint_every
            if due and images < total:
                checkpoint.save(folder, task.parts, {"images": images}, keep=config.keep_checkpoints)
                _look(task, log, monitor, folder, images)
        if images > resumed:  # else it lies there, or is how the training begins
            checkpoint.save(folder, task.parts, {"images": images}, keep=config.keep_checkpoints)
        if images < total:  # asked to stop: soon
            return False
        if images > resumed or distributed.agreed(not _sheet(folder, images).is_file()):
            _look(task, log, monitor, folder, images)
    return True


def _keep_batch(task: Task, folder: Path, images: int) -> str:
    """Writes all micro-batches that this process saw of a batch, one behind the other; where to, and what had moved."""
    path = folder / f"not-finite-{images:09d}-rank{distributed.rank()}.safetensors"
    parts = [task.seen[first] for first in sorted(task.seen)]
    batch = {name: torch.cat([part[name].detach().cpu() for part in parts]).contiguous() for name in parts[0]}
    with replacing(path) as writing:
        save_file(batch, writing)
    d_moved = any(update.moved_after == images for update in task.updates)
    moved = "the discriminator was updated, the other network not" if d_moved else "nothing was updated"
    return f"{moved}, the batch is kept in {path}"


def _sheet(folder: Path, images: int) -> Path:
    return folder / f"sheet-{images:09d}.png"


def _look_before(task: Task, folder: Path) -> None:
    """Draws, once, what the training begins with, for whoever looks at later sheets.

    The monitor does not: a student that is to learn few steps begins blurred. Nothing is compiled for it, as what is
    compiled first is compiled for its shapes alone.
    """
    if distributed.agreed(not _sheet(folder, 0).is_file()):
        with torch.compiler.set_stance("force_eager"):
            task.preview(_sheet(folder, 0))
        task.drawn = None


def _look(task: Task, log: Log, monitor: Monitor, folder: Path, images: int) -> None:
    """Draws the contact sheet and the loss curves up to it, and warns if it shows one of the known failures."""
    task.preview(_sheet(folder, images))
    if distributed.is_first() and (folder / "metrics.jsonl").stat().st_size:
        plot_losses(folder / "metrics.jsonl", folder / "losses.png", title=folder.name)
    if task.drawn is None:
        return
    facts = facts_of_sheet(task.drawn)
    task.drawn = None
    log.sheet(images, facts)
    log.warn(images, monitor.check(facts))


def _restore(task: Task, config: RunConfig, folder: Path) -> int:
    """Loads the newest checkpoint, if any, and drops metric lines written after it; the images it stands at.

    Of older ones those go that a killed process had no time to remove.
    """
    newest = checkpoint.latest(folder)
    images = 0 if newest is None else int(checkpoint.load(newest, task.parts)["images"])
    if distributed.is_first():
        checkpoint.prune(folder, config.keep_checkpoints)
        for name in ("metrics.jsonl", "sheets.jsonl", "warnings.jsonl"):
            _drop_later_lines(folder / name, images)
    return images


def _drop_later_lines(path: Path, images: int) -> None:
    """Keeps the lines up to a checkpoint; what a killed process wrote after it, or half a line, goes."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            if json.loads(line)["images"] <= images:
                kept.append(line)
        except ValueError:
            continue
    with replacing(path) as writing:
        writing.write_text("".join(line + "\n" for line in kept))


def run(
    recipe: str | Path,
    overrides: list[str],
    *,
    resume: str | None = None,
    dry_run: bool = False,
    processes: int | None = None,
) -> Path:
    """Runs a recipe and returns the folder of its exported result: a pipeline, or the files of its stages' students.

    Args:
        recipe: path of a YAML recipe, or the name of one of the package's.
        overrides: `a.b=value` settings that replace the recipe's.
        resume: "latest" goes on from the newest checkpoint of the run; None starts anew and refuses a folder in use.
        dry_run: print what would run and stop.
        processes: for how many to print it; None: those that are running.

    Raises:
        ValueError: bad recipe or `resume`, or the run's folder already holds a run.
    """
    config = load_recipe(recipe, overrides)
    distributed.start(config.torch_device)
    if distributed.size() > 1 and not isinstance(config, DistillationConfig):
        raise ValueError(f"{distributed.size()} processes were started, but a run of kind {config.kind} takes one")
    folder = cache_folder() / "runs" / config.run
    if resume not in (None, "latest"):
        raise ValueError(f"--resume is {resume!r}; allowed: latest")
    if dry_run:
        from .plan import plan

        print(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False) + f"# runs in {folder}")
        print(plan(config, folder, processes))
        return folder
    if resume is None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} already holds a run; pass --resume latest, or another name with --set run=NAME")
    distributed.barrier()  # before the first process fills the folder
    folder.mkdir(parents=True, exist_ok=True)
    if distributed.is_first():
        clear_temporaries(folder)
        with replacing(folder / "recipe.yaml") as writing:
            writing.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    distributed.barrier()
    with STOP.watching():
        finished = _run_kind(config, folder, resume is not None)
    made = folder / ("export" if not finished or (folder / "export").is_dir() else PUBLISHED)
    print(f"{made}" if finished else f"stopped; `--resume latest` goes on in {folder}")
    return made


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
    elif isinstance(config, LcmConfig):
        from .lcm import LcmTask

        task = LcmTask(config, folder)
    else:
        from .teacher import TeacherTask

        task = TeacherTask(config, folder)
    if not fit(task, config, config.images, folder, resume=resume, label=config.run):
        return False
    task.export(folder / "export")
    return True
