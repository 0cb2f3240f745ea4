# SPDX-License-Identifier: Apache-2.0
"""The rule that turns numbers into a sentence: a claim reproduces when all its comparisons hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from benchmarks.claims.claims import Claim, Comparison

Row = Mapping[str, Any]
Results = Mapping[str, Mapping[int, Row]]
"""The rows of the report by side, "variant@steps", and seed."""

RULE = (
    "A difference counts when it exceeds twice its error: the standard error over seeds (of one seed unknown, and "
    "taken as none) and the error of measuring both sides, added in squares. Measuring is off by the jackknife's error "
    "of KID, the binomial one of top-5, and 2.5 % of sharpness, grain and flow. A claim *reproduces* when every "
    "difference it names counts and has its sign; one of being no worse, when none counts against it. Otherwise it "
    "*does not*."
)
TIMES_ERROR, SHARE = 2.0, 0.025


@dataclass(frozen=True)
class Metric:
    """How a number is called, shown and read."""

    title: str
    better: Literal["lower", "higher"]
    digits: int
    factor: float = 1.0

    def show(self, value: float | None) -> str:
        """As in a table."""
        return "–" if value is None else f"{self.factor * value:.{self.digits}f}"


METRICS = {
    "top5": Metric("top-5", "higher", 3),
    "kid_excess": Metric("KID excess ×10³", "lower", 1, 1000.0),
    "sharpness": Metric("sharpness", "higher", 2),
    "grain": Metric("grain", "lower", 2),
    "diversity": Metric("diversity", "higher", 2),
    "flow": Metric("flow", "lower", 3),
}


def error_of(metric: str, row: Row) -> float:
    """The standard error of measuring one row: how far another draw of prompts and seeds would be."""
    value = float(row[metric])
    if metric == "kid_excess":
        return float(row["kid_excess_error"])
    if metric == "top5":
        return math.sqrt(value * (1.0 - value) / row["images"])
    return SHARE * abs(value)


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to; `gain` is in favour of what is claimed, `error` its own."""

    comparison: Comparison
    first: float
    second: float
    gain: float
    error: float
    seeds: int

    @property
    def sign(self) -> int:
        """1 or -1 where the difference counts, else 0."""
        return 0 if abs(self.gain) <= TIMES_ERROR * self.error else int(math.copysign(1, self.gain))

    @property
    def holds(self) -> bool:
        """Whether it is as claimed."""
        return self.sign > 0 or (self.sign == 0 and not self.comparison.strict)

    def __str__(self) -> str:
        metric = METRICS[self.comparison.metric]
        verdict = {1: "better", 0: "no difference that counts", -1: "worse"}[self.sign]
        numbers = f"{metric.show(self.first)} against {metric.show(self.second)} ± {metric.show(self.error)}"
        return f"{metric.title} {numbers} ({self.comparison.first}, {self.comparison.second}): {verdict}"


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def compare(comparison: Comparison, results: Results) -> Outcome | None:
    """Weighs one comparison over the seeds that both sides have; None where they have none in common."""
    metric = comparison.metric
    sides = [
        {seed: row for seed, row in results.get(side, {}).items() if row.get(metric) is not None}
        for side in (comparison.first, comparison.second)
    ]
    common = sorted(sides[0].keys() & sides[1].keys())
    if not common:
        return None
    pairs = [(sides[0][seed], sides[1][seed]) for seed in common]
    direction = 1.0 if METRICS[metric].better == "higher" else -1.0
    gains = [direction * (float(a[metric]) - float(b[metric])) for a, b in pairs]
    measuring = mean([error_of(metric, a) ** 2 + error_of(metric, b) ** 2 for a, b in pairs])
    return Outcome(
        comparison,
        first=mean([float(a[metric]) for a, _ in pairs]),
        second=mean([float(b[metric]) for _, b in pairs]),
        gain=mean(gains),
        error=math.sqrt(standard_error(gains) ** 2 + measuring),
        seeds=len(common),
    )


@dataclass(frozen=True)
class Verdict:
    """`word` is "reproduces", "does not reproduce" or "not run"."""

    word: str
    sentence: str


def judge(claim: Claim, results: Results) -> Verdict:
    """One sentence on a claim, from the numbers alone."""
    outcomes = [compare(comparison, results) for comparison in claim.comparisons]
    found = [outcome for outcome in outcomes if outcome is not None]
    if len(found) < len(outcomes):
        sides = {side for c, o in zip(claim.comparisons, outcomes, strict=True) if o is None for side in _of(c)}
        missing = sorted(side for side in sides if not results.get(side)) or sorted(sides)
        return Verdict("not run", f"**Not run**: {claim.says} ({claim.source}). Missing: {', '.join(missing)}.")
    word = "reproduces" if all(outcome.holds for outcome in found) else "does not reproduce"
    seeds = min(outcome.seeds for outcome in found)
    count = f"{seeds} seed{'s' if seeds != 1 else ''}"
    if seeds < len(claim.seeds):
        count += f" of {len(claim.seeds)}"
    reasons = "; ".join(map(str, found))
    return Verdict(word, f"**{word[0].upper()}{word[1:]}** ({count}): {claim.says} ({claim.source}). {reasons}.")


def _of(comparison: Comparison) -> tuple[str, str]:
    return comparison.first, comparison.second
