"""`sdxl-fast eval`: a pipeline on the emoji set, or any SDXL pipeline on a list of prompts, against real pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .cli_options import (
    BaseOption,
    DeviceOption,
    DtypeOption,
    LoraOption,
    ModelOption,
    PresetOption,
    SideOption,
    VaeOption,
    load_pipeline,
    model_name,
    parse_loras,
)

if TYPE_CHECKING:
    import torch

    from .eval.features import PatchExtractor

FEATURES, RESIZE, BATCH = "efficientnet-lite0", "bicubic", 8


def evaluate(
    out: Annotated[Path, typer.Option(help="Folder for the report.")],
    data: Annotated[Path | None, typer.Option(help="Folder made by `sdxl-fast data emoji`.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="Instead: prompts, one per line, or JSON lines.")] = None,
    model: ModelOption = None,
    steps: Annotated[list[int] | None, typer.Option(help="May be repeated; all that the model can by default.")] = None,
    num_images: Annotated[int, typer.Option(help="Pictures per step count.")] = 2000,
    seed: Annotated[int, typer.Option(help="Of prompts, noise and real pictures.")] = 0,
    guidance: Annotated[
        float, typer.Option(help="Of an undistilled UNet, in 32 steps where --steps has none for it; 0: none.")
    ] = 5.0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    base: BaseOption = None,
    preset: PresetOption = None,
    lora: LoraOption = None,
    vae: VaeOption = None,
    height: SideOption = None,
    width: SideOption = None,
    reference: Annotated[Path | None, typer.Option(help="Folder of real pictures to compare with.")] = None,
    features: Annotated[
        str, typer.Option(help="Network of the distances; or inception[:FILE], or clip:FOLDER.")
    ] = FEATURES,
    clip: Annotated[str | None, typer.Option(help="Folder or id of the CLIP for CLIP scores.")] = None,
    resize: Annotated[str, typer.Option(help="Of inception: bicubic, as clean-fid, or tf1, as its own.")] = RESIZE,
    patch_from: Annotated[
        int | None, typer.Option(help="Enlarge smaller pictures to it before the patch: 1024.")
    ] = None,
    batch: Annotated[int, typer.Option(help="Pictures drawn at once.")] = BATCH,
    per_prompt: Annotated[int, typer.Option(help="Pictures of each prompt, for diversity.")] = 1,
) -> None:
    """Measure a pipeline: on the emoji set, or with --prompts on any prompts, where it goes on if stopped.

    The options from --dtype on are of --prompts. An undistilled UNet draws in float32 unless --dtype is given.
    """
    if (data is None) == (prompts is None):
        raise ValueError("give --data for the emoji set or --prompts for a list of prompts, one of them")
    of_prompts: dict[str, Any] = {
        "dtype": dtype,
        "base": base,
        "preset": preset,
        "loras": tuple(parse_loras(lora or [])),
        "vae": vae,
        "height": height,
        "width": width,
        "reference": reference,
        "clip": clip,
        "patch_from": patch_from,
    }
    if prompts is not None:
        named: dict[str, Any] = {"model": model, "features": features, "resize": resize, "guidance": guidance}
        numbers: dict[str, Any] = {"num_images": num_images, "per_prompt": per_prompt, "batch": batch, "seed": seed}
        run(PromptOptions(prompts, out, tuple(steps or ()), device, **named, **numbers, **of_prompts))
    elif data is not None:
        changed = {"features": features != FEATURES, "resize": resize != RESIZE}
        changed |= {"batch": batch != BATCH, "per_prompt": per_prompt != 1}
        if given := [name for name, value in (of_prompts | changed).items() if value]:
            option = given[0].replace("loras", "lora").replace("_", "-")
            raise ValueError(f"--{option} is of --prompts; leave it out with --data")
        _evaluate_emoji(out, data, model, steps, num_images, seed, guidance, device)
    print(f"wrote {out / 'report.md'}")


def _evaluate_emoji(
    out: Path,
    data: Path,
    model: str | None,
    steps: list[int] | None,
    num_images: int,
    seed: int,
    guidance: float,
    device: str | None,
) -> None:
    from .models import loading

    folder = loading.resolve(model)
    if not folder.is_dir():
        raise ValueError(f"{folder}: a single file; --data needs the folder of a pipeline, --prompts takes files, too")
    pipe = load_pipeline(model, device, "float32")
    own = pipe.num_inference_steps
    if wrong := [count for count in steps or () if count not in own]:
        raise ValueError(f"--steps {wrong[0]}: {model_name(model)} draws in {', '.join(map(str, own))}")
    base = pipe.base_prediction_type
    from .eval import report, sources

    def draw(prompts: Any, seeds: Any, num_steps: int) -> torch.Tensor:
        found = pipe(list(prompts), seed=list(seeds), num_inference_steps=num_steps, output_type="pt").images
        return found  # type: ignore[no-any-return]

    teacher = None
    if guidance and base is not None:
        teacher = sources.Teacher(folder, guidance_scale=guidance, prediction_type=base, device=pipe.device)
    chosen = steps or list(own)
    report.run(folder, data, out, generate=draw, num_images=num_images, seed=seed, steps=chosen, teacher=teacher)


@dataclass(frozen=True)
class PromptOptions:
    """What the command line says; `loras` are files and their weights."""

    prompts: Path
    out: Path
    steps: tuple[int, ...]
    device: str | None
    model: str | None
    base: str | None
    preset: str | None
    loras: tuple[tuple[str, float], ...]
    vae: Path | None
    height: int | None
    width: int | None
    dtype: str | None
    guidance: float
    seed: int
    num_images: int
    per_prompt: int
    batch: int
    reference: Path | None
    features: str
    resize: str
    patch_from: int | None
    clip: str | None


def feature_network(name: str, device: torch.device | str, *, resize: str = "bicubic") -> PatchExtractor:
    """`efficientnet-lite0`, `inception` (its weights downloaded), `inception:FILE`, or `clip:FOLDER-OR-ID`.

    Raises:
        ValueError: another name, or a `resize` that it does not have.
    """
    kind, _, source = name.partition(":")
    if resize != "bicubic" and kind != "inception":
        raise ValueError(f"--resize is {resize!r}, which is of inception; --features {name} has bicubic alone")
    if kind == "efficientnet-lite0" and not source:
        from .eval.features import FeatureExtractor

        return FeatureExtractor(device=device)
    if kind == "inception":
        from .eval.inception import Inception

        return Inception(source or None, resize=resize, device=device)
    if kind == "clip" and source:
        from .eval.clip_score import Clip

        return Clip(source, device=device)
    raise ValueError(
        f"--features is {name!r}; allowed: efficientnet-lite0, inception, inception:FILE, clip:FOLDER-OR-ID"
    )


def run(options: PromptOptions) -> dict[str, Any]:
    """Draws what is missing of every set, measures all, and writes the report.

    Raises:
        ValueError: options, files or packages that it could not do so with; nothing has been drawn then.
    """
    import torch

    from .cli_eval_rows import find_rows
    from .eval.clip_score import Clip
    from .eval.prompt_report import write_report
    from .eval.prompt_set import draw_set, pictures_of, read_prompts
    from .inference.request import check_device

    for name in ("num_images", "per_prompt", "batch"):
        if (value := getattr(options, name)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; allowed: 1 or more")
    if wrong := [count for count in options.steps if count < 1]:
        raise ValueError(f"--steps is {wrong[0]}; allowed: 1 or more")
    if options.guidance < 0:
        raise ValueError(f"--guidance is {options.guidance:g}; allowed: 0, which leaves it out, or more")
    several = -(-options.num_images // options.per_prompt)
    prompts = [text for text in read_prompts(options.prompts, several) for _ in range(options.per_prompt)]
    prompts = prompts[: options.num_images]
    reference = [] if options.reference is None else pictures_of(options.reference)
    device = check_device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    extract = feature_network(options.features, device, resize=options.resize)  # before hours of drawing
    clip = None if options.clip is None else Clip(options.clip, device=device)
    if options.patch_from is not None and options.patch_from < extract.patch_side:
        raise ValueError(f"--patch-from is {options.patch_from}; allowed: the patch's {extract.patch_side} px or more")
    rows = find_rows(options, device)
    sets = {}
    for row in rows:
        folder = options.out / f"pictures-{row.settings['steps']}"
        sets[row.name] = draw_set(
            folder, prompts, row.generate, seed=options.seed, batch=options.batch, settings=row.settings
        )
    return write_report(
        options.out,
        sets,
        prompts,
        extract=extract,
        about={row.name: row.settings for row in rows},
        source=options.prompts,
        reference=reference,
        clip=clip,
        patch_from=options.patch_from,
        seed=options.seed,
    )
