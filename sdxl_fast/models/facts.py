"""What a few-step weight file says of itself, in its metadata and its file name: name, step count, prediction type.

Users most often lose just these, and a picture drawn with the wrong ones is noise. Metadata follow Stability's
ModelSpec (https://github.com/Stability-AI/ModelSpec), file names SDXL-Lightning's releases.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..errors import ModelError

NUM_STEPS_KEY = "sdxl_fast.num_inference_steps"
PREDICTION_KEY = "modelspec.prediction_type"
SCHEDULER_KEY = "sdxl_fast.scheduler"
TITLE_KEY = "modelspec.title"

SDXL_ARCHITECTURE = "stable-diffusion-xl-v1-base"
SDXL_SIDE = 1024
TRAILING_EULER = "EulerDiscreteScheduler, timestep_spacing=trailing"

SCHEDULER_ARGUMENTS = (
    "timestep_spacing",
    "rescale_betas_zero_snr",
    "use_karras_sigmas",
    "use_exponential_sigmas",
    "use_beta_sigmas",
    "algorithm_type",
    "solver_type",
    "solver_order",
    "euler_at_final",
    "original_inference_steps",
)
"""What `Facts.scheduler` states of a diffusers scheduler, where it is set."""

Kind = Literal["", "unet", "lora"]
"""The parts of a pipeline that are published alone; "" is the whole of it in one file."""

_SPEC_WORDS = {"v_prediction": "v", "sample": "x0"}
_DIFFUSERS_WORDS = {word: name for name, word in _SPEC_WORDS.items()}
_FILE_NAME = re.compile(r"(?P<name>.+)_(?P<steps>\d+)step(?P<rest>(_x0|_unet|_lora)*)")
_PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclass(frozen=True, slots=True)
class Facts:
    """How a few-step checkpoint is called and sampled; None where nothing says.

    Attributes:
        name: of the model, without step count: "sdxl_lightning".
        num_steps: what it draws in.
        prediction_type: what its UNet's output means, in diffusers' words.
        scheduler: diffusers' class and the arguments that matter, as in `TRAILING_EULER`.
    """

    name: str
    num_steps: int | None = None
    prediction_type: str | None = None
    scheduler: str | None = None

    @classmethod
    def of(cls, path: str | Path, metadata: Mapping[str, str]) -> Facts:
        """What a file's metadata say; its name, where they say nothing."""
        named = parse_file_name(place_name(path).removesuffix(".safetensors"))
        steps = metadata.get(NUM_STEPS_KEY)
        if steps is not None and not steps.isdecimal():
            raise ModelError(f"{path}: its metadata say {NUM_STEPS_KEY}={steps!r}, which is no number of steps")
        return cls(
            name=named.name,
            num_steps=named.num_steps if steps is None else int(steps),
            prediction_type=stated_prediction_type(metadata) or named.prediction_type,
            scheduler=metadata.get(SCHEDULER_KEY),
        )

    def but(
        self, *, name: str | None = None, num_steps: int | None = None, prediction_type: str | None = None
    ) -> Facts:
        """A copy with what is given in place of what was known.

        Raises:
            ValueError: a step count below 1 or an unknown prediction type.
        """
        if num_steps is not None and num_steps < 1:
            raise ValueError(f"steps is {num_steps}; allowed: 1 or more")
        if prediction_type is not None and prediction_type not in _PREDICTION_TYPES:
            raise ValueError(f"prediction_type is {prediction_type!r}; allowed: {', '.join(_PREDICTION_TYPES)}")
        given = {"name": name, "num_steps": num_steps, "prediction_type": prediction_type}
        return replace(self, **{key: value for key, value in given.items() if value is not None})  # type: ignore[arg-type]

    @property
    def sampling(self) -> bool:
        """Whether anything is known about how to sample it."""
        return self.num_steps is not None or self.prediction_type is not None

    def file_name(self, kind: Kind) -> str:
        """`{name}_{N}step[_x0][_unet|_lora].safetensors`."""
        if self.num_steps is None:
            raise ValueError(
                "the step count is unknown, and the file's name is to have it: give --steps, or a file name"
            )
        x0 = "_x0" if self.prediction_type == "sample" else ""
        return f"{self.name}_{self.num_steps}step{x0}{'_' + kind if kind else ''}.safetensors"

    def metadata(
        self, kind: Kind, *, architecture: str, implementation: str, side: int | None = None
    ) -> dict[str, str]:
        """ModelSpec 1.0.1 and our own keys; `side` is the native picture side in pixels, by default SDXL's for SDXL."""
        facts = {
            "modelspec.sai_model_spec": "1.0.1",
            "modelspec.architecture": architecture + ("/lora" if kind == "lora" else ""),
            "modelspec.implementation": implementation,
            TITLE_KEY: self.name if self.num_steps is None else f"{self.name} {self.num_steps}-step",
        }
        if side is None and architecture == SDXL_ARCHITECTURE:
            side = SDXL_SIDE
        if side is not None:
            facts["modelspec.resolution"] = f"{side}x{side}"
        if self.prediction_type is not None:
            facts[PREDICTION_KEY] = _SPEC_WORDS.get(self.prediction_type, self.prediction_type)
        scheduler = self.scheduler or (None if self.num_steps is None else TRAILING_EULER)
        if scheduler is not None:
            facts[SCHEDULER_KEY] = scheduler
        if self.num_steps is not None:
            facts[NUM_STEPS_KEY] = str(self.num_steps)
            steps = "1 step" if self.num_steps == 1 else f"{self.num_steps} steps"
            facts["modelspec.usage_hint"] = f"{steps}, guidance scale 0, {scheduler}"
        return facts


def architecture_of(*, shrunken: bool) -> str:
    """ModelSpec's name of a model of SDXL's architecture, `shrunken` if not of its size."""
    return f"{SDXL_ARCHITECTURE}-shrunken" if shrunken else SDXL_ARCHITECTURE


def place_name(path: str | Path) -> str:
    """What a file or folder is called where it was asked for.

    A link has its own name, not its target's: in the hub's cache files are links to blobs that are named by their hash.
    A snapshot there, which is named by its revision, is called as its repository is.
    """
    place = Path(os.path.abspath(path))
    repository = place.parent.parent.name
    if place.parent.name == "snapshots" and repository.startswith("models--"):
        return repository.rpartition("--")[2]
    return place.name


def parse_file_name(stem: str) -> Facts:
    """What a file name after `Facts.file_name` says; SDXL-Lightning's own `_unet_x0` order is understood too."""
    found = _FILE_NAME.fullmatch(stem)
    if found is None:
        return Facts(name=stem)
    x0 = "_x0" in found["rest"]
    return Facts(name=found["name"], num_steps=int(found["steps"]), prediction_type="sample" if x0 else None)


def stated_prediction_type(metadata: Mapping[str, str]) -> str | None:
    """The prediction type in a weight file's metadata, in diffusers' words; None when there is none."""
    value = metadata.get(PREDICTION_KEY)
    return _DIFFUSERS_WORDS.get(value, value) if value else None


def scheduler_text(config: Mapping[str, Any]) -> str | None:
    """The line for `SCHEDULER_KEY` of a diffusers scheduler config; None when it names no class."""
    kind = config.get("_class_name")
    if kind is None:
        return None
    stated = [(name, config[name]) for name in SCHEDULER_ARGUMENTS if config.get(name)]
    return ", ".join([str(kind), *(f"{name}={_worded(value)}" for name, value in stated)])


def scheduler_config(text: str) -> dict[str, Any]:
    """The other way round: class and arguments out of a line made by `scheduler_text`."""
    kind, *arguments = (part.strip() for part in text.split(","))
    pairs = (argument.split("=", 1) for argument in arguments if "=" in argument)
    return {"_class_name": kind, **{name: _parsed(value) for name, value in pairs}}


def _worded(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _parsed(word: str) -> Any:
    try:
        return json.loads(word)
    except ValueError:
        return word
