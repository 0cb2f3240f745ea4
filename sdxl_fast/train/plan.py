"""What a recipe would do, without doing it: stages, what trains in each, how long, and how much memory it takes."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..models.feature_nets import feature_shape
from ..models.networks import skeleton
from ..models.source import PUBLISHED
from . import checkpoint, distributed
from .config import (
    RECIPES,
    AddConfig,
    AnyConfig,
    DistillationConfig,
    LcmConfig,
    LightningConfig,
    OptimizerConfig,
    TeacherConfig,
    Trains,
    load_recipe,
)
from .optimizers import bytes_per_parameter
from .rehearsal import Rehearsal
from .stage_settings import BASE

GIB = 2**30


@dataclass(frozen=True)
class Trained:
    """One network that trains: its parameters, how wide they are, what moves them, their copies' width, and among how
    many processes it is spread.
    """

    name: str
    parameters: int
    optimizer: OptimizerConfig
    width: int
    averaged: bool
    copies: int
    shards: int = 1

    @property
    def bytes(self) -> int:
        """Of each process: weights, gradients, moments, the average in float32 or wider, and the copies that a step
        computes with.
        """
        average = max(4, self.width) if self.averaged else 0
        moments = bytes_per_parameter(self.optimizer, self.width)
        return self.parameters * (2 * self.width + moments + average + self.copies) // self.shards


@dataclass(frozen=True)
class Part:
    """A stage, a phase of it or a whole run: what it trains beside what it only uses, in bytes of each process, and its
    length.
    """

    name: str
    what: str
    trained: tuple[Trained, ...]
    frozen_bytes: int
    activation_bytes: int
    images: int
    left: int


def teacher_networks(config: DistillationConfig) -> dict[str, dict[str, Any]]:
    """Configurations of the teacher's "unet" and "vae": from its folder, SDXL's own, or the recipe that makes it.

    Raises:
        ValueError: none of these says what the teacher looks like.
    """
    from ..models.networks import sdxl_configs
    from .base import export_of

    places = {"unet": export_of(config.teacher) / "unet", "vae": export_of(config.teacher) / "vae"}
    if config.vae is not None and not (places["vae"] / "config.json").is_file():
        places["vae"] = export_of(config.vae)
    if all((place / "config.json").is_file() for place in places.values()):
        return {name: json.loads((place / "config.json").read_text()) for name, place in places.items()}
    if config.teacher == PUBLISHED:
        return sdxl_configs()
    for path in sorted(RECIPES.glob("*.yaml")):
        recipe = load_recipe(path)
        if isinstance(recipe, TeacherConfig) and recipe.run == config.teacher:
            return {"unet": recipe.pipeline.unet_arguments(), "vae": recipe.pipeline.vae_arguments()}
    raise ValueError(
        f"teacher {config.teacher!r} is not there yet, so its size is unknown; allowed: a run, a pipeline folder, or "
        f"{PUBLISHED}"
    )


def _count(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _trainable(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters() if parameter.requires_grad)


def _left(folder: Path, images: int, *, done: bool = False) -> int:
    newest = checkpoint.latest(folder)
    return 0 if done else images - (int(newest.name.rpartition("-")[2]) if newest else 0)


def _copies(config: DistillationConfig) -> int:
    """Bytes of the copy that autocast keeps of each weight that trains, until its backward."""
    return 2 if config.precision == "bf16" and config.trained_dtype.itemsize > 2 else 0


def _shards(config: DistillationConfig, processes: int) -> int:
    """Among how many processes UNets and Lightning's discriminator are spread; all else is whole in each."""
    return processes if config.parallel == "fsdp" else 1


def _frozen(rehearsal: Rehearsal, trains: Trains, *, merged: bool = False) -> int:
    """Bytes of each process in the VAE and UNets that do not train: one for all, and another to teach if `merged`.

    Spread networks cannot share: teacher and what a LoRA stands on are copies of the base, which stays beside them
    where its precision is theirs.
    """
    config = rehearsal.config
    shards = _shards(config, rehearsal.processes)
    unet = _count(rehearsal.unet) * config.frozen_dtype.itemsize
    vae = _count(rehearsal.vae) * config.dtype.itemsize
    if shards == 1:
        return vae + (1 + merged) * unet
    base = unet if config.frozen_dtype == config.dtype else 0
    return vae + base + (1 + (trains == "lora")) * unet // shards


def _lightning(config: LightningConfig, folder: Path, rehearsal: Rehearsal) -> Iterator[Part]:
    from .stages import Unit, finished_units, units_of

    done = finished_units(folder)
    first = config.stages[0].name
    width, copies, shards = config.trained_dtype.itemsize, _copies(config), _shards(config, rehearsal.processes)
    activations = functools.cache(rehearsal.lightning)  # many units are alike, and networks take seconds to make

    @functools.cache
    def of_student(trains: Trains) -> int:
        return _trainable(rehearsal.student(trains))

    @functools.cache
    def of_discriminator(condition: bool) -> int:
        d = rehearsal.discriminator(condition)
        d.encoder.requires_grad_(not config.discriminator.freeze_backbone)
        return _trainable(d)

    def part(unit: Unit) -> Part:
        phase, place = unit.phase, unit.folder(folder)
        optimizer, d_optimizer = config.optimizers_of(phase) if phase else (config.optimizer, config.optimizer)
        layout = (width, config.averages(unit.trains), copies, shards)
        trained = [Trained(f"student ({unit.trains})", of_student(unit.trains), optimizer, *layout)]
        teacher = (phase.teacher if phase else None) or (BASE if unit.stage.name == first else "the stage before")
        what = f"{unit.stage.steps} steps, " + ("regression on its x0" if unit.convert else "regression")
        if phase is not None:
            name = "D" if phase.condition else "D'"
            trained.append(Trained(name, of_discriminator(phase.condition), d_optimizer, width, False, copies, shards))
            what = f"{unit.stage.steps} steps, adversarial, teacher {teacher}"
        frozen = _frozen(rehearsal, unit.trains, merged=teacher != BASE)
        held = activations(unit.trains, adversarial=phase is not None)
        left = _left(place, unit.images, done=place.name in done)
        return Part(place.name, what, tuple(trained), frozen, held, unit.images, left)

    return map(part, units_of(config))


def _single(config: AddConfig | LcmConfig, folder: Path, rehearsal: Rehearsal) -> Iterator[Part]:
    width, copies, shards = config.trained_dtype.itemsize, _copies(config), _shards(config, rehearsal.processes)
    count = _trainable(rehearsal.student(config.trains))
    trained = [Trained(f"student ({config.trains})", count, config.optimizer, width, True, copies, shards)]
    frozen = _frozen(rehearsal, config.trains)
    what = "latent consistency"
    if isinstance(config, AddConfig):
        heads = rehearsal.heads()
        if heads is not None:
            trained.append(Trained("heads", _count(heads), config.discriminator_optimizer, width, False, copies))
        names = filter(None, (config.feature_network, config.image_encoder))
        shapes = {name: feature_shape(name) for name in names}
        looks = ", ".join(f"{name} {shape.parameters:,}" if shape else f"{name} ?" for name, shape in shapes.items())
        what = f"ADD, {len(config.timesteps)} levels, {config.distillation}; looks through {looks}"
        seen = sum(shape.parameters for shape in shapes.values() if shape)
        frozen += seen * config.dtype.itemsize
    activations = (
        rehearsal.add() if isinstance(config, AddConfig) else rehearsal.lightning(config.trains, adversarial=False)
    )
    yield Part(config.run, what, tuple(trained), frozen, activations, config.images, _left(folder, config.images))


def _lines(config: DistillationConfig, parts: list[Part], count: int) -> Iterator[str]:
    each = config.batch // (count * config.accumulate)
    yield (
        f"# {count} process(es), {config.parallel}, {each} x {config.accumulate} of {config.batch} images each; "
        f"memory per process in GiB"
    )
    for part in parts:
        trained = ", ".join(f"{t.name} {t.parameters:,} at {t.optimizer.lr:g}" for t in part.trained)
        state = sum(t.bytes for t in part.trained)
        total = state + part.frozen_bytes + part.activation_bytes
        yield f"{part.name}: {part.what}"
        yield f"  trains {trained}"
        yield (
            f"  memory {total / GIB:.1f} = frozen {part.frozen_bytes / GIB:.1f} + weights, gradients, moments, average "
            f"{state / GIB:.1f} + activations {part.activation_bytes / GIB:.1f}"
        )
        updates = [-(-images // config.batch) for images in (part.left, part.images)]
        yield f"  {part.left:,} of {part.images:,} images, {updates[0]:,} of {updates[1]:,} updates to go"
    yield f"# {sum(part.left for part in parts):,} of {sum(part.images for part in parts):,} images to go"


def parts_of(config: LightningConfig | AddConfig | LcmConfig, folder: Path, processes: int = 1) -> list[Part]:
    """The stages of a distillation, with counts taken from networks on the meta device.

    Raises:
        ValueError: the batch does not divide into equal micro-batches of so many processes, or the teacher is unknown.
    """
    accumulate = config.accumulate
    if config.batch % (processes * accumulate):
        raise ValueError(
            f"batch is {config.batch}; {processes} processes that accumulate {accumulate} micro-batches each need a "
            f"multiple of {processes * accumulate}"
        )
    found = teacher_networks(config)
    rehearsal = Rehearsal(config, skeleton("unet", found["unet"]), skeleton("vae", found["vae"]), processes)
    if isinstance(config, LightningConfig):
        return list(_lightning(config, folder, rehearsal))
    return list(_single(config, folder, rehearsal))


def plan(config: AnyConfig, folder: Path, processes: int | None = None) -> str:
    """The text of `--dry-run`: stages, parameters trained, memory estimate per rank, images to go.

    `processes` are those that would share the work; None: those that are running.
    """
    count = processes or distributed.size()
    if not isinstance(config, LightningConfig | AddConfig | LcmConfig):
        left = _left(folder, config.images)
        return f"{config.run}: {left:,} of {config.images:,} images to go, {-(-left // config.batch):,} steps"
    try:
        parts = parts_of(config, folder, count)
    except ValueError as error:
        return f"# {error}"
    return "\n".join(_lines(config, parts, count))
