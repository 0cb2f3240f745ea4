"""What a run's metrics and contact sheets say of the failures that the papers name, as warnings.

SDXL-Lightning §3.1 and §3.7: blur of a regression student, noise of an ε-predicting one-step student, divergence;
collapse of samples; a discriminator that has won or lost. Conjoined shapes (§3.4) cannot be measured: see the sheets.
"""

from __future__ import annotations

import json
import math
from collections import deque
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from ..eval.sharpness import laplacian_variance

LAYOUT = 16  # pictures are averaged down to this side for the distance between them, as in eval.diversity
WINDOW, ARMED = 20, 5  # metric lines that a running median looks back on; from how many on it is worth comparing to
# D's accuracy, averaged over one metric line. The embedded model's healthy phases stay within 0.5 and 0.9.
WON, LOST = 0.98, 0.4
JUMP = 10.0  # gradient norms and losses above this multiple of their running median
# What must not grow so, and the least that a median counts as: a generator's hinge loss passes through 0.
GROWING = {"grad_norm": 0.0, "d_grad_norm": 0.0, "loss": 0.0, "distillation": 0.0, "regression": 0.0, "r1": 0.0}
GROWING |= {"g_loss": 1.0, "d_loss": 1.0}
COLLAPSED, NOISY, BLURRED = 0.5, 3.0, 0.33  # of diversity and sharpness, relative to the reference sheet


@torch.no_grad()
def facts_of_sheet(pictures: Tensor) -> dict[str, float]:
    """Sharpness and diversity of a contact sheet's pictures.

    Args:
        pictures: [N, 3, H, W] in -1..1, of several prompts and seeds.

    Returns:
        `sheet_sharpness`, the mean variance of the Laplacian; `sheet_diversity`, the root mean square difference of
        the pictures at 16 x 16 over all pairs.
    """
    seen = (pictures.float().clamp(-1, 1) + 1) / 2
    small = F.adaptive_avg_pool2d(seen, LAYOUT).flatten(1)
    distances = torch.pdist(small) / small.shape[1] ** 0.5
    return {
        "sheet_sharpness": laplacian_variance(seen).mean().item(),
        "sheet_diversity": distances.mean().item() if len(small) > 1 else 0.0,
    }


def _lines(sheets: Path) -> list[str]:
    return sheets.read_text().splitlines() if sheets.is_file() else []


def reference(sheets: Path) -> dict[str, float]:
    """What a unit's sheets are compared with: the last one of the unit before; else its own first.

    A conversion to x0 ends blurred, as it must (§3.7.3), and is nothing to compare with.

    Args:
        sheets: the unit's `sheets.jsonl`, which need not be there yet; units lie in folders that begin with numbers.
    """
    number = sheets.parent.name.partition("-")[0]
    before = sheets.parent.parent.glob(f"{int(number) - 1:02d}-*/{sheets.name}") if number.isdecimal() else ()
    ends = [line for path in before if not path.parent.name.endswith("-convert") for line in _lines(path)[-1:]]
    lines = ends or _lines(sheets)[:1]
    return json.loads(lines[0]) if lines else {}


class Monitor:
    """Compares each metric line with those before it, and each sheet with the `reference` of this unit's `sheets`."""

    def __init__(self, sheets: Path | None = None) -> None:
        self._before: dict[str, deque[float]] = {}
        self._first = reference(sheets) if sheets is not None else {}

    def check(self, line: dict[str, float]) -> list[str]:
        """Warnings about a line of metrics or of measures of a contact sheet."""
        return self._discriminator(line) + self._jumps(line) + self._sheet(line)

    def _discriminator(self, line: dict[str, float]) -> list[str]:
        accuracy = line.get("d_accuracy")
        if accuracy is None:
            return []
        if accuracy >= WON:
            return [
                f"discriminator has won: accuracy {accuracy:.3f} leaves the student no gradient; lower its rate, or "
                "set an approximate_r1"
            ]
        if accuracy < LOST:
            return [f"discriminator has lost: accuracy {accuracy:.3f} is below chance; raise its rate or d_warmup"]
        return []

    def _jumps(self, line: dict[str, float]) -> list[str]:
        found = [f"divergence: {name} is {value}" for name, value in line.items() if not math.isfinite(value)]
        for name in GROWING.keys() & line.keys():
            value = abs(line[name])
            if not math.isfinite(value):
                continue
            before = self._before.setdefault(name, deque(maxlen=WINDOW))
            usual = max(median(before), GROWING[name]) if len(before) >= ARMED else math.inf
            if value > JUMP * usual > 0:
                found.append(f"divergence: {name} is {line[name]:.3g}, {JUMP:g} times its running median")
            before.append(value)
        return sorted(found)

    def _sheet(self, line: dict[str, float]) -> list[str]:
        if "sheet_sharpness" not in line:
            return []
        sharpness, diversity = (
            line[name] / first if (first := self._first.setdefault(name, line[name])) > 0 else 1.0
            for name in ("sheet_sharpness", "sheet_diversity")
        )
        found = []
        if diversity < COLLAPSED:
            found.append(f"collapse: samples differ {diversity:.2f} times as much as on the reference sheet")
        if sharpness > NOISY:
            found.append(f"noise: samples have {sharpness:.1f} times the edges of the reference sheet")
        if sharpness < BLURRED:
            found.append(f"blur: samples have {sharpness:.2f} times the edges of the reference sheet")
        return found
