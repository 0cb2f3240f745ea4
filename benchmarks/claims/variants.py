# SPDX-License-Identifier: Apache-2.0
"""What is trained to try the claims: each variant a recipe with overrides, the checkpoint it goes on from, a length.

Lengths are in images and the same for variants that are compared; 20 minutes on two cores are about 30,000 images of a
LoRA or of a one-step student, and 16,000 of ADD, which also decodes and looks at pictures.

One step takes this small network some 800,000 images of regression before a discriminator has anything to judge (see
the recipe `emoji_lightning`). One-step variants therefore go on from a student that has them behind it, all from the
same; the two that compare what a student predicts begin at the 2-step LoRA instead, as far as 20 minutes lead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

Sampler = Literal["ddim", "ancestral", "consistency"]
LIGHTNING, TUNED = "lightning", "tuned"

FEW, ONE, CONVERT, ADD = 24_000, 32_000, 8_000, 16_000
LEVELS, WEIGHTS, RENOISE = [249, 499, 749, 999], [1, 1, 1, 5], [10, 250, 500, 750]  # as in the recipe


@dataclass(frozen=True)
class Variant:
    """One student and how it is drawn.

    Attributes:
        name: unique; of its files.
        about: what distinguishes it, for the table.
        recipe: "lightning" goes on in a copy of the run that all start from; else a recipe of the package. None: trains
            nothing.
        start: stage of that run whose student comes before and teaches; None: the base model.
        stage: the stage that "lightning" adds.
        regressed: the stage goes on where that run's own of this name ended its regression, ahead of any discriminator.
        settings: `a.b=value` overrides.
        steps: in how many steps it is drawn.
        sampler: how.
        base: variant whose pipeline stands in for the base model; its training comes first.
        style: of the real pictures that it is compared with.
    """

    name: str
    about: str
    recipe: str | None = LIGHTNING
    start: str | None = None
    stage: Mapping[str, Any] | None = None
    regressed: bool = False
    settings: tuple[str, ...] = ()
    steps: tuple[int, ...] = (4,)
    sampler: Sampler = "ddim"
    base: str | None = None
    style: str | None = None


def _phase(condition: bool, trains: str, images: int, lr: float, **more: Any) -> dict[str, Any]:
    name = f"{trains}-{'d' if condition else 'd-prime'}"
    return {"name": name, "condition": condition, "trains": trains, "images": images, "lr": lr, "d_warmup": 0} | more


def _d(images: int, **more: Any) -> dict[str, Any]:
    """LoRA under the conditional discriminator, as in the 4-step stage of the recipe."""
    return _phase(True, "lora", images, 3e-4, **{"d_warmup": 2_000, **more})


def _d_prime(images: int, **more: Any) -> dict[str, Any]:
    return _phase(False, "lora", images, 2e-4, **{"d_warmup": 2_000, **more})


def _full(condition: bool, images: int, **more: Any) -> dict[str, Any]:
    """The whole one-step student under a discriminator of several levels beside regression, as in the recipe."""
    judged = {"d_warmup": 4_000, "renoise": RENOISE, "teacher": "4-step", "regression_weight": 1.0, "d_lr": 3e-4}
    return _phase(condition, "full", images, 5e-5, **{**judged, **more})


def _regression(images: int) -> dict[str, Any]:
    """The whole one-step student on where the 4-step model walks to."""
    alone = {"adversarial_weight": 0.0, "regression_weight": 1.0, "teacher": "4-step"}
    return _phase(True, "full", images, 4e-4, **alone) | {"name": "mse"}


def _four(name: str, about: str, *phases: dict[str, Any], **stage: Any) -> Variant:
    whole = {"name": "4-step", "steps": 4, "loss": "adversarial", "phases": list(phases), **stage}
    return Variant(f"four-{name}", about, start="8-step", stage=whole)


def _one(name: str, about: str, *phases: dict[str, Any], settings: tuple[str, ...] = (), **stage: Any) -> Variant:
    """Goes on after regression; with `convert_images` it begins at the 2-step LoRA."""
    whole = {"name": "1-step", "steps": 1, "loss": "adversarial", "phases": list(phases), **stage}
    whole |= {"timesteps": LEVELS, "timestep_weights": WEIGHTS}
    more = {"settings": settings, "steps": (1,), "regressed": "convert_images" not in stage}
    return Variant(f"one-{name}", about, start="2-step", stage=whole, **more)


def _add(name: str, about: str, *settings: str, steps: tuple[int, ...] = (1,)) -> Variant:
    lengths = (f"images={ADD}", "d_warmup=1000")
    return Variant(f"add-{name}", about, "emoji_add", settings=(*lengths, *settings), steps=steps, sampler="ancestral")


_AS_THEY_ARE = (
    Variant("start-8-step", "the 8-step LoRA that 4-step students start from", None, "8-step", steps=(8,)),
    Variant("start-4-step", "the 4-step LoRA that teaches one-step students", None, "4-step", steps=(4,)),
    Variant("start-2-step", "the 2-step LoRA that one-step students start from", None, "2-step", steps=(2,)),
    Variant("start-1-step", "the regressed student that one-step students start from", None, "1-step", steps=(1,)),
)

_FOUR_STEPS = (
    _four("d", "LoRA, D", _d(FEW)),
    _four("d-prime", "LoRA, D'", _d_prime(FEW)),
    _four("d-then-d-prime", "LoRA, D then D'", _d(2 * FEW // 3), _d_prime(FEW // 3)),
    _four("mse", "LoRA, MSE to the teacher", loss="mse", images=FEW),
    _four(
        "full",
        "full UNet, D then D'",
        _phase(True, "full", 2 * FEW // 3, 1e-4, d_warmup=2_000),
        _phase(False, "full", FEW // 3, 5e-5, d_warmup=2_000),
    ),
    *(
        _four(f"balance-{weight:g}", f"LoRA, D + {weight:g} MSE", _d(FEW, regression_weight=weight))
        for weight in (0.1, 1.0, 10.0)
    ),
)

_ONE_STEP = (
    _one("d", "x0, D of several levels beside MSE", _full(True, ONE)),
    _one("d-alone", "x0, D of several levels without MSE", _full(True, ONE, regression_weight=0.0)),
    _one("d-then-d-prime", "x0, D then D', beside MSE", _full(True, 3 * ONE // 5), _full(False, 2 * ONE // 5)),
    _one("mse", "x0, MSE to the teacher", _regression(ONE)),
    _one("single", "x0, D of the clean level alone, beside MSE", _full(True, ONE, renoise=[])),
    _one(
        "impure",
        "x0, D; training inputs as the schedule has them",
        _full(True, ONE),
        settings=("pure_noise=false",),
    ),
    _one("conv", "x0, D a small new conv net", _full(True, ONE), settings=("discriminator.backbone=conv",)),
    _one(
        "pixels",
        "x0, D on image features of pictures, which have the clean level alone",
        _full(True, ONE, renoise=[]),
        settings=("discriminator.backbone=pixels",),
    ),
    _one(
        "x0-anew",
        "from the 2-step LoRA: x0, MSE, then D beside it",
        _regression(ONE // 2 - CONVERT),
        _full(True, ONE // 2),
        convert_images=CONVERT,
    ),
    _one(
        "epsilon-anew",
        "from the 2-step LoRA: epsilon, MSE, then D beside it",
        _regression(ONE // 2),
        _full(True, ONE // 2),
        convert_images=0,
    ),
)

_RANDOM = ("student=random",)
_OTHERS = (
    _add("nfsd", "both losses, NFSD; told text and image", steps=(1, 4)),
    _add("exponential", "both losses, exponential c(t)", "distillation=exponential"),
    _add("sds", "both losses, SDS", "distillation=sds"),
    _add("adversarial", "adversarial loss alone", "distillation_weight=0"),
    _add("distillation", "distillation alone, exponential", "adversarial_weight=0", "distillation=exponential"),
    _add("untold", "D told neither text nor image", "conditions=[]"),
    _add("text", "D told the text", "conditions=[text]"),
    _add("image", "D told the image", "conditions=[image]"),
    _add("random", "student starts at random", *_RANDOM),
    _add("random-half", "the same, half as wide", *_RANDOM, "student_width=0.5"),
    _add("random-double", "the same, twice as wide", *_RANDOM, "student_width=2.0"),
    _add("random-sd15", "the same, shaped as SD 1.5: no text_time", *_RANDOM, "student_text_time=false"),
    Variant(
        "lcm",
        "latent consistency, full UNet",
        "emoji_lcm",
        settings=(f"images={FEW}",),
        steps=(1, 4),
        sampler="consistency",
    ),
)

_STYLE = "noto"
_STYLES = (
    Variant(
        "tuned",
        "base tuned to the other style, no guidance",
        TUNED,
        settings=(
            *(f"data.style={_STYLE}", "draws=32", "images=48000"),
            *("optimizer.lr=2e-4", "optimizer.warmup=2000", "optimizer.decay=24000"),
        ),
        steps=(8,),
        style=_STYLE,
    ),
    Variant("tuned-lora", "that, with the 8-step LoRA", None, "8-step", steps=(8,), base="tuned", style=_STYLE),
    Variant("other-style", "the base itself, with the 8-step LoRA", None, "8-step", steps=(8,), style=_STYLE),
)

VARIANTS: dict[str, Variant] = {v.name: v for v in (*_AS_THEY_ARE, *_FOUR_STEPS, *_ONE_STEP, *_OTHERS, *_STYLES)}
