# SPDX-License-Identifier: Apache-2.0
"""No number without a right answer: what is timed is first compared with the float64 oracle, on the timed inputs.

Our backends meet the bound of the tests (``sdxl_fast.testing.compare``: at most twice, for gradients three times, the
error PyTorch makes in that dtype, plus rounding), on poisoned outputs, and must leave their inputs alone. A peer has
only to compute the same function: stock operations round between the steps, which is no reason not to time them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sdxl_fast.dispatch import use_backend
from sdxl_fast.testing.compare import compare_all

Tensors = dict[str, torch.Tensor]
Values = dict[str, Any]

# Units in the last place of relative L2 error up to which a peer counts as the same function. To them comes the random
# walk of its sums: PyTorch's channels_last GroupNorm adds a group up one element after the other in float32.
PEER_ULPS = 8
# Elements compared at a time: what stays in a CPU's cache; on a GPU, what its memory has room for some dozen times.
PIECE = {"cpu": 1 << 18, "cuda": 1 << 25}


@dataclass(frozen=True)
class Subject:
    """What the gate and the benchmark agree on about an op: its function and the names of what goes in and out.

    Attributes:
        op: name of the op.
        public: the public function.
        outputs: names of what it returns.
        inputs: names of the differentiable arguments.
    """

    op: str
    public: Callable[..., Any]
    outputs: tuple[str, ...]
    inputs: tuple[str, ...]

    def leaves(self, values: Values) -> list[str]:
        """Returns the names of the differentiable arguments that are given."""
        return [name for name in self.inputs if values[name] is not None]


@dataclass(frozen=True)
class Verdict:
    """Whether a contestant may be timed, and on what grounds."""

    passed: bool
    detail: str


def evaluate(subject: Subject, call: Callable[..., Any], values: Values, dy: torch.Tensor | None) -> Tensors:
    """Returns the outputs of ``call(**values)`` and, with ``dy``, the gradients of the first, named ``d<input>``."""
    names = subject.leaves(values) if dy is not None else []
    leaves = {name: values[name].detach().requires_grad_() for name in names}
    with contextlib.nullcontext() if leaves else torch.no_grad():
        result = call(**{**values, **leaves})
    listed = (result,) if isinstance(result, torch.Tensor) else result
    found = {name: t.detach() for name, t in zip(subject.outputs, listed, strict=False)}
    if leaves:
        gradients = torch.autograd.grad(listed[0], list(leaves.values()), dy)
        found |= {f"d{name}": g for name, g in zip(leaves, gradients, strict=True)}
    return found


@contextlib.contextmanager
def _poisoned() -> Iterator[None]:
    """Fills new tensors with NaN, so that an element nobody writes cannot pass."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _double(values: Values) -> Values:
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()}


def _split(t: torch.Tensor) -> Sequence[torch.Tensor]:
    """Returns t cut along its last dimension but one into parts of about ``PIECE`` elements."""
    most = PIECE[t.device.type]
    if t.ndim < 2 or t.numel() <= most:
        return (t,)
    return t.split(max(1, most * t.shape[-2] // t.numel()), -2)


def _pieces(*named: Tensors) -> Iterator[list[Tensors]]:
    """Yields the tensors of each name, a piece at a time: dozens of passes in float64 over one that fits the cache."""
    for name in named[-1]:
        if any(name not in tensors or tensors[name].shape != named[-1][name].shape for tensors in named):
            yield [{k: t for k, t in tensors.items() if k == name} for tensors in named]
            continue
        for parts in zip(*(_split(tensors[name]) for tensors in named), strict=True):
            yield [{name: part} for part in parts]


def _relative(t: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the relative L2 error."""
    error = size = 0.0
    for part, right in zip(_split(t), _split(expected), strict=True):
        error += (part.double() - right).norm().item() ** 2
        size += right.norm().item() ** 2
    return math.sqrt(error / size) if size else math.sqrt(error)


@dataclass
class Gate:
    """Judges the contestants of one case in one dtype; the oracle is computed once, when first asked for.

    Attributes:
        subject: the op.
        values: arguments of the public function, as they will be timed.
        dy: gradient of the first output, or None to judge the forward alone.
        rows: over how many rows an element of a tensor is a sum.
    """

    subject: Subject
    values: Values
    dy: torch.Tensor | None
    rows: dict[str, int] = field(default_factory=dict)
    _expected: tuple[Tensors, Tensors] | None = None

    def _expect(self, values: Values) -> tuple[Tensors, Tensors]:
        """Returns the reference's results in float64 and in the dtype itself."""
        with use_backend("eager"):
            dy = None if self.dy is None else self.dy.double()
            oracle = evaluate(self.subject, self.subject.public, _double(values), dy)
            return oracle, evaluate(self.subject, self.subject.public, values, self.dy)

    def judge(self, call: Callable[..., Any]) -> Verdict:
        """Judges one of our backends by the bound of the tests."""
        before = {k: v.clone() for k, v in self.values.items() if isinstance(v, torch.Tensor)}
        with _poisoned():
            got = evaluate(self.subject, call, self.values, self.dy)
        touched = [name for name, tensor in before.items() if not torch.equal(tensor, self.values[name])]
        del before
        if touched:
            return Verdict(False, f"wrote to its input {', '.join(touched)}")
        if self._expected is None:
            self._expected = self._expect(self.values)
        oracle, baseline = self._expected
        gradients = [name for name in oracle if name not in self.subject.outputs]
        outcomes = [
            outcome
            for parts in _pieces(got, oracle, baseline)
            for outcome in compare_all(*parts, op=self.subject.op, gradients=gradients, rows=self.rows)
        ]
        failed = [str(outcome) for outcome in outcomes if not outcome.passed]
        if failed:
            return Verdict(False, "; ".join(failed))
        return Verdict(True, f"{max(outcome.ratio for outcome in outcomes):.2f} of the bound")

    def judge_peer(self, call: Callable[..., Any], values: Values, own: Sequence[str] = ()) -> Verdict:
        """Judges a peer by its relative L2 error.

        Args:
            call: takes the op's arguments.
            values: those of the gate in the peer's memory layout.
            own: outputs that the peer draws for itself and that the oracle takes from it.
        """
        got = evaluate(self.subject, call, values, self.dy)
        if own:
            oracle, _ = self._expect({**self.values, "seeds": None, **{name: got[name] for name in own}})
        else:
            if self._expected is None:
                self._expected = self._expect(self.values)
            oracle = self._expected[0]
        return same_function(got, oracle, rows=max(self.rows.values(), default=0))


def same_function(got: Tensors, oracle: Tensors, *, rows: int = 0) -> Verdict:
    """Compares every tensor's relative L2 error with what a peer may have; NaN never passes.

    Integers may be one off, where a peer's arithmetic rounds to the other side of a tie.

    Args:
        got: what a peer computed.
        oracle: the same in float64.
        rows: how many rows are summed on the way.
    """
    worst = 0.0
    for name, expected in oracle.items():
        if not bool(torch.isfinite(got[name]).all()):
            return Verdict(False, f"{name} is not finite")
        if not expected.is_floating_point():
            off = int((got[name].long() - expected.long()).abs().max()) if expected.numel() else 0
            if off > 1:
                return Verdict(False, f"{name}: {off} off")
            worst = max(worst, float(off))
            continue
        relative = _relative(got[name], expected)
        allowed = PEER_ULPS * torch.finfo(got[name].dtype).eps + math.sqrt(rows) * torch.finfo(torch.float32).eps
        if not relative <= allowed:
            return Verdict(False, f"{name}: relative L2 {relative:.3g} exceeds {allowed:.3g}")
        worst = max(worst, relative / allowed)
    return Verdict(True, f"{worst:.2f} of the bound for peers")
