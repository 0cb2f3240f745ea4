"""The stages of a SDXL-Lightning recipe: what each is made of, and that each can stand on those before it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator, model_validator

from ..diffusion import schedule
from .settings import Config

Trains = Literal["lora", "full"]
BASE = "base"
BASE_STEPS = 128
LAST = schedule.NUM_TRAIN_TIMESTEPS - 1


def _check_weights(name: str, weights: Sequence[float], of: str, values: Sequence[int]) -> None:
    if weights and (len(weights) != len(values) or min(weights) < 0 or not sum(weights)):
        raise ValueError(
            f"{name} is {weights} for {of} {values}; allowed: none, or one of at least 0 for each, not all 0"
        )


def _check_levels(levels: tuple[int, ...]) -> None:
    if any(not 0 <= level <= LAST for level in levels):
        raise ValueError(f"{levels} must be 0-based timesteps from 0 to {LAST}; the papers' 1000 is {LAST} here")


class AdversarialPhase(Config):
    """One phase of an adversarial stage: which discriminator judges, and what of the student trains."""

    name: str
    condition: bool = Field(description="True: D judges (x_t, x_{t-ns}); False: the relaxed D' sees x_{t-ns} alone")
    trains: Trains
    images: int = Field(gt=0)
    teacher: str | None = Field(None, description="stage that teaches this phase; None is the stage before")
    d_warmup: int = Field(0, ge=0, description="images on which D alone trains at the start of the phase")
    regression_weight: float = Field(0.0, ge=0, description="of the distance to the teacher beside that loss")
    adversarial_weight: float = Field(1.0, ge=0, description="of the loss through D; 0 trains by regression alone")
    renoise: tuple[int, ...] = Field((), description="timesteps t* that D sees x_0 re-noised to; empty: as it is")
    renoise_weights: tuple[float, ...] = ()
    lr: float | None = Field(None, description="the student's rate in this phase")
    d_lr: float | None = Field(None, description="the discriminator's rate in this phase")
    repeat: int = Field(
        0, ge=0, description="images after which the inputs come again, the teacher's targets kept in memory; 0: never"
    )

    @field_validator("renoise")
    @classmethod
    def _exist(cls, renoise: tuple[int, ...]) -> tuple[int, ...]:
        _check_levels(renoise)
        return renoise

    @model_validator(mode="after")
    def _has_a_loss(self) -> AdversarialPhase:
        if not self.adversarial_weight and not self.regression_weight:
            raise ValueError("adversarial_weight and regression_weight are both 0; give one of them")
        if self.adversarial_weight and self.repeat:
            raise ValueError("repeat is for phases of regression alone; leave it out, or set adversarial_weight to 0")
        _check_weights("renoise_weights", self.renoise_weights, "renoise", self.renoise)
        return self


class StageConfig(Config):
    """One step-halving stage."""

    name: str
    steps: int = Field(ge=1, description="the student's step count; its stride is 1000 / steps")
    loss: Literal["mse", "adversarial"]
    images: int = Field(0, ge=0, description="length of an MSE stage")
    convert_images: int = Field(0, ge=0, description="length of the conversion to x0-prediction before the phases")
    timesteps: tuple[int, ...] | None = Field(None, description="0-based; None is the trailing grid of `steps`")
    timestep_weights: tuple[float, ...] = Field((), description="how often each of them is drawn; empty: all alike")
    phases: tuple[AdversarialPhase, ...] = ()

    @property
    def grid(self) -> tuple[int, ...]:
        """The timesteps that its student trains on."""
        return self.timesteps or tuple(schedule.trailing_timesteps(self.steps))

    @property
    def ends_in_lora(self) -> bool:
        """Whether it leaves a LoRA, which merged is what can teach."""
        return self.loss == "mse" or any(phase.trains == "lora" for phase in self.phases)

    @field_validator("timesteps")
    @classmethod
    def _exist(cls, timesteps: tuple[int, ...] | None) -> tuple[int, ...] | None:
        _check_levels(timesteps or ())
        return timesteps

    @model_validator(mode="after")
    def _weighs_what_there_is(self) -> StageConfig:
        _check_weights("timestep_weights", self.timestep_weights, "timesteps", self.timesteps or ())
        return self

    @model_validator(mode="after")
    def _has_a_length(self) -> StageConfig:
        if self.loss == "mse" and not self.images:
            raise ValueError(f"stage {self.name} has loss mse and images 0; say its length in images")
        if self.loss == "adversarial" and not self.phases:
            raise ValueError(f"stage {self.name} has loss adversarial and no phases; give it one, or set loss to mse")
        return self

    @model_validator(mode="after")
    def _renoises_something(self) -> StageConfig:
        reached = schedule.next_timesteps(torch.tensor(self.grid), schedule.NUM_TRAIN_TIMESTEPS / self.steps)
        idle = [phase.name for phase in self.phases if phase.renoise and int(reached.min()) >= 0]
        if idle:
            raise ValueError(
                f"renoise of {', '.join(idle)} noises clean latents, which no move from {self.grid} in {self.steps} "
                "steps reaches; leave it out"
            )
        return self

    def taught_by(self, before: str) -> dict[str, str]:
        """The teacher of each of its units, by what to call the unit in a message; `before` is the stage before."""
        whole = {f"stage {self.name}": before} if self.loss == "mse" or self.convert_images else {}
        return whole | {f"phase {p.name} of stage {self.name}": p.teacher or before for p in self.phases}


def check_chain(stages: Sequence[StageConfig]) -> None:
    """That every stage and phase has a teacher whose walk is a whole number of moves per move of the student.

    Raises:
        ValueError: two stages of one name, a teacher that is no earlier stage or leaves no LoRA, or step counts that do
            not divide; names the stage or phase and the remedy.
    """
    if not stages:
        raise ValueError("stages is empty; give at least one")
    steps, before = {BASE: BASE_STEPS}, BASE
    loras = {BASE}
    for stage in stages:
        if stage.name in steps:
            raise ValueError(f"two stages are called {stage.name}; give each a name of its own, and none {BASE}")
        for unit, teacher in stage.taught_by(before).items():
            _check_teacher(unit, stage.steps, teacher, steps, loras)
        steps[stage.name], before = stage.steps, stage.name
        loras |= {stage.name} if stage.ends_in_lora else set()


def _check_teacher(unit: str, count: int, teacher: str, steps: dict[str, int], loras: set[str]) -> None:
    """`steps` of the earlier stages, and which of them leave a LoRA."""
    if teacher not in steps:
        near = difflib.get_close_matches(teacher, steps, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"teacher of {unit} is {teacher}; allowed: an earlier stage, of {', '.join(steps)}{meant}")
    if teacher not in loras:
        raise ValueError(
            f"teacher of {unit} is {teacher}, which trains no LoRA to teach with; name an earlier stage as its teacher "
            f"({', '.join(name for name in steps if name in loras)}), or give {teacher} a phase that trains lora"
        )
    if steps[teacher] <= count or steps[teacher] % count:
        raise ValueError(
            f"{unit} has {count} steps, and its teacher {teacher} {steps[teacher]}; the teacher's must be a multiple of"
            " them, and more"
        )
