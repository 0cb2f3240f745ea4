"""`sdxl-fast eval --prompts`: any SDXL pipeline on a list of prompts, against real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .eval.features import Extractor


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


def run(options: PromptOptions) -> dict[str, Any]:
    """Draws what is missing of every set, measures all, and writes the report."""
    from .cli_eval_rows import find_rows
    from .eval.clip_score import Clip
    from .eval.prompt_report import write_report
    from .eval.prompt_set import draw_set, pictures_of, read_prompts

    if options.per_prompt < 1:
        raise ValueError(f"--per-prompt is {options.per_prompt}; allowed: 1 or more")
    several = -(-options.num_images // options.per_prompt)
    prompts = [text for text in read_prompts(options.prompts, several) for _ in range(options.per_prompt)]
    prompts = prompts[: options.num_images]
    reference = [] if options.reference is None else pictures_of(options.reference)
    rows, device = find_rows(options)
    sets = {}
    for row in rows:
        settings = {"model": str(options.model or "embedded"), **row.settings}
        folder = options.out / f"pictures-{row.settings['steps']}"
        sets[row.name] = draw_set(
            folder, prompts, row.generate, seed=options.seed, batch=options.batch, settings=settings
        )
    clip = None if options.clip is None else Clip(options.clip, device=device)
    extract = feature_network(options.features, device)
    return write_report(options.out, sets, prompts, extract=extract, reference=reference, clip=clip, seed=options.seed)
