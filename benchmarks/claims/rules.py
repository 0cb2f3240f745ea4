# SPDX-License-Identifier: Apache-2.0
"""The rule that turns numbers into a sentence: a claim reproduces when all its comparisons hold."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from benchmarks.claims.claims import Claim, Comparison
from sdxl_fast.eval.kid import jackknife_error

Row = Mapping[str, Any]
Results = Mapping[str, Mapping[int, Row]]
"""The rows of the report by side, "variant@steps", and seed."""

TIMES_ERROR = 2.0
SHOWN = 0.05  # of top-5

RULE = (
    "A difference counts when it exceeds twice its error, of two parts added in squares: that of training, the spread "
    "over seeds as a share of the value, pooled over all that was trained with several (over the root of the seeds); "
    "and that of measuring, the jackknife of the difference over blocks of prompts, of which both sides have the same "
    "from the same noise. A claim *reproduces* when every difference it names counts and has its sign; one of being no "
    "worse, when none counts against it. Otherwise it *does not*. It is *not decided* where both sides of a comparison "
    f"are found by their prompts (top-5) in less than {100 * SHOWN:g} % of the cases: such pictures "
    "show nothing of what was asked."
)


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


@dataclass(frozen=True)
class Outcome:
    """What a comparison came to; `gain` is in favour of what is claimed, `error` its own; `blank`: neither side shows
    what was asked.
    """

    comparison: Comparison
    first: float
    second: float
    gain: float
    error: float
    seeds: int
    blank: bool

    @property
    def sign(self) -> int:
        """1 or -1 where the difference counts, else 0."""
        return 0 if abs(self.gain) <= TIMES_ERROR * self.error else int(math.copysign(1, self.gain))

    @property
    def holds(self) -> bool:
        """Whether it is as claimed."""
        return self.sign > 0 or (self.sign == 0 and not self.comparison.strict)

    @property
    def word(self) -> str:
        """How the first side is, beside the second."""
        if self.blank:
            return "neither shows what was asked"
        return {1: "better", 0: "no difference that counts", -1: "worse"}[self.sign]

    def __str__(self) -> str:
        metric = METRICS[self.comparison.metric]
        numbers = f"{metric.show(self.first)} against {metric.show(self.second)} ± {metric.show(self.error)}"
        return f"{metric.title} {numbers} ({self.comparison.first}, {self.comparison.second}): {self.word}"


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    middle = mean(values)
    return math.sqrt(sum((value - middle) ** 2 for value in values) / (len(values) - 1) / len(values))


def spread(metric: str, results: Results) -> float:
    """The deviation over seeds as a share of the value, pooled over the sides that have several; 0 if none has."""
    squares, freedom = 0.0, 0
    for rows in results.values():
        values = [float(row[metric]) for row in rows.values() if row.get(metric) is not None]
        middle = mean(values) if len(values) > 1 else 0.0
        if middle:
            squares += sum((value / middle - 1.0) ** 2 for value in values)
            freedom += len(values) - 1
    return math.sqrt(squares / freedom) if freedom else 0.0


def measuring_error(metric: str, pairs: Sequence[tuple[Row, Row]]) -> float:
    """Of the mean difference of pairs of rows that answer the same prompts, by the jackknife."""
    replicates = torch.tensor([[row["replicates"][metric] for row in pair] for pair in pairs], dtype=torch.float64)
    return jackknife_error((replicates[:, 0] - replicates[:, 1]).mean(0))


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
    first, second = (mean([float(pair[side][metric]) for pair in pairs]) for side in (0, 1))
    training = spread(metric, results) * math.hypot(first, second) / math.sqrt(len(pairs))
    return Outcome(
        comparison,
        first=first,
        second=second,
        gain=first - second if METRICS[metric].better == "higher" else second - first,
        error=math.hypot(training, measuring_error(metric, pairs)),
        seeds=len(common),
        blank=all(row.get("top5") is not None and row["top5"] < SHOWN for pair in pairs for row in pair),
    )


@dataclass(frozen=True)
class Verdict:
    """`word` is "reproduces", "does not reproduce", "not decided" or "not run"; `found` has a word per comparison."""

    word: str
    sentence: str
    found: tuple[str, ...] = ()


def judge(claim: Claim, results: Results) -> Verdict:
    """One sentence on a claim, from the numbers alone."""
    outcomes = [compare(comparison, results) for comparison in claim.comparisons]
    found = [outcome for outcome in outcomes if outcome is not None]
    if len(found) < len(outcomes):
        sides = {side for c, o in zip(claim.comparisons, outcomes, strict=True) if o is None for side in _of(c)}
        missing = sorted(side for side in sides if not results.get(side)) or sorted(sides)
        return Verdict("not run", f"**Not run**: {claim.says} ({claim.source}). Missing: {', '.join(missing)}.")
    word = "reproduces" if all(outcome.holds for outcome in found) else "does not reproduce"
    if any(outcome.blank for outcome in found):
        word = "not decided"
    seeds = min(outcome.seeds for outcome in found)
    count = f"{seeds} seed{'s' if seeds != 1 else ''}"
    if seeds < len(claim.seeds):
        count += f" of {len(claim.seeds)}"
    reasons = "; ".join(map(str, found))
    sentence = f"**{word[0].upper()}{word[1:]}** ({count}): {claim.says} ({claim.source}). {reasons}."
    return Verdict(word, sentence, tuple(outcome.word for outcome in found))


def _of(comparison: Comparison) -> tuple[str, str]:
    return comparison.first, comparison.second
