"""The command `sdxl-fast`: what people and scripts run. Every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import re
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import __version__
from .cli_calibrate import calibrate
from .cli_data import prepare
from .cli_eval import evaluate
from .cli_export import export_app
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
from .errors import SdxlFastError
from .files import replacing
from .text import one_line

if TYPE_CHECKING:
    from .inference import OneStepPipeline

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")

app = typer.Typer(
    help="One-step SDXL: draw, train and measure.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Build data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")
data_app.command("prepare")(prepare)
app.command("calibrate")(calibrate)
app.command("eval")(evaluate)
app.add_typer(export_app, name="export")


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(metavar="PROMPT...", help="One picture or more each.")] = None,
    model: ModelOption = None,
    base: BaseOption = None,
    steps: Annotated[int | None, typer.Option(help="How many; what suits the model best by default.")] = None,
    seed: Annotated[int | None, typer.Option(help="Picture k of every prompt gets seed + k.")] = None,
    num_images: Annotated[int, typer.Option(help="Pictures per prompt.")] = 1,
    height: SideOption = None,
    width: SideOption = None,
    out: Annotated[Path, typer.Option(help="A picture file, or a folder to put them in.")] = Path(),
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    preset: PresetOption = None,
    lora: LoraOption = None,
    vae: VaeOption = None,
    image: Annotated[Path | None, typer.Option(help="A picture to start from.")] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --image is drawn anew, 0..1; 0.5 if left out.")
    ] = None,
    quantization: Annotated[str | None, typer.Option(help="fp8, with --scales that `calibrate` found.")] = None,
    scales: Annotated[Path | None, typer.Option(help="File of float8 scales.")] = None,
    bench: Annotated[int, typer.Option(help="Draw so often once more, and print the times.")] = 0,
) -> None:
    """Draw pictures from prompts and write them to files."""
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ValueError("no prompt given: say what to draw, as in: sdxl-fast generate 'red apple'")
    from .inference.request import check_output, check_seeds

    check_output("pil", (), num_images)
    if bench < 0:
        raise ValueError(f"--bench is {bench}; allowed: 0 or more")
    seeds = check_seeds(seed, len(prompts), num_images).tolist()
    texts = [prompt for prompt in prompts for _ in range(num_images)]
    files = picture_files(out, texts, seeds)
    start = _start(image, strength)
    parts = {"base": base, "vae": vae, "lora": dict(parse_loras(lora or []))}
    pipe = load_pipeline(model, device, dtype, preset=preset, quantization=quantization, scales=scales, **parts)
    call = {
        "num_inference_steps": steps,
        "height": height,
        "width": width,
        "num_images_per_prompt": num_images,
        **start,
    }
    images = pipe(prompts, seed=seeds, **call).images
    others = {"base": base, "vae": None if vae is None else str(vae)}
    settings = {"model": model_name(model)} | {key: model_name(name) for key, name in others.items() if name}
    how = {"steps": steps or pipe.preset.steps[0], "strength": start.get("strength"), "size": list(images[0].size)}
    about = described(pipe, settings | how)
    for file, text, one_seed, picture in zip(files, texts, seeds, images, strict=True):
        save_picture(picture, file, {"prompt": text, "seed": str(one_seed), **about})
        print(f"{file}  {text!r}, seed {one_seed}")
    print(format_timings(pipe.timings, len(images)))
    if bench:
        times = []
        for _ in range(bench):
            pipe(prompts, seed=seeds, **call)
            times.append(pipe.timings)
        print("\n".join(format_bench(times, len(images))))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where to write the grid of pictures.")] = Path("demo.png"),
    model: ModelOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Draw a labelled grid of prompts, in one step each where the model can."""
    from .demo import PROMPTS, grid
    from .eval.tables import student_row

    _check_suffix(out)
    pipe = load_pipeline(model, device, dtype)
    images = pipe(list(PROMPTS), seed=list(range(len(PROMPTS)))).images
    save_picture(grid(images, PROMPTS), out)
    steps = student_row(pipe.preset.steps[0])
    print(f"wrote {out.resolve()}: {len(images)} prompts, {steps} each, on {pipe.device}")
    for op, backends in pipe.explain().items():
        print(f"  {op:18} " + ", ".join(f"{backend} ({calls} calls)" for backend, calls in backends.items()))
    print(format_timings(pipe.timings, len(images)))


@app.command()
def env() -> None:
    """Print versions and which backend of which operation works here, for a bug report."""
    from . import env as environment

    print(environment.report())


@data_app.command("emoji")
def data_emoji(
    out: Annotated[Path, typer.Option(help="Folder to create.")],
    packages: Annotated[Path | None, typer.Option(help="Folder with the archives of `npm pack`; else fetched.")] = None,
) -> None:
    """Build the image-caption set of the embedded pipeline: Fluent 3D and Noto emoji."""
    from .data import emoji

    emoji.build(out, packages=packages)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A YAML recipe, or the name of one that comes with the package.")],
    settings: Annotated[list[str] | None, typer.Option("--set", help="a.b=value, replaces the recipe's.")] = None,
    resume: Annotated[str | None, typer.Option(help="'latest' goes on from the newest checkpoint.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would run and stop.")] = False,
    processes: Annotated[int | None, typer.Option(min=1, help="With --dry-run: for so many processes.")] = None,
) -> None:
    """Run a training recipe."""
    from . import train as training

    training.run(recipe, settings or [], resume=resume, dry_run=dry_run, processes=processes)


@app.command()
def card(
    model: Annotated[Path, typer.Argument(help="Pipeline folder that gets the card.")],
    report: Annotated[Path, typer.Option(help="Folder that `sdxl-fast eval` wrote for it.")],
    data: Annotated[Path, typer.Option(help="Folder made by `sdxl-fast data emoji`.")],
    runs: Annotated[list[str], typer.Option("--run", help="TITLE=FOLDER of a training run; repeat in order.")],
    title: Annotated[str, typer.Option(help="Heading.")],
    notes: Annotated[Path | None, typer.Option(help="Markdown file to put under the heading.")] = None,
) -> None:
    """Write a pipeline's model card from its report and the runs that made it."""
    from .eval.model_card import write_model_card

    pairs = [run.partition("=") for run in runs]
    if wrong := [heading for heading, _, folder in pairs if not folder]:
        raise ValueError(f"--run {wrong[0]}: names no folder; give TITLE=FOLDER")
    by_title = {heading: Path(folder) for heading, _, folder in pairs}
    text = notes.read_text() if notes else ""
    print(write_model_card(model, title=title, report_dir=report, data_dir=data, runs=by_title, notes=text))


def picture_files(out: Path, texts: list[str], seeds: list[int]) -> list[Path]:
    """One file per picture: `out` itself, `out` numbered, or prompt and seed as a name in the folder `out`.

    Raises:
        ValueError: `out` is a file of a kind that is not written, or lies below a file.
    """
    if out.suffix.lower() in PICTURE_SUFFIXES and not out.is_dir():
        _check_suffix(out)
        if len(texts) == 1:
            return [out]
        return [out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in range(len(texts))]
    if out.is_file():
        raise ValueError(
            f"--out {out}: exists and is no picture; give a folder or one of {', '.join(PICTURE_SUFFIXES)}"
        )
    _check_below_folder(out)
    names: dict[str, None] = {}
    for text, seed in zip(texts, seeds, strict=True):
        stem = re.sub(r"[^\w]+", "-", text.lower()).strip("-_")[:60] or "picture"
        name, again = f"{stem}_{seed}", 2
        while name in names:
            name, again = f"{stem}_{seed}_{again}", again + 1
        names[name] = None
    return [out / f"{name}.png" for name in names]


def save_picture(picture: Any, path: Path, about: dict[str, str] | None = None) -> None:
    """Write a PIL image, whole or not at all; a PNG keeps `about` as text."""
    options: dict[str, Any] = {}
    if about and path.suffix.lower() == ".png":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        for key, value in about.items():
            options["pnginfo"].add_itxt(key, value)
    with replacing(path) as temporary:
        picture.save(temporary, **options)


def described(pipe: OneStepPipeline, settings: dict[str, Any]) -> dict[str, str]:
    """Settings as a PNG's text: the model by itself, because it is asked for most, and all of them as JSON."""
    settings = settings | {
        "preset": pipe.preset.name,
        "quantization": None if pipe.report["unet"].scales is None else "fp8",
        "dtype": str(pipe.dtype).removeprefix("torch."),
        "loras": pipe.loras,
        "sdxl_fast": __version__,
    }
    given = {key: value for key, value in settings.items() if value not in (None, {})}
    return {"model": given["model"], "settings": json.dumps(given, sort_keys=True, ensure_ascii=False)}


def format_bench(times: list[dict[str, float]], count: int) -> list[str]:
    """A line per stage with the fastest and the median milliseconds of several calls for `count` pictures each."""
    lines = [f"{len(times)} calls, {count} pictures each, milliseconds: fastest, median"]
    for stage in times[0]:
        taken = [one[stage] * 1e3 for one in times]
        lines.append(f"  {stage.replace('_', ' '):14} {min(taken):9.1f} {statistics.median(taken):9.1f}")
    return lines


def format_timings(timings: dict[str, float], count: int) -> str:
    """One line: milliseconds by stage and in total, and per picture."""
    parts = [f"{name.replace('_', ' ')} {seconds * 1e3:.1f} ms" for name, seconds in timings.items()]
    return f"{', '.join(parts)}; {timings['total'] / count * 1e3:.1f} ms per picture"


def _start(image: Path | None, strength: float | None) -> dict[str, Any]:
    """The arguments for image-to-image: the picture, and how much of it is drawn anew."""
    if image is None:
        if strength is not None:
            raise ValueError("--strength says how much of --image is drawn anew: give one")
        return {}
    from PIL import Image

    return {"image": Image.open(image).convert("RGB"), "strength": 0.5 if strength is None else strength}


def _check_suffix(out: Path) -> None:
    if out.suffix.lower() not in PICTURE_SUFFIXES:
        raise ValueError(f"--out {out}: a picture file ends in one of {', '.join(PICTURE_SUFFIXES)}")
    if out.is_dir():
        raise ValueError(f"--out {out}: is a folder")
    _check_below_folder(out.parent)


def _check_below_folder(folder: Path) -> None:
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ValueError(f"--out: {existing} is a file, not a folder")


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; `arguments` are the process's own by default."""
    try:
        app(args=arguments, prog_name="sdxl-fast")
    except (SdxlFastError, ValueError, OSError) as error:
        print(f"sdxl-fast: error: {one_line(error, None)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
