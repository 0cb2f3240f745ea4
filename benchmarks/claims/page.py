# SPDX-License-Identifier: Apache-2.0
"""The page of results: per claim a sentence, a table and a contact sheet, all from the result files.

Beside the numbers of a variant and seed lies a strip of its first pictures, so that sheets can be put together on
another machine than the one that drew them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from benchmarks.claims.claims import Claim
from benchmarks.claims.rules import METRICS, RULE, Results, Verdict, judge, mean, spread, standard_error
from benchmarks.claims.variants import VARIANTS
from sdxl_fast.eval.sheets import contact_sheet, to_pil
from sdxl_fast.files import replacing

SHEET_ROWS = 8


def read_results(folder: Path) -> list[dict[str, Any]]:
    """Every result file, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def by_side(files: Iterable[Mapping[str, Any]]) -> dict[str, dict[int, dict[str, Any]]]:
    """The rows by "variant@steps" and seed, each with what its file says of the training."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for file in files:
        training = {"trained_images": file["images"], "trained_seconds": file["seconds"]}
        training |= {"images_before": file["images_before"], "d_accuracy": file["d_accuracy"]}
        for steps, row in file["rows"].items():
            found.setdefault(f"{file['variant']}@{steps}", {})[file["seed"]] = {**row, **training}
    return found


def _cell(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    metric, values = METRICS[name], [float(row[name]) for row in rows if row.get(name) is not None]
    if not values:
        return "–"
    shown = metric.show(mean(values))
    return shown if len(values) < 2 else f"{shown} ± {metric.show(standard_error(values))}"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def table(claim: Claim, results: Results) -> list[str]:
    """The claim's sides, one a line: means over seeds and, of several, their standard errors; the fastest's minutes."""
    header = ["", "what", "seeds", *(metric.title for metric in METRICS.values()), "D", "images", "minutes", "before"]
    lines = [_line(header), _line(["---", "---", *["---:"] * (len(header) - 2)])]
    for side in claim.sides:
        rows = list(results.get(side, {}).values())
        about = VARIANTS[side.partition("@")[0]].about
        if not rows:
            lines.append(_line([side, about, "0", *["–"] * (len(header) - 3)]))
            continue
        minutes = min(row["trained_seconds"] for row in rows) / 60.0
        accuracies = zip(*(row["d_accuracy"] for row in rows), strict=True)
        accuracy = " → ".join(f"{mean(values):.2f}" for values in accuracies)
        costs = [accuracy or "–", f"{rows[0]['trained_images']:,}", f"{minutes:.1f}", f"{rows[0]['images_before']:,}"]
        lines.append(_line([side, about, str(len(rows)), *(_cell(name, rows) for name in METRICS), *costs]))
    return lines


def summary(claims: Sequence[Claim], verdicts: Mapping[str, Verdict]) -> list[str]:
    """Every claim on a line, with what each of its comparisons came to."""
    lines = [_line(["claim", "verdict", "compared"]), _line(["---"] * 3)]
    for claim in claims:
        verdict = verdicts[claim.name]
        found = ", ".join(word.removesuffix(" that counts") for word in verdict.found)
        lines.append(_line([f"[{claim.says}](#{claim.name})", verdict.word, found or "–"]))
    return lines


def _spreads(results: Results) -> str:
    several = sum(len(rows) > 1 for rows in results.values())
    if not several:
        return "So far nothing was trained with several seeds, and that spread is taken as none."
    shares = ", ".join(f"{metric.title} {100 * spread(name, results):.1f} %" for name, metric in METRICS.items())
    return f"The spread over seeds, over {several} trained with several: {shares}."


def _machine(files: Sequence[Mapping[str, Any]]) -> str:
    found = [file["environment"] for file in files]
    kinds = sorted({f"{e['platform']}, {e['threads']} threads, torch {e['torch']}" for e in found})
    return "; ".join(kinds) or "nothing was run yet"


def write(claims: Sequence[Claim], out: Path) -> str:
    """Writes `claims.md`, and the sheets of claims that were run, from the result files; others are said to be not run.

    Returns:
        the page.
    """
    files = read_results(out / "results")
    results = by_side(files)
    verdicts = {claim.name: judge(claim, results) for claim in claims}
    for claim in claims:
        if verdicts[claim.name].word != "not run":
            _write_sheet(claim, files, out)
    words = [verdict.word for verdict in verdicts.values()]
    told = {"reproduces": "reproduce", "does not reproduce": "do not"}
    order = (*told, "not decided", "not run")
    counts = ", ".join(f"{words.count(word)} {told.get(word, word)}" for word in order if word in words)
    scales = sorted({file["scale"] for file in files} - {1.0})
    lines = [
        "# The papers' claims on the embedded model",
        "",
        f"Of {len(claims)} claims: {counts}.",
        "",
        *summary(claims, verdicts),
        "",
        f"Made by `python -m benchmarks.claims`. {RULE} {_spreads(results)}",
        "",
        "Top-5, KID excess, sharpness and diversity as `sdxl-fast eval` has them; grain: deviation of the Laplacian in "
        "the quietest quarter of a picture, in levels of 255; flow: root mean square distance to where the checkpoint "
        "that taught ends from the same noise; D: accuracy of the last discriminator, before and after the student's "
        "training (0.50 is chance: it sees no difference and says nothing); images and minutes: of training, without "
        "what came before, the fastest seed's, on a machine that had other work at times; before: the images of what "
        "came before, since the base model.",
        "",
        f"Machine: {_machine(files)}.",
    ]
    if scales:
        lines += ["", f"Some lengths were scaled, by {', '.join(f'{scale:g}' for scale in scales)}."]
    for claim in claims:
        note = ["", claim.note] if claim.note else []
        lines += ["", f"## {claim.name}", "", verdicts[claim.name].sentence, *note, "", *table(claim, results)]
        if (out / "sheets" / f"{claim.name}.png").is_file():
            lines += ["", f"![{claim.name}](sheets/{claim.name}.png)"]
    text = "\n".join(lines) + "\n"
    with replacing(out / "claims.md") as writing:
        writing.write_text(text)
    return text


def strip_file(folder: Path, variant: str, seed: int, steps: int | str) -> Path:
    """Where the first pictures of a row lie, among the result files."""
    return folder / f"{variant}-{seed}-{steps}.png"


def write_strip(path: Path, pictures: Tensor) -> None:
    """Writes pictures, float [N, 3, H, W] in 0..1, side by side."""
    parts = to_pil(pictures)
    width, height = parts[0].size
    whole = Image.new("RGB", (width * len(parts), height))
    for index, part in enumerate(parts):
        whole.paste(part, (index * width, 0))
    with replacing(path) as writing:
        whole.save(writing, "PNG")


def _read_strip(path: Path, count: int) -> list[Image.Image]:
    with Image.open(path) as whole:
        width = whole.width // count
        return [whole.crop((index * width, 0, (index + 1) * width, whole.height)) for index in range(count)]


def _write_sheet(claim: Claim, files: Sequence[Mapping[str, Any]], out: Path) -> None:
    """The sheet of a claim: the same prompts and seeds down, its sides across, each as its first seed has it."""
    columns: dict[str, list[Image.Image]] = {}
    prompts: list[str] = []
    for side in claim.sides:
        variant, _, steps = side.partition("@")
        for file in sorted((f for f in files if f["variant"] == variant), key=lambda f: int(f["seed"])):
            path = strip_file(out / "results", variant, file["seed"], steps)
            prompts = prompts or file["shown"]
            if path.is_file() and file["shown"] == prompts:
                columns[side] = _read_strip(path, len(prompts))
                break
    if columns:
        contact_sheet(columns, prompts, out / "sheets" / f"{claim.name}.png")
