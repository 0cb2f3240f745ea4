# SPDX-License-Identifier: Apache-2.0
"""Measuring one case: rotating inputs, the gate, the contestants in turn."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.gate import Gate, Subject, Values
from benchmarks.machine import cache_bytes
from benchmarks.suite import (
    BOTH,
    FORWARD,
    GATE_FAILED,
    Contestant,
    Options,
    Work,
    contestants,
    place,
    with_ratios,
)
from benchmarks.timing import Call, Clock, Timed, interleave, sets_to_exceed, summarise, tensor_bytes, without_graph
from sdxl_fast.dispatch import available_backends, explain
from sdxl_fast.text import one_line

_COPY = "copy"  # beside the contestants' names, none of which it is


class ContextLostError(RuntimeError):
    """The GPU refuses everything after a fault; only a new process can go on.

    Attributes:
        section: of the results file in which ``row`` belongs.
        row: what was under way.
    """

    def __init__(self, section: str, row: dict[str, Any]) -> None:
        super().__init__(f"the GPU faulted: {row}")
        self.section, self.row = section, row


class Prepared:
    """One case in one dtype, ready for contestants: rotating argument sets in each layout, and the gate.

    Attributes:
        count: argument sets.
        bytes_per_set: of the arguments of one call.
        chosen: the backend that the registry takes for this case.
    """

    def __init__(self, work: Work, options: Options) -> None:
        self._work, self._device = work, options.device
        first = self._draw(0)
        self.bytes_per_set = tensor_bytes(first[0])
        self.count = options.sets or sets_to_exceed(cache_bytes(options.device), self.bytes_per_set)
        self._base = [first, *(self._draw(i) for i in range(1, self.count))]
        self._layouts: dict[str, list[tuple[Values, torch.Tensor]]] = {}
        values, dy = self.sets(work.bench.layout)[0]
        self.chosen = explain(work.bench.subject.op, **work.bench.arguments(values)).backend
        gradient = dy if BOTH in work.modes else None
        self.gate: Gate | None = Gate(work.bench.subject, values, gradient, work.bench.rows(work.case))

    def _draw(self, index: int) -> tuple[Values, torch.Tensor]:
        bench, dtype = self._work.bench, getattr(torch, self._work.dtype)
        generator = torch.Generator(self._device).manual_seed(index)
        values = bench.make(self._work.case, dtype, generator)
        result = bench.stock(**{k: v.to("meta") if isinstance(v, torch.Tensor) else v for k, v in values.items()})
        shape = (result if isinstance(result, torch.Tensor) else result[0]).shape
        return values, torch.randn(shape, generator=generator, device=self._device).to(dtype)

    def sets(self, layout: str) -> list[tuple[Values, torch.Tensor]]:
        """Returns the sets of (arguments, gradient of the first output) in a layout, made once."""
        if layout not in self._layouts:
            ordered = self._work.bench.ordered
            self._layouts[layout] = [
                (place(v, layout, ordered), place({"dy": dy}, layout)["dy"]) for v, dy in self._base
            ]
        return self._layouts[layout]

    def unavailable(self, contestant: Contestant) -> str | None:
        """Returns why a contestant cannot run here, or None."""
        if contestant.backend is None:
            return None
        return available_backends()[self._work.bench.subject.op][contestant.backend]

    def judge(self, contestant: Contestant) -> str:
        """Returns how a contestant passed the gate.

        Raises:
            LookupError: with the reason, when it cannot run here or failed.
        """
        bench = self._work.bench
        reason = self.unavailable(contestant)
        if reason is not None:
            raise LookupError(reason)
        if self.gate is None:
            raise RuntimeError("the gate is closed: judge before closing it")
        if contestant.backend is not None:
            verdict = self.gate.judge(contestant.call)
        else:
            verdict = self.gate.judge_peer(contestant.call, self.sets(contestant.layout)[0][0], bench.own)
        if not verdict.passed:
            raise LookupError(f"{GATE_FAILED}: {verdict.detail}")
        return verdict.detail

    def close_gate(self) -> None:
        """Frees the oracle, which for a large map is gigabytes."""
        self.gate = None

    def calls(self, contestant: Contestant, mode: str) -> list[Call]:
        """Returns one call per argument set."""
        return calls_of(self._work.bench.subject, contestant, mode, self.sets(contestant.layout))


def calls_of(
    subject: Subject, contestant: Contestant, mode: str, sets: list[tuple[Values, torch.Tensor]]
) -> list[Call]:
    """Returns one call per argument set: the forward alone, or both passes through autograd."""
    if mode == FORWARD:
        return [functools.partial(contestant.call, **values) for values, _ in sets]
    calls: list[Call] = []
    for values, dy in sets:
        leaves = {name: values[name].detach().requires_grad_() for name in subject.leaves(values)}

        def both(
            arguments: Values = {**values, **leaves},  # noqa: B006
            leaves: tuple[torch.Tensor, ...] = tuple(leaves.values()),
            dy: torch.Tensor = dy,
        ) -> Any:
            result = contestant.call(**arguments)
            first = result if isinstance(result, torch.Tensor) else result[0]
            return first, torch.autograd.grad(first, leaves, dy)

        calls.append(both)
    return calls


def alive(device: str) -> bool:
    """Whether the device still answers: after some faults a GPU refuses this process everything."""
    if device != "cuda":
        return True
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def measure(
    work: Work, options: Options, clock: Clock, *, entered: list[Contestant] | None = None
) -> Iterator[dict[str, Any]]:
    """Measures one case in one dtype.

    Args:
        work: what to time.
        options: how.
        clock: with what.
        entered: the contestants; None for :func:`contestants`.

    Yields:
        for each mode a row of the results file: case, cost, and for every contestant its times or why it has none.

    Raises:
        ContextLostError: when a GPU fault makes this process useless.
    """
    bench = work.bench
    clock = clock if bench.captured else without_graph(clock)
    if options.compile:
        torch._dynamo.reset()  # its limit of recompilations counts per function, whatever the shapes were
    if entered is None:
        entered = contestants(bench, options.device, compile=options.compile)
    prepared = Prepared(work, options)
    judged: dict[str, dict[str, Any]] = {}
    for contestant in entered:
        with _refusing(judged, contestant.name, work, options):
            fault = next((f for f in options.faults if f == {**f, **_fault_key(work, contestant.name)}), None)
            if fault is not None:
                raise LookupError(f"its kernel crashed the GPU: {fault['reason']}")
            judged[contestant.name] = {"gate": prepared.judge(contestant), "layout": contestant.layout}
    prepared.close_gate()
    for mode in work.modes:
        row = {**_header(work, mode, prepared), "clock": clock.name, "compile": options.compile}
        row["chosen"] = prepared.chosen
        row["contestants"] = copy.deepcopy(judged)
        timed: dict[str, Timed] = {}
        for contestant in entered:
            if "gate" in judged[contestant.name]:
                with _refusing(row["contestants"], contestant.name, work, options):
                    timed[contestant.name] = clock.prepare(prepared.calls(contestant, mode))
        copying = {_COPY: options.copy.timed} if options.copy else {}
        samples = interleave({**timed, **copying}, rounds=options.rounds, budget_s=options.budget_s)
        if options.copy:
            row["copy"] = {"bytes": options.copy.bytes, "samples": samples.pop(_COPY)}
        for name, found in samples.items():
            row["contestants"][name] |= {"seconds": summarise(found).as_dict(), "samples": found}
        yield with_ratios(row, bench.targets)


def _fault_key(work: Work, contestant: str) -> dict[str, str]:
    return {"op": work.bench.subject.op, "case": work.case.name, "dtype": work.dtype, "contestant": contestant}


@contextlib.contextmanager
def _refusing(found: dict[str, dict[str, Any]], name: str, work: Work, options: Options) -> Iterator[None]:
    """Turns what a contestant raises into its entry."""
    try:
        yield
    except Exception as error:  # Triton's own are of no narrower class; the row says which it was
        found[name] = {"refused": one_line(error)}
        if not alive(options.device):
            raise ContextLostError("faults", {**_fault_key(work, name), "reason": one_line(error)}) from error


def _header(work: Work, mode: str, prepared: Prepared) -> dict[str, Any]:
    shape, dtype = work.case.shape, getattr(torch, work.dtype)
    passes = (False,) if mode == FORWARD else (False, True)
    reference, cost = work.bench.reference, work.bench.cost(work.case)
    return {
        **work.key(mode),
        "shape": list(shape),
        "options": work.case.options,
        "flops": sum(reference.flops(shape, backward=backward, **cost) for backward in passes),
        "bytes": sum(reference.bytes(shape, dtype, backward=backward, **cost) for backward in passes),
        "sets": prepared.count,
        "bytes_per_set": prepared.bytes_per_set,
    }
