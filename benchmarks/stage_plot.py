# SPDX-License-Identifier: Apache-2.0
"""Whole calls as bars, one for each contestant, stacked by stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdxl_fast.files import replacing

Row = Mapping[str, Any]

COLOURS = {
    "text_encoders": "#8e6bbf",
    "unet": "#1b6ca8",
    "vae": "#2a9d57",
    "image": "#17868a",
    "post_processing": "#b8860b",
    "imports": "#c8553d",
    "loading": "#d9a5b3",
    "first picture": "#5aa9a8",
    "rest": "#b0b0b0",
}
"""By stage, in the order of the stack; the rest is what the total has beyond the stages."""


def parts(found: Row) -> dict[str, float]:
    """Returns the milliseconds of a contestant's stages by name, in the order of the stack."""
    medians = {stage: 1e3 * time["median"] for stage, time in found["stages"].items() if "median" in time}
    listed = {stage: medians[stage] for stage in COLOURS if stage in medians}
    return {**listed, "rest": max(medians.get("total", 0.0) - sum(listed.values()), 0.0)}


def rows_with_stages(data: Row) -> list[Row]:
    """Returns the rows of whole models in which something has a total and stages."""
    return [
        row
        for row in data["end_to_end"]
        if any("total" in found["stages"] and len(found["stages"]) > 1 for found in row["contestants"].values())
    ]


def plot(data: Row, path: Path) -> bool:
    """Draws the bars of every row of whole models; False when there are none."""
    rows = rows_with_stages(data)
    if not rows:
        return False
    from matplotlib.figure import Figure

    counts = [len(_timed(row)) for row in rows]
    figure = Figure(figsize=(9, 0.9 * len(rows) + 0.34 * sum(counts) + 0.6), layout="constrained")
    every = figure.subplots(len(rows), squeeze=False, gridspec_kw={"height_ratios": [count + 1 for count in counts]})
    for axes, row in zip(every[:, 0], rows, strict=True):
        _draw(axes, row)
    handles, labels = _legend(list(every[:, 0]))
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    device, date = data["machine"]["device"], data["machine"]["date"][:10]
    figure.suptitle(f"{device}, {date}: milliseconds by stage, medians", fontsize=10)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    return True


def _timed(row: Row) -> list[str]:
    return [name for name, found in row["contestants"].items() if "total" in found["stages"]]


def _draw(axes: Any, row: Row) -> None:
    names = _timed(row)
    stacks = [parts(row["contestants"][name]) for name in names]
    left = [0.0] * len(names)
    for stage, colour in COLOURS.items():
        widths = [stack.get(stage, 0.0) for stack in stacks]
        if any(widths):
            axes.barh(range(len(names)), widths, 0.7, left=left, color=colour, label=stage.replace("_", " "))
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, (name, end) in enumerate(zip(names, left, strict=True)):
        total = 1e3 * row["contestants"][name]["stages"]["total"]["median"]  # medians need not add up
        axes.annotate(f" {total:.3g}" if total < 1000 else f" {total:.0f}", (end, position), va="center", fontsize=7)
    if row.get("floor"):
        axes.axvline(1e3 * row["floor"]["total"], color="#444444", linewidth=1, linestyle=":", label="floor")
    axes.set_yticks(range(len(names)), names, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 1.1 * max(left))
    axes.tick_params(axis="x", labelsize=7)
    axes.set_title(f"{row['model']}, {row['case']}, {row['dtype']}, {row['mode']}", fontsize=8, loc="left")


def _legend(listed: Sequence[Any]) -> tuple[list[Any], list[str]]:
    """Returns one handle for every label of several axes."""
    found: dict[str, Any] = {}
    for axes in listed:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    return list(found.values()), list(found)
