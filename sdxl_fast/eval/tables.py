# SPDX-License-Identifier: Apache-2.0
"""A report's numbers as a Markdown table, and the embedded pipeline's targets."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

REAL, RECONSTRUCTIONS, TEACHER = "real pictures", "VAE reconstructions", "teacher"


def student_row(steps: int) -> str:
    """Name of the row of a student with that many steps."""
    return f"{steps} step" if steps == 1 else f"{steps} steps"


@dataclass(frozen=True, slots=True)
class Target:
    """One requirement: what was measured and the interval it must lie in."""

    row: str
    quantity: str
    value: float
    low: float | None
    high: float | None
    met: bool


def _target(row: str, quantity: str, value: float | None, low: float | None, high: float | None) -> list[Target]:
    if value is None:
        return []
    met = (low is None or value >= low) and (high is None or value <= high)
    return [Target(row, quantity, value, low, high, met)]


def targets(rows: Mapping[str, Mapping[str, Any]]) -> list[Target]:
    """What the embedded pipeline must reach, for the rows and quantities that were measured.

    The kernel distance's excess of one and four steps may be twice the teacher's; a teacher that cannot be told from
    the reconstructions is granted the standard error of its own excess.
    """
    found: list[Target] = []
    if RECONSTRUCTIONS in rows:
        found += _target(RECONSTRUCTIONS, "top5", rows[RECONSTRUCTIONS]["top5"], 0.95, None)
    teacher = rows.get(TEACHER)
    if teacher:
        found += _target(TEACHER, "top5", teacher["top5"], 0.80, None)
    for steps, share in ((4, 0.95), (1, 0.85)):
        name = student_row(steps)
        row = rows.get(name)
        if row is None:
            continue
        found += _target(name, "sharpness", row["sharpness"], 0.85, 1.15)
        if teacher is None:
            continue
        found += _target(name, "top5_of_teacher", row["top5_of_teacher"], share, None)
        if row["kid_excess"] is not None and teacher["kid_excess"] is not None:
            bound = 2.0 * max(teacher["kid_excess"], teacher["kid_excess_error"])
            found += _target(name, "kid_excess", row["kid_excess"], None, bound)
        found += _target(name, "diversity", row["diversity"], 0.7, None)
    return found


def targets_as_json(rows: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`targets` as plain data."""
    return [asdict(target) for target in targets(rows)]


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _with_error(value: float | None, error: float | None) -> str:
    return "–" if value is None or error is None else f"{1000 * value:.1f} ± {1000 * error:.1f}"


_HEADER = ("", "top-1", "top-5", "of teacher", "KID ×10³", "excess ×10³", "sharpness", "diversity")


def _line(cells: tuple[str, ...] | list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def to_markdown(report: Mapping[str, Any]) -> str:
    """The table of a report, a legend, and which targets are met."""
    lines = [_line(_HEADER), _line(["---"] + ["---:"] * (len(_HEADER) - 1))]
    for name, row in report["rows"].items():
        cells = [
            row.get("label") or name,
            _number(row["top1"]),
            _number(row["top5"]),
            _number(row["top5_of_teacher"], 2),
            _with_error(row["kid"], row["kid_error"]),
            _with_error(row["kid_excess"], row["kid_excess_error"]),
            _number(row["sharpness"], 2),
            _number(row["diversity"], 2),
        ]
        lines.append(_line(cells))
    settings = report["settings"]
    lines += [
        "",
        f"{settings['num_images']} pictures a row, the same prompts and seeds in each (seed {settings['seed']}). "
        f"top-k: the real picture of the prompt, upright on white, is among the k nearest of {settings['names']} by "
        "the cosine of EfficientNet-Lite0 features; of teacher: top-5 over the teacher's. KID: unbiased kernel "
        "distance to other real pictures on the same features ± standard error; excess: over "
        f"{report['baseline']}. Sharpness: variance of the Laplacian over that of {report['baseline']}. Diversity: "
        "distance in content and layout between pictures of one prompt, over the teacher's.",
    ]
    if report["targets"]:
        lines += ["", _line(("target", "measured", "allowed", "met")), _line(("---", "---:", "---:", "---"))]
    for target in report["targets"]:
        bounds = [f"≥ {target['low']:.3g}"] if target["low"] is not None else []
        bounds += [f"≤ {target['high']:.3g}"] if target["high"] is not None else []
        quantity = target["quantity"].replace("_", " ")
        met = "yes" if target["met"] else "**no**"
        lines.append(_line((f"{target['row']}: {quantity}", f"{target['value']:.3g}", ", ".join(bounds), met)))
    return "\n".join(lines) + "\n"
