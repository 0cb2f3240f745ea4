"""The stages of progressive adversarial distillation: their order, what each starts from, and the chain of hashes.

Lineage (the paper leaves it open, SDXL-Lightning §3.6): one LoRA on the frozen base goes on from stage to stage, so
that each released LoRA is valid on the base; the base with that LoRA merged is the next stage's teacher and starting
point; a full-UNet branch leaves at each merge and is not continued. The discriminator starts from the base in each
stage; from D to D' its backbone is kept, the head is new.
"""

from __future__ import annotations

import gc
import hashlib
import json
import platform
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from ..diffusion import schedule
from ..diffusion.prediction import PredictionType
from ..files import file_sha256, replacing
from ..models.discriminators import LightningDiscriminator
from ..models.encoders import make_encoder
from ..models.facts import Facts
from ..models.lora import merge_lora, read_lora, write_lora
from ..nn import fuse
from . import distributed
from .base import base_folder, unet_folder
from .bench import Bench, lay_out, load_teacher, make_bench
from .config import AdversarialPhase, LightningConfig, StageConfig, Trains
from .export import PUBLISHED, export_pipeline, publish_student
from .interruptions import STOP
from .lightning import AdversarialTask, RegressionTask, Student, StudentTask, Teacher
from .stage_settings import BASE, BASE_STEPS
from .students import adapter_pairs, add_lora, load_adapter, same_lora_on
from .trainer import fit

STUDENT, AVERAGE = "student.safetensors", "average.safetensors"


@dataclass(frozen=True)
class Unit:
    """One thing that runs: an MSE stage, a conversion to x0, or one phase of an adversarial stage."""

    index: int
    stage: StageConfig
    name: str
    phase: AdversarialPhase | None = None
    convert: bool = False

    @property
    def trains(self) -> Trains:
        """What of the student learns: "lora" or "full"."""
        if self.phase is not None:
            return self.phase.trains
        return "full" if self.convert else "lora"

    @property
    def images(self) -> int:
        """Length of the unit."""
        if self.phase is not None:
            return self.phase.images
        return self.stage.convert_images if self.convert else self.stage.images

    def folder(self, run: Path) -> Path:
        """Where it keeps its checkpoints and results."""
        return run / f"{self.index:02d}-{self.stage.name}-{self.name}"


def units_of(config: LightningConfig) -> list[Unit]:
    """Every unit of the recipe in order."""
    units: list[Unit] = []
    for stage in config.stages:
        if stage.loss == "mse":
            units.append(Unit(len(units), stage, "mse"))
        if stage.convert_images:
            units.append(Unit(len(units), stage, "convert", convert=True))
        for phase in stage.phases:
            units.append(Unit(len(units), stage, phase.name, phase))
    return units


class Lineage:
    """Reads and writes what the units leave behind for one another."""

    def __init__(self, bench: Bench[LightningConfig], run: Path) -> None:
        self.config, self.run, self.prediction_type = bench.config, run, bench.prediction_type
        self.bench, self.source = bench, bench.source
        self.base: Any = bench.base
        self.units = units_of(bench.config)
        self.initial = None if bench.config.initial is None else Path(bench.config.initial)

    def _last(self, stage: str | None = None, trains: str | None = None, before: int | None = None) -> Unit | None:
        found = [
            unit
            for unit in self.units[: before if before is not None else len(self.units)]
            if stage in (None, unit.stage.name) and trains in (None, unit.trains)
        ]
        return found[-1] if found else None

    def plain_base(self) -> Any:
        """A copy of the base UNet to change, in the precision of what trains."""
        return self.bench.base_to_train()

    def merged(self, unit: Unit | None, which: int = 0, file: str = STUDENT) -> Any:
        """A base with that unit's LoRA merged, to train; the base itself, or with the LoRA to start from, for None."""
        unet = self.bench.base_to_train(which)
        path = self.initial if unit is None else unit.folder(self.run) / file
        if path is not None:
            merge_lora(unet, read_lora(path, unet))
        return unet

    def of_stage(self, name: str, which: int = 0) -> tuple[Any, int]:
        """The LoRA-merged model a stage ended with, frozen, and its step count; "base" teaches the first stage."""
        if name == BASE:
            return self.bench.frozen_base(which), BASE_STEPS
        unit = self._last(stage=name, trains="lora")
        if unit is None:
            raise ValueError(f"stage {name!r} is to teach, but trains no LoRA or does not exist")
        file = AVERAGE if self.config.teach_average else STUDENT
        return self.bench.froze(self.merged(unit, which, file)), unit.stage.steps

    def teacher_of(self, unit: Unit, which: int = 0) -> tuple[Any, int]:
        """The teacher network of a unit and its step count: the phase's own choice, else the stage before."""
        names = [stage.name for stage in self.config.stages]
        position = names.index(unit.stage.name)
        before = names[position - 1] if position else BASE
        return self.of_stage((unit.phase.teacher if unit.phase else None) or before, which)

    def student_of(self, unit: Unit) -> Any:
        """The unit's student at its start, with only what it trains requiring gradients."""
        previous = self._last(trains="lora", before=unit.index)
        if unit.trains == "lora":
            unet = self.bench.frozen_base()
            path = self.initial if previous is None else previous.folder(self.run) / STUDENT
            start = None if path is None else read_lora(path, unet)
            add_lora(unet, self.config)
            if start is not None:
                load_adapter(unet, start, str(path))
            return unet
        before = self.units[unit.index - 1] if unit.index else None
        if before is not None and before.stage is unit.stage and before.trains == "full":
            unet = self.plain_base()
            unet.load_state_dict(load_file(before.folder(self.run) / STUDENT))
        else:
            unet = self.merged(previous)
        return unet.requires_grad_(True)

    def discriminator_of(self, unit: Unit, phase: AdversarialPhase) -> LightningDiscriminator:
        """Starts from the base UNet in each stage; within a stage the backbone goes on, and the head if it fits.

        A phase of regression alone has trained none that could go on.
        """
        torch.manual_seed(self.config.seed + unit.index)
        backbone = self.config.discriminator.backbone
        encoder = make_encoder(backbone, self.base, self.bench.vae, bases=1 + len(self.bench.others))
        levels = len(self.base.config.down_block_types) - 1
        shortest = min(min(height, width) for _, height, width in self.source.shapes)
        d = LightningDiscriminator(
            encoder,
            conditional=phase.condition,
            side=1 << ((shortest // 2**levels).bit_length() - 1),
            head_channels=self.config.discriminator.head_channels,
        ).to(self.config.torch_device, self.config.trained_dtype)
        before = self.units[unit.index - 1] if unit.index else None
        if before is not None and before.stage is unit.stage and before.phase and before.phase.adversarial_weight:
            kept = load_file(before.folder(self.run) / "discriminator.safetensors")
            if before.phase.condition != phase.condition:
                kept = {key: value for key, value in kept.items() if key.startswith("encoder.")}
            d.load_state_dict(kept, strict=False)
        return d

    def write_student(self, unit: Unit, unet: nn.Module, file: str = STUDENT) -> None:
        """Saves a trained student: LoRA pairs, or the full UNet."""
        path = unit.folder(self.run) / file
        if unit.trains == "lora":
            alpha = self.config.alpha
            pairs = adapter_pairs(unet)
            if distributed.is_first():
                write_lora(
                    path, pairs, alpha=alpha, num_inference_steps=unit.stage.steps, prediction_type=self.prediction_type
                )
        else:
            _write_weights(unet, path)


def _write_weights(module: nn.Module, path: Path) -> None:
    """The whole weights in one file; every process must call."""
    weights = distributed.gathered(module.state_dict())
    if distributed.is_first():
        with replacing(path) as writing:
            save_file(weights, writing)


def make_task(unit: Unit, bench: Bench[LightningConfig], lineage: Lineage) -> StudentTask:
    """The unit's networks, assembled from what came before it."""
    config, stage = bench.config, unit.stage
    bench = replace(bench, stage=unit.folder(Path()).name)
    taught = [lineage.teacher_of(unit, which) for which in range(1 + len(bench.others))]
    (unet, teacher_steps), teachers = taught[0], tuple(network for network, _ in taught[1:])
    first = teacher_steps == BASE_STEPS
    stride = schedule.NUM_TRAIN_TIMESTEPS / teacher_steps
    teacher = Teacher(bench, unet, stride, config.guidance_scale if first else 1.0, teachers)
    network = lineage.student_of(unit)
    students = tuple(same_lora_on(bench.frozen_base(1 + k), network, config) for k in range(len(bench.others)))
    kind: PredictionType = "sample" if stage.convert_images else bench.prediction_type
    student = Student(bench, network, kind, stage.steps, stage.grid, students, stage.timestep_weights)
    substeps = teacher_steps // stage.steps
    for each in (network, *students, unet, *teachers) if config.fuse else ():
        fuse(each)
    lay_out(config, [network, *students], [unet, *teachers])
    if unit.phase is None:
        return RegressionTask(student, teacher, substeps, config.optimizer, unit.images, convert=unit.convert)
    discriminator = lineage.discriminator_of(unit, unit.phase)
    if config.fuse and config.discriminator.backbone == "unet":
        fuse(discriminator.encoder.unet)
    if config.gradient_checkpointing:
        discriminator.train()
    if config.parallel == "fsdp" and distributed.size() > 1:
        blocks = distributed.unet_blocks(discriminator.encoder.unet)
        methods = ("features", "verdict")
        distributed.spread(discriminator, blocks, methods, computed_in=config.computed_in)
    return AdversarialTask(student, teacher, substeps, discriminator, unit.phase)


def _chain(run: Path) -> list[str]:
    """The lines of `chain.jsonl`; one that is not whole, which a killed process of an older version left, counts not.

    Raises:
        ValueError: a line that others follow is damaged.
    """
    path = run / "chain.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    for index, line in enumerate(lines):
        try:
            json.loads(line)
        except ValueError as error:
            if index == len(lines) - 1:
                return lines[:-1]
            raise ValueError(
                f"{path}: line {index + 1} is damaged; put it back, or remove it and all behind"
            ) from error
    return lines


def finished_units(run: Path) -> set[str]:
    """The folders of the units that have a line in `chain.jsonl`."""
    return {json.loads(line)["unit"] for line in _chain(run)}


def _record(unit: Unit, run: Path, seconds: float) -> None:
    """Appends the unit to `chain.jsonl`: what it made, hashed, and the hash of the line before it."""
    lines, folder = _chain(run), unit.folder(run)
    files = [folder / name for name in (STUDENT, "discriminator.safetensors", "metrics.jsonl")]
    line = {
        "unit": folder.name,
        "steps": unit.stage.steps,
        "images": unit.images,
        "seconds_of_last_session": round(seconds),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "sha256": {file.name: file_sha256(file) for file in files if file.is_file()},
        "previous": hashlib.sha256(lines[-1].encode()).hexdigest() if lines else None,
    }
    with replacing(run / "chain.jsonl") as writing:
        writing.write_text("".join(f"{each}\n" for each in (*lines, json.dumps(line))))


def _run_unit(unit: Unit, bench: Bench[LightningConfig], lineage: Lineage, *, resume: bool) -> bool:
    """Trains one unit and writes what it leaves behind; False when asked to stop. Its networks go with this frame."""
    config, folder = bench.config, unit.folder(lineage.run)
    task = make_task(unit, bench, lineage)
    started = time.perf_counter()
    if not fit(task, config, unit.images, folder, resume=resume, label=folder.name):
        return False
    with task.handed_on():
        lineage.write_student(unit, task.student.unet)
    if config.teach_average and unit.trains == "lora":
        with task.averaged():
            lineage.write_student(unit, task.student.unet, AVERAGE)
    if isinstance(task, AdversarialTask) and task.phase.adversarial_weight:
        _write_weights(task.discriminator, folder / "discriminator.safetensors")
    if distributed.is_first():
        if unit is lineage.units[-1] or lineage.units[unit.index + 1].stage is not unit.stage:
            _publish(lineage, unit.stage)
        _record(unit, lineage.run, time.perf_counter() - started)
    distributed.barrier()  # the next unit reads these files
    return True


def run_stages(config: LightningConfig, run: Path, *, resume: bool) -> bool:
    """Runs every unit that is not finished yet, in order; False when asked to stop in between.

    A finished unit is one with a line in `chain.jsonl`; an unfinished one goes on from its newest checkpoint.
    """
    bench = make_bench(config, run)
    lineage = Lineage(bench, run)
    done = finished_units(run)
    for unit in lineage.units:
        if unit.folder(run).name in done:
            continue
        if distributed.agreed(STOP.set) or not _run_unit(unit, bench, lineage, resume=resume):
            return False
        gc.collect()  # spread networks (FSDP2) hold on to themselves by their hooks
    if distributed.is_first():
        _export(config, lineage, run)
    distributed.barrier()
    return True


def _publish(lineage: Lineage, stage: StageConfig) -> None:
    """Writes a finished stage's student into `run/published`: its LoRA, and its UNet as the last phase left it."""
    units = [unit for unit in lineage.units if unit.stage is stage]
    files = {unit.trains: unit.folder(lineage.run) / STUDENT for unit in units}
    publish_student(
        lineage.run / PUBLISHED,
        Facts(lineage.config.export_name, stage.steps, "sample" if stage.convert_images else lineage.prediction_type),
        base=unet_folder(base_folder(lineage.config.teacher)),
        lora=files.get("lora"),
        full=files["full"] if units[-1].trains == "full" else None,
    )


def _export(config: LightningConfig, lineage: Lineage, run: Path) -> None:
    """Writes `run/export` when the recipe ends in a one-step student."""
    last = lineage.units[-1]
    if last.stage.steps != 1:
        return
    student = lineage.plain_base()
    student.load_state_dict(load_file(last.folder(run) / STUDENT))
    loras = {u.stage.steps: u.folder(run) / STUDENT for u in lineage.units if u.trains == "lora"}
    few = {steps: path for steps, path in loras.items() if steps in (2, 4, 8)}
    export_pipeline(run / "export", load_teacher(config), student.cpu(), few, name=config.export_name)
