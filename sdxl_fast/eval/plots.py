# SPDX-License-Identifier: Apache-2.0
"""Loss curves from a run's metrics: one panel per quantity, raw and smoothed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_fast.errors import DataError
from sdxl_fast.files import replacing

AXIS = "images"


def read_metrics(path: str | Path) -> dict[str, tuple[list[float], list[float]]]:
    """Each numeric quantity of a JSONL file: the image counts at which it was written, and its values.

    A last line cut off by a kill is left out; a bad line elsewhere is an error.

    Raises:
        DataError: no such file, a damaged line, or a line without `images`.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path} does not exist; a training run writes it")
    lines = path.read_text().splitlines()
    series: dict[str, tuple[list[float], list[float]]] = {}
    for number, text in enumerate(lines, start=1):
        try:
            entry = json.loads(text)
            images = float(entry[AXIS])
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise DataError(f"{path} line {number} is not a JSON object with {AXIS!r}: {text[:80]!r}") from error
        for name, value in entry.items():
            if name != AXIS and isinstance(value, int | float) and not isinstance(value, bool):
                x, y = series.setdefault(name, ([], []))
                x.append(images)
                y.append(float(value))
    return series


def smooth(values: list[float], *, span: float) -> list[float]:
    """Exponential average over about `span` values, corrected for its start; values that are not finite are skipped."""
    decay, total, weight, out = math.exp(-1.0 / max(span, 1e-9)), 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = decay * total + (1.0 - decay) * value, decay * weight + (1.0 - decay)
        out.append(total / weight if weight else math.nan)
    return out


def plot_losses(jsonl_path: str | Path, out_png: str | Path, *, title: str | None = None) -> Path:
    """Draws every quantity of a run's `metrics.jsonl` over images seen; writes the PNG whole or not at all.

    Losses and norms that stay positive and span more than a decade get a logarithmic axis.

    Args:
        jsonl_path: one JSON object per line with `images` and numbers.
        out_png: file to write.
        title: above the panels.

    Raises:
        DataError: no file, a damaged one, or one without numbers.
    """
    # Not pyplot: a figure of its own needs no display and leaves the caller's backend and open figures alone.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    series = read_metrics(jsonl_path)
    if not series:
        raise DataError(f"{jsonl_path} holds no numbers yet")
    columns = min(3, len(series))
    rows = -(-len(series) // columns)
    figure = Figure(figsize=(5.0 * columns, 3.0 * rows), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in panels[len(series) :]:
        panel.set_axis_off()
    for panel, (name, (x, y)) in zip(panels, series.items(), strict=False):
        panel.plot(x, y, color="tab:blue", alpha=0.3, linewidth=1.0)
        panel.plot(x, smooth(y, span=max(1.0, len(y) / 50)), color="tab:blue", linewidth=1.5)
        finite = np.asarray([value for value in y if math.isfinite(value)])
        if len(finite) and finite.min() > 0 and finite.max() > 10 * finite.min():
            panel.set_yscale("log")
        panel.set_title(name, fontsize=10)
        panel.grid(alpha=0.3)
    for panel in panels[max(0, len(series) - columns) : len(series)]:
        panel.set_xlabel("images")
    if title:
        figure.suptitle(title)
    out_png = Path(out_png)
    with replacing(out_png) as temporary:
        figure.savefig(temporary, format="png")
    return out_png
