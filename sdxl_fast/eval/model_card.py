# SPDX-License-Identifier: Apache-2.0
"""The model card of a pipeline this package trained, put together from what its runs and its evaluation left behind.

Nothing in it is typed by hand except the notes: numbers come from `report.json`, durations from the metrics, recipes
from the runs' resolved configurations, and the chain of hashes is checked against the files before it is printed.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from sdxl_fast.errors import DataError
from sdxl_fast.eval import tables
from sdxl_fast.eval.plots import plot_losses, read_metrics
from sdxl_fast.eval.report import hash_files, model_files
from sdxl_fast.files import file_sha256, replacing
from sdxl_fast.text import duration

ATTACHMENTS = "card"  # subfolder of the model for the pictures and logs of its card


def _read_json(path: Path) -> Any:
    if not path.is_file():
        raise DataError(f"{path} does not exist; the model card is made from it")
    return json.loads(path.read_text())


def read_chain(run: str | Path) -> list[dict[str, Any]]:
    """Lines of a run's `chain.jsonl`, every link and every file it names checked.

    Raises:
        DataError: a line that does not follow from the one before, or a file that is missing or another.
    """
    run = Path(run)
    path = run / "chain.jsonl"
    if not path.is_file():
        raise DataError(f"{path} does not exist; distillation writes it")
    before: str | None = None
    links = []
    for text in path.read_text().splitlines():
        link = json.loads(text)
        if link["previous"] != before:
            raise DataError(f"{path}: {link['unit']} does not follow from the line before it")
        for name, digest in link["sha256"].items():
            file = run / link["unit"] / name
            if not file.is_file() or file_sha256(file) != digest:
                raise DataError(f"{file} is missing or is not the file that {path} records")
        before = hashlib.sha256(text.encode()).hexdigest()
        links.append(link)
    return links


def training_time(metrics: str | Path) -> tuple[int, float]:
    """Images seen and seconds spent, from the rates in a run's metrics; previews and checkpoints are not counted."""
    series = read_metrics(metrics)
    if "images_per_second" not in series:
        raise DataError(f"{metrics} has no images_per_second, so it does not tell how long the run took")
    images, rates = series["images_per_second"]
    steps = [now - then for then, now in zip([0.0, *images], images, strict=False)]
    return int(images[-1]), sum(count / rate for count, rate in zip(steps, rates, strict=True))


def parameters(folder: str | Path) -> dict[str, int]:
    """Number of values in each subfolder's safetensors, from their headers."""
    counts: dict[str, int] = {}
    for path in sorted(Path(folder).rglob("*.safetensors")):
        with safe_open(path, framework="np") as file:
            sizes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a mapping)
        part = path.relative_to(folder).parent.as_posix()
        name = path.name if part == "." else part
        counts[name] = counts.get(name, 0) + sum(_product(shape) for shape in sizes)
    return counts


def _product(shape: Sequence[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def contents(model_dir: Path) -> list[str]:
    """The section that lists a model folder's parts by number of values."""
    size = sum(path.stat().st_size for path in model_files(model_dir))
    lines = ["## What is in the folder", "", "| part | values |", "| --- | ---: |"]
    lines += [f"| `{name}` | {count:,} |" for name, count in parameters(model_dir).items()]
    return [*lines, "", f"Together {size / 1e6:.1f} MB."]


def _data(data_dir: Path) -> list[str]:
    licences = _read_json(data_dir / "LICENCES.json")
    lines = ["## Data", "", "| style | package | licence | sha512 of the archive |", "| --- | --- | --- | --- |"]
    for style, facts in licences.items():
        package = f"{facts['package']} {facts['version']}"
        lines.append(f"| {style} | {package} | {facts['licence']} | `{facts['sha512'][:24]}…` |")
    digest = file_sha256(data_dir / "metadata.jsonl")
    return [*lines, "", f"`metadata.jsonl` of the built set has sha256 `{digest}`."]


def _run(title: str, run: Path, model_dir: Path) -> list[str]:
    """Recipe, length, duration, hash of the metrics and curves of a run, or of each unit of a distillation."""
    recipe = run / "recipe.yaml"
    if not recipe.is_file():
        raise DataError(f"{recipe} does not exist; a training run writes it")
    chained = (run / "chain.jsonl").is_file()
    folders = [run / link["unit"] for link in read_chain(run)] if chained else [run]
    lines = [f"### {title}", "", "| | images | time | sha256 of `metrics.jsonl` |", "| --- | ---: | ---: | --- |"]
    curves, total = [], 0.0
    for folder in folders:
        metrics = folder / "metrics.jsonl"
        images, seconds = training_time(metrics)
        total += seconds
        digest = file_sha256(metrics)
        lines.append(f"| {folder.name} | {images:,} | {duration(seconds)} | `{digest[:16]}…` |")
        stem = f"{ATTACHMENTS}/{run.name}-{folder.name}" if chained else f"{ATTACHMENTS}/{run.name}"
        plot_losses(metrics, model_dir / f"{stem}.png", title=folder.name)
        shutil.copyfile(metrics, model_dir / f"{stem}.jsonl")
        curves.append(f"![{folder.name}]({stem}.png)")
    lines += ["", f"{duration(total)} in all, without previews and checkpoints.", ""]
    lines += ["<details><summary>Recipe as resolved</summary>", "", "```yaml", recipe.read_text().rstrip(), "```"]
    return [*lines, "", "</details>", "", "<details><summary>Curves</summary>", "", *curves, "", "</details>"]


def _chain(run: Path, model_dir: Path) -> list[str]:
    copied = f"{ATTACHMENTS}/{run.name}-chain.jsonl"
    shutil.copyfile(run / "chain.jsonl", model_dir / copied)
    lines = ["## Hash chain of the distillation", ""]
    lines += [
        f"Each line of [chain.jsonl]({copied}) holds the sha256 of what a unit made and of the line before it.",
        "",
    ]
    lines += ["| unit | steps | student | discriminator | line before | machine |"]
    lines += ["| --- | ---: | --- | --- | --- | --- |"]
    for link in read_chain(run):
        digests = [link["sha256"].get(name) for name in ("student.safetensors", "discriminator.safetensors")]
        cells = [f"`{digest[:16]}…`" if digest else "–" for digest in [*digests, link["previous"]]]
        lines.append(f"| {link['unit']} | {link['steps']} | {' | '.join(cells)} | {link['machine']} |")
    return lines


def write_model_card(
    model_dir: str | Path,
    *,
    title: str,
    report_dir: str | Path,
    data_dir: str | Path,
    runs: Mapping[str, Path],
    notes: str = "",
) -> Path:
    """Writes `README.md` into a model folder, and the pictures, metrics and chain it shows into `card/` there.

    Args:
        model_dir: the pipeline, as exported.
        title: heading of the card.
        report_dir: what `report.run` wrote for this folder.
        data_dir: folder made by `sdxl-fast data emoji`.
        runs: heading to run folder, in the order of training; one with a `chain.jsonl` gets a line per unit.
        notes: Markdown put under the title: what the numbers do not say.

    Raises:
        DataError: a file is missing or damaged, the chain does not hold, or the report is of other files.
    """
    model_dir, report_dir, data_dir = Path(model_dir), Path(report_dir), Path(data_dir)
    report = _read_json(report_dir / "report.json")
    evaluated, present = report["inputs"]["model_files_sha256"], hash_files(model_dir)
    if evaluated != present:
        other = sorted(name for name in {*evaluated, *present} if evaluated.get(name) != present.get(name))
        raise DataError(f"{report_dir} is about another state of {model_dir}: {other[0]} differs; evaluate it again")
    (model_dir / ATTACHMENTS).mkdir(exist_ok=True)
    sheet = f"{ATTACHMENTS}/contact_sheet.png"
    shutil.copyfile(report_dir / "contact_sheet.png", model_dir / sheet)
    lines = [f"# {title}", ""] + ([notes.strip(), ""] if notes.strip() else [])
    lines += ["## Quality", "", tables.to_markdown(report).rstrip(), "", f"![The same prompts and seeds]({sheet})", ""]
    machine = ", ".join(f"{key} {value}" for key, value in report["environment"].items())
    features = report["inputs"]["features"]
    lines += [
        f"Measured with {machine}; {features['network']} weights sha256 `{features['weights_sha256'][:16]}…` at "
        f"{features['input_size']} px.",
        "",
    ]
    lines += [*contents(model_dir), "", *_data(data_dir), "", "## Training", ""]
    for heading, run in runs.items():
        lines += [*_run(heading, Path(run), model_dir), ""]
    for run in runs.values():
        if (Path(run) / "chain.jsonl").is_file():
            lines += [*_chain(Path(run), model_dir), ""]
    with replacing(model_dir / "README.md") as temporary:
        temporary.write_text("\n".join(lines).rstrip() + "\n")
    return model_dir / "README.md"
