"""`sdxl-fast eval --prompts`: any SDXL pipeline on a list of prompts, against real pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import NotFewStepError

if TYPE_CHECKING:
    import torch

    from .eval.features import Extractor
    from .eval.sources import Generate


@dataclass(frozen=True)
class PromptOptions:
    """What the command line says."""

    prompts: Path
    out: Path
    model: str | None
    steps: tuple[int, ...]
    reference: Path | None
    features: str
    clip: str | None
    num_images: int
    per_prompt: int
    seed: int
    guidance: float
    batch: int
    device: str | None


def feature_network(name: str, device: torch.device | str) -> Extractor:
    """`efficientnet-lite0`, `inception` (its weights downloaded), `inception:FILE`, or `clip:FOLDER-OR-ID`.

    Raises:
        ValueError: another name.
    """
    kind, _, source = name.partition(":")
    if kind == "efficientnet-lite0" and not source:
        from .eval.features import FeatureExtractor

        return FeatureExtractor(device=device)
    if kind == "inception":
        from .eval.inception import Inception

        return Inception(source or None, device=device)
    if kind == "clip" and source:
        from .eval.clip_score import Clip

        return Clip(source, device=device)
    raise ValueError(
        f"--features is {name!r}; allowed: efficientnet-lite0, inception, inception:FILE, clip:FOLDER-OR-ID"
    )


def _generators(options: PromptOptions) -> tuple[dict[int, Generate], str]:
    """How to draw in each number of steps, and where: students in theirs, an undistilled UNet with guidance in others.

    Raises:
        ValueError: a step count that a few-step model without its base was not distilled for, or no guidance.
    """
    import torch

    from .eval.sources import Teacher
    from .inference import OneStepPipeline
    from .models import loading

    folder = loading.resolve(options.model)
    pipe: Any = None
    try:
        pipe = OneStepPipeline.from_pretrained(options.model, device=options.device)
    except NotFewStepError:
        if not options.guidance or not folder.is_dir():  # a plain pipeline draws with guidance, in any number of steps
            raise
    undistilled = pipe is None or (folder / "unet_base").is_dir()
    device = (
        str(pipe.device) if pipe is not None else options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    )
    own = tuple(pipe.num_inference_steps) if pipe is not None else ()

    def student(count: int) -> Generate:
        def draw(prompts: Sequence[str], seeds: Sequence[int]) -> torch.Tensor:
            found = pipe(list(prompts), seed=list(seeds), num_inference_steps=count, output_type="pt").images
            return found  # type: ignore[no-any-return]

        return draw

    found: dict[int, Generate] = {}
    for count in options.steps or own or (32,):
        if count in own:
            found[count] = student(count)
        elif options.guidance and undistilled:
            found[count] = Teacher(folder, guidance_scale=options.guidance, num_steps=count, device=device)
        else:
            counts = ", ".join(map(str, own))
            lacks = "a --guidance above 0" if undistilled else "an undistilled UNet, which a folder has as unet_base"
            raise ValueError(f"--steps {count}: {folder.name} draws in {counts}; other step counts need {lacks}")
    return found, device


def run(options: PromptOptions) -> dict[str, Any]:
    """Draws what is missing of every set, measures all, and writes the report."""
    from .eval.clip_score import Clip
    from .eval.prompt_report import write_report
    from .eval.prompt_set import draw_set, pictures_of, read_prompts

    if options.per_prompt < 1:
        raise ValueError(f"--per-prompt is {options.per_prompt}; allowed: 1 or more")
    several = -(-options.num_images // options.per_prompt)
    prompts = [text for text in read_prompts(options.prompts, several) for _ in range(options.per_prompt)]
    prompts = prompts[: options.num_images]
    reference = [] if options.reference is None else pictures_of(options.reference)
    generators, device = _generators(options)
    sets = {}
    for count, generate in sorted(generators.items(), reverse=True):
        name = f"{count} step" if count == 1 else f"{count} steps"
        label = getattr(generate, "label", "student")
        settings = {"model": str(options.model or "embedded"), "steps": count, "source": label}
        folder = options.out / f"pictures-{count}"
        sets[name] = draw_set(folder, prompts, generate, seed=options.seed, batch=options.batch, settings=settings)
    clip = None if options.clip is None else Clip(options.clip, device=device)
    extract = feature_network(options.features, device)
    return write_report(options.out, sets, prompts, extract=extract, reference=reference, clip=clip, seed=options.seed)
