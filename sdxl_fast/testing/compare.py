# SPDX-License-Identifier: Apache-2.0
"""Is a tensor as accurate as PyTorch itself would have been? The one place where tests decide on tolerances.

Three tensors meet: ``got`` (what is tested), ``oracle`` (the reference in float64 on the same, already rounded,
inputs) and ``baseline`` (the reference in the tested dtype). ``got`` passes when its error against the oracle is at
most ``k`` times the baseline's own error plus a floor. The floor is the rounding of the result (the baseline may be
exact by luck), one unit in the last place per element, and for a sum over M rows also the random walk of M roundings
in the accumulator, ``sqrt(M)`` units. k is 2 for outputs and 3 for gradients.

The largest error catches a wrong element; the root mean square, the relative L2, the cosine and the bias catch what
is wrong a little everywhere: a truncation instead of a rounding, a missing epsilon, a low-precision accumulator.

Integers have no rounding to allow for: ``got`` must be what the reference makes in the tested dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch

K_FORWARD = 2.0
K_GRADIENT = 3.0
# Below this many elements the worst of the baseline's errors is a matter of luck; draws of the same distribution are
# pooled (see `Scale`), and no bias is tested because its own standard error is too large.
SMALL = 4096


@dataclass(frozen=True)
class Scale:
    """How large the baseline's error is: of one draw, or the worst over several (``|``)."""

    largest: float = 0.0
    rms: float = 0.0
    relative: float = 0.0

    def __mul__(self, factor: float) -> Scale:
        return Scale(self.largest * factor, self.rms * factor, self.relative * factor)

    def __or__(self, other: Scale) -> Scale:
        return Scale(max(self.largest, other.largest), max(self.rms, other.rms), max(self.relative, other.relative))


def error_scale(baseline: torch.Tensor, oracle: torch.Tensor) -> Scale:
    """Measures the error of ``baseline`` against ``oracle`` where both are finite."""
    error, finite = _error(baseline, oracle)
    if error.numel() == 0:
        return Scale()
    error = error[finite]
    size = oracle[finite].norm().item()
    relative = error.norm().item() / size if size else 0.0
    return Scale(_largest(error), _rms(error), relative)


@dataclass
class Comparison:
    """Outcome of :func:`compare`; prints as one line, with one more per problem."""

    op: str
    tensor: str
    error: float = 0.0
    baseline_error: float = 0.0
    ratio: float = 0.0
    worst_index: tuple[int, ...] = ()
    metrics: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        figures = ", ".join(f"{name} {value:.3g}" for name, value in self.metrics.items())
        line = (
            f"{self.op} {self.tensor}: error {self.error:.3g}, PyTorch's {self.baseline_error:.3g}, "
            f"{self.ratio:.2f} of the bound at {self.worst_index}; {figures}"
        )
        return "\n".join([line, *(f"  {problem}" for problem in self.problems)])


def _error(t: torch.Tensor, oracle: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    finite = torch.isfinite(oracle) & torch.isfinite(t)
    return t.double() - oracle, finite


def _largest(t: torch.Tensor) -> float:
    return t.abs().max().item() if t.numel() else 0.0


def _rms(t: torch.Tensor) -> float:
    return t.norm().item() / math.sqrt(max(t.numel(), 1))


def compare(
    got: torch.Tensor,
    oracle: torch.Tensor,
    baseline: torch.Tensor,
    *,
    op: str = "",
    tensor: str = "",
    gradient: bool = False,
    rows: int = 1,
    scale: Scale | None = None,
) -> Comparison:
    """Compares a result with the oracle under the bound of this module.

    Args:
        got: the tested tensor.
        oracle: float64 tensor of the same shape.
        baseline: the reference's result in the tested dtype.
        op, tensor: names for the report.
        gradient: whether this is a gradient (k = 3 and the whole-tensor metrics become bounds).
        rows: how many rows were summed into each element.
        scale: further draws of the baseline's error, for small tensors.

    Returns:
        A :class:`Comparison`, whose ``problems`` is empty when the tensor passes.
    """
    outcome = Comparison(op, tensor)
    if got.shape != oracle.shape:
        outcome.problems.append(f"shape {list(got.shape)}, expected {list(oracle.shape)}")
    if got.dtype != baseline.dtype:
        outcome.problems.append(f"dtype {got.dtype}, expected {baseline.dtype}")
    if outcome.problems or got.numel() == 0:
        return outcome
    got, oracle, baseline = got.detach(), oracle.detach(), baseline.detach()
    if not got.is_floating_point():
        differs = got != baseline
        if bool(differs.any()):
            index, count = _index(differs.double()), int(differs.sum())
            outcome.problems.append(f"{count} differ, {got[index].item()} at {index} for {baseline[index].item()}")
        return outcome
    # What overflows in the tested dtype is expected to: its infinity is the right answer.
    rounded = oracle.to(got.dtype)
    same_special = torch.where(
        torch.isfinite(rounded), torch.isfinite(got), (got == rounded) | (got.isnan() & rounded.isnan())
    )
    if not bool(same_special.all()):
        index = _index((~same_special).double())
        outcome.problems.append(f"{got[index].item()} at {index} where the oracle has {oracle[index].item()}")
        return outcome
    _bound(outcome, got, oracle, baseline, K_GRADIENT if gradient else K_FORWARD, rows, scale or Scale())
    return outcome


def _index(t: torch.Tensor) -> tuple[int, ...]:
    flat = int(t.reshape(-1).argmax())
    return tuple(int(i) for i in torch.unravel_index(torch.tensor(flat), t.shape))


def _bound(
    outcome: Comparison,
    got: torch.Tensor,
    oracle: torch.Tensor,
    baseline: torch.Tensor,
    k: float,
    rows: int,
    scale: Scale,
) -> None:
    """Fills in the figures of ``outcome`` and its problems."""
    ulp = torch.finfo(got.dtype).eps
    accumulator_ulp = min(ulp, torch.finfo(torch.float32).eps)
    random_walk = math.sqrt(rows) * accumulator_ulp
    scale = scale | error_scale(baseline, oracle)
    error, finite = _error(got, oracle)
    error, oracle = torch.where(finite, error, 0.0), torch.where(finite, oracle, 0.0)
    count = error.numel()

    rms_oracle = _rms(oracle)
    # The subnormals of float16 have a fixed spacing; a relative floor would vanish there.
    spacing = torch.finfo(got.dtype).smallest_normal * ulp
    allowed = k * scale.largest + ulp * oracle.abs() + random_walk * rms_oracle + spacing
    ratio = error.abs() / allowed
    worst = _index(ratio)
    outcome.error, outcome.baseline_error = _largest(error), scale.largest
    outcome.ratio, outcome.worst_index = ratio[worst].item(), worst
    if outcome.ratio > 1:
        outcome.problems.append(f"error {error[worst].item():.3g} exceeds the bound {allowed[worst].item():.3g}")

    rms, norm = _rms(error), oracle.norm().item()
    allowed_rms = k * scale.rms + (ulp / 2 + random_walk) * rms_oracle + spacing
    bias = (error * oracle.sign()).mean().item()
    outcome.metrics = {
        "rms": rms,
        "relative_l2": error.norm().item() / norm if norm else 0.0,
        "cosine_defect": _cosine_defect(oracle + error, oracle),
        "bias": bias,
    }
    if rms > allowed_rms:
        outcome.problems.append(f"rms error {rms:.3g} exceeds {allowed_rms:.3g}")
    allowed_relative = k * scale.relative + ulp / 2 + random_walk
    if norm and outcome.metrics["relative_l2"] > allowed_relative + spacing * math.sqrt(count) / norm:
        outcome.problems.append(f"relative L2 {outcome.metrics['relative_l2']:.3g} exceeds {allowed_relative:.3g}")
    # An angle of a radians has cosine 1 - a^2 / 2; the last term is float64 itself.
    if norm > spacing * math.sqrt(count) and outcome.metrics["cosine_defect"] > allowed_relative**2 + 1e-14:
        outcome.problems.append(f"cosine is 1 - {outcome.metrics['cosine_defect']:.3g}")
    # Rounding to nearest has no direction: its mean shrinks as 1/sqrt(count). Six standard errors, and a tenth for
    # errors that the elements of a group share because they share its statistics.
    if count >= SMALL and abs(bias) > allowed_rms * (6 / math.sqrt(count) + 0.1) + abs(_bias(baseline, oracle)):
        outcome.problems.append(f"bias {bias:.3g} towards {'larger' if bias > 0 else 'smaller'} magnitudes")


def _bias(t: torch.Tensor, oracle: torch.Tensor) -> float:
    error, finite = _error(t, oracle)
    return (torch.where(finite, error, 0.0) * oracle.sign()).mean().item()


def _cosine_defect(a: torch.Tensor, b: torch.Tensor) -> float:
    """1 - cos(a, b), computed from the difference of the unit vectors, without cancellation."""
    norms = a.norm(), b.norm()
    if not (norms[0] and norms[1]):
        return float(bool(norms[0]) != bool(norms[1]))
    return 0.5 * ((a / norms[0] - b / norms[1]).norm() ** 2).item()


def compare_all(
    got: Mapping[str, torch.Tensor],
    oracle: Mapping[str, torch.Tensor],
    baseline: Mapping[str, torch.Tensor],
    *,
    op: str,
    gradients: Sequence[str] = (),
    rows: Mapping[str, int] | None = None,
    scales: Mapping[str, Scale] | None = None,
) -> list[Comparison]:
    """Compares every named tensor; ``gradients`` names those that are gradients. A missing tensor is a problem."""
    outcomes = []
    for name, expected in oracle.items():
        if name not in got:
            outcomes.append(Comparison(op, name, problems=["missing"]))
            continue
        outcomes.append(
            compare(
                got[name],
                expected,
                baseline[name],
                op=op,
                tensor=name,
                gradient=name in gradients,
                rows=(rows or {}).get(name, 1),
                scale=(scales or {}).get(name),
            )
        )
    return outcomes


def assert_all(outcomes: Sequence[Comparison]) -> None:
    """Raises AssertionError with the report of every comparison that failed."""
    failed = [str(outcome) for outcome in outcomes if not outcome.passed]
    if failed:
        raise AssertionError("\n".join(failed))
