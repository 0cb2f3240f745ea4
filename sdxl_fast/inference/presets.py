"""What each published few-step SDXL checkpoint needs, and how to recognise it.

The values are those of the model cards of SDXL-Lightning, SDXL-Turbo, DMD2, Hyper-SD, LCM and TCD. All of them are
distilled without guidance at inference, so a guidance scale above 1 is refused.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

from ..diffusion import schedule
from ..diffusion.prediction import PredictionType
from ..errors import ModelError, NotFewStepError
from ..models.lora import NUM_STEPS_KEY

Sampler = Literal["euler", "ddim", "euler_ancestral", "lcm", "tcd"]

SCHEDULERS: dict[str, Sampler] = {
    "EulerDiscreteScheduler": "euler",
    "DDIMScheduler": "ddim",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
}


@dataclass(frozen=True, slots=True)
class Preset:
    """How to sample a checkpoint.

    Attributes:
        name: for messages.
        sampler: "euler" and "ddim" are the same deterministic move and differ in the scale of the initial noise,
            "euler_ancestral", "lcm" and "tcd" draw fresh noise at every step but the last.
        prediction_type: what the UNet's output means.
        steps: allowed step counts, the recommended one first.
        timesteps: 0-based grids by step count where they are not trailing (or LCM's own, which TCD shares).
        resolution: native side in pixels where the folder's config says another; informative.
        eta: how much of TCD's noise is drawn anew, from 0, none, to 1.
    """

    name: str
    sampler: Sampler
    prediction_type: PredictionType
    steps: tuple[int, ...]
    timesteps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    resolution: int | None = None
    eta: float = 0.3

    @property
    def scheduler(self) -> str:
        """diffusers' scheduler class for this sampler."""
        return next(name for name, sampler in SCHEDULERS.items() if sampler == self.sampler)

    def grid(self, num_steps: int) -> tuple[int, ...]:
        """The descending 0-based timesteps for a step count."""
        if num_steps in self.timesteps:
            return self.timesteps[num_steps]
        if self.sampler in ("lcm", "tcd"):
            return lcm_timesteps(num_steps)
        return tuple(schedule.trailing_timesteps(num_steps))


def lcm_timesteps(num_steps: int, original_steps: int = 50) -> tuple[int, ...]:
    """LCM's grid: `num_steps` of the `original_steps` levels that it was distilled on, evenly spaced by index."""
    stride = schedule.NUM_TRAIN_TIMESTEPS // original_steps
    levels = [stride * k - 1 for k in range(original_steps, 0, -1)]
    return tuple(levels[k * original_steps // num_steps] for k in range(num_steps))


LIGHTNING = Preset("SDXL-Lightning", "euler", "epsilon", (4, 2, 8))
LIGHTNING_X0 = Preset("SDXL-Lightning 1-step x0", "euler", "sample", (1,))
TURBO = Preset("SDXL-Turbo", "euler_ancestral", "epsilon", (1, 2, 3, 4), resolution=512)
DMD2 = Preset("DMD2", "lcm", "epsilon", (4, 1), {1: (399,), 4: (999, 749, 499, 249)})
HYPER = Preset("Hyper-SD", "ddim", "epsilon", (2, 4, 8))
HYPER_1 = Preset("Hyper-SD 1-step", "lcm", "epsilon", (1,), {1: (800,)})
LCM = Preset("LCM", "lcm", "epsilon", (4, 1, 2, 3, 5, 6, 7, 8))
TCD = Preset("TCD", "tcd", "epsilon", (4, 1, 2, 3, 5, 6, 7, 8))

PRESETS: dict[str, Preset] = {
    "lightning-1step-x0": LIGHTNING_X0,
    **{f"lightning-{n}step": replace(LIGHTNING, name=f"SDXL-Lightning {n}-step", steps=(n,)) for n in (2, 4, 8)},
    "turbo": TURBO,
    "dmd2-1step": replace(DMD2, name="DMD2 1-step", steps=(1,)),
    "dmd2-4step": replace(DMD2, name="DMD2 4-step", steps=(4,)),
    "hyper-1step": HYPER_1,
    **{f"hyper-{n}step": replace(HYPER, name=f"Hyper-SD {n}-step", steps=(n,)) for n in (2, 4, 8)},
    "lcm": LCM,
    "tcd": TCD,
}
"""By the name to give as `preset=`."""

_FAMILIES = {
    "lightning": r"lightning",
    "turbo": r"(sd[-_]?xl|xl)[-_]?turbo|turbo[-_]?sd[-_]?xl",
    "dmd2": r"dmd2?(?![a-z])",
    "hyper": r"hyper[-_]?sd",
    "lcm": r"(?<![a-z])lcm(?![a-z])|latent[-_]consistency",
    "tcd": r"(?<![a-z])tcd(?![a-z])|trajectory[-_]consistency",
}


def recognise(
    name: str,
    scheduler: Mapping[str, Any] | None,
    metadata: Mapping[str, str],
    *,
    borrowed: bool = False,
    loras: Sequence[str] = (),
) -> Preset:
    """The preset of a checkpoint.

    Args:
        name: its hub id, folder or file name, and whatever title its metadata give.
        scheduler: its scheduler config with `_class_name`; None for a single file, which carries none.
        metadata: of the UNet's weight file.
        borrowed: the scheduler config is the base's, which says nothing about a UNet that is known by name.
        loras: file names of LoRAs on top; one of a known family decides where the checkpoint's own name says nothing.

    Raises:
        NotFewStepError: nothing says how to sample it in a few steps.
        ModelError: its name and its scheduler config contradict each other; the message gives what is needed.
    """
    preset = _by_name(name, metadata, scheduler or {})
    of_loras = (_by_name(lora, {}, {}) for lora in loras)
    if preset is None and (found := next(filter(None, of_loras), None)) is not None:
        return found
    if preset is None:
        if scheduler is None:
            raise NotFewStepError(f"{name}: cannot tell which few-step checkpoint this is; give preset={_names()}")
        return _by_scheduler(name, scheduler, metadata)
    if scheduler is not None and not borrowed:
        _check_agreement(name, preset, scheduler)
    return preset


def by_key(key: str) -> Preset:
    """The preset called `key`; raises ValueError naming all of them."""
    if key not in PRESETS:
        raise ValueError(f"preset is {key!r}; allowed: {_names()}")
    return PRESETS[key]


def prediction_type(value: str) -> PredictionType:
    """`value` if it is one of diffusers' prediction types that can be sampled; raises ModelError otherwise."""
    for known in get_args(PredictionType):
        if value == known:
            return known
    raise ModelError(f"prediction_type is {value!r}; allowed: {', '.join(get_args(PredictionType))}")


def check_guidance(preset: Preset, guidance_scale: float) -> None:
    """Raises ValueError for a guidance scale that a checkpoint distilled without guidance cannot use."""
    if guidance_scale > 1.0:
        raise ValueError(
            f"guidance_scale is {guidance_scale}; {preset.name} is distilled to need none: use guidance_scale=0"
        )


def _by_name(name: str, metadata: Mapping[str, str], scheduler: Mapping[str, Any]) -> Preset | None:
    text = name.lower()
    family = next((key for key, pattern in _FAMILIES.items() if re.search(pattern, text)), None)
    if family is None:
        return None
    if family in PRESETS:
        return PRESETS[family]
    found = re.search(r"(\d+)[-_ ]?steps?", text)
    steps = int(metadata[NUM_STEPS_KEY]) if NUM_STEPS_KEY in metadata else int(found.group(1)) if found else None
    one_step = steps == 1 or "_x0" in text or (steps is None and scheduler.get("prediction_type") == "sample")
    if family == "lightning" and one_step:
        return LIGHTNING_X0
    if steps is None:
        return {"lightning": LIGHTNING, "dmd2": DMD2, "hyper": HYPER}[family]
    key = f"{family}-{steps}step"
    if key not in PRESETS:
        known = ", ".join(key for key in PRESETS if key.startswith(family))
        raise ModelError(f"{name}: there is no {steps}-step checkpoint of this family; known: {known}")
    return PRESETS[key]


def _by_scheduler(name: str, scheduler: Mapping[str, Any], metadata: Mapping[str, str]) -> Preset:
    """A preset for a checkpoint of no known family, from what its scheduler config and its weights' metadata say."""
    kind = str(scheduler.get("_class_name"))
    sampler = SCHEDULERS.get(kind)
    prediction = prediction_type(scheduler.get("prediction_type", "epsilon"))
    if sampler is None:
        raise NotFewStepError(f"{name}: its scheduler is {kind}; few-step sampling knows {', '.join(SCHEDULERS)}")
    spacing = scheduler.get("timestep_spacing", "linspace" if sampler.startswith("euler") else "leading")
    if sampler not in ("lcm", "tcd") and spacing != "trailing":
        raise NotFewStepError(
            f"{name}: its {kind} has timestep_spacing={spacing!r}; a few-step checkpoint needs 'trailing' in "
            f"scheduler/scheduler_config.json (this may be a plain SDXL model), or give preset={_names()}"
        )
    if prediction == "sample":
        return Preset(f"a one-step x0 student ({name})", sampler, "sample", (1,))
    steps = (int(metadata[NUM_STEPS_KEY]),) if NUM_STEPS_KEY in metadata else (4, 1, 2, 8)
    return Preset(f"a few-step student ({name})", sampler, prediction, steps)


def _check_agreement(name: str, preset: Preset, scheduler: Mapping[str, Any]) -> None:
    kind = scheduler.get("_class_name")
    wanted: dict[str, str] = {"prediction_type": preset.prediction_type}
    if preset.sampler not in ("lcm", "tcd"):
        wanted["timestep_spacing"] = "trailing"
    wrong = [f"{key}={scheduler.get(key)!r}" for key, value in wanted.items() if scheduler.get(key) != value]
    if kind != preset.scheduler or wrong:
        settings = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
        has = f"{kind}({', '.join(wrong)})"
        raise ModelError(
            f"{name}: its scheduler config is {has}; {preset.name} needs {preset.scheduler}({settings}): correct "
            "scheduler/scheduler_config.json, or give preset= to overrule it"
        )


def _names() -> str:
    return " | ".join(PRESETS)
