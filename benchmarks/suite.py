# SPDX-License-Identifier: Apache-2.0
"""What an op's benchmark is made of: cases, contestants, targets; and what a row of the results says of them."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch

from benchmarks.gate import Subject, Values
from benchmarks.roofline import Copy
from benchmarks.timing import quotient
from sdxl_fast.dispatch import registry, use_backend
from sdxl_fast.testing.cases import Case

FORWARD, BOTH = "forward", "forward+backward"
GATE_FAILED = "failed its gate"
SAME_MEMORY = 0.02  # by how much the peaks of two runs of one program differ
NATIVE = {"cpu": ("cpu", "library"), "cuda": ("cuda", "triton", "library")}
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


@dataclass(frozen=True)
class Target:
    """What a backend is meant to reach on one case.

    Attributes:
        case, dtype, mode: the row.
        speedup: times the speed of eager on the same tensors, in the same memory layout.
        copy_share: share of the machine's copy bandwidth, by the op's least traffic.
        backend: whose.
    """

    case: str
    dtype: str
    speedup: float
    copy_share: float | None = None
    backend: str = "cpu"
    mode: str = FORWARD


@dataclass(frozen=True)
class OpBench:
    """The benchmark of one op.

    Attributes:
        subject: the public function and the names of its arguments and outputs.
        reference: the module with the cost model, ``flops(shape)`` and ``bytes(shape, dtype)``.
        stock: the same arguments done with stock PyTorch operations: the peer, eager and compiled.
        make: draws the arguments of a case; the generator says on which device.
        cpu_cases: timed on a CPU.
        gpu_cases: timed on a GPU, the most valuable first.
        gpu_rest: every other shape of SDXL, for when there is time.
        dtypes: names, the most valuable first.
        modes: forward, or both passes too.
        images: whether tensors have a memory format; peers are then timed in both.
        ordered: tensors that stay as ``make`` lays them out, since their order is what they were prepared for.
        captured: whether a CUDA graph may hold the call; else events are around the calls themselves.
        rows: over how many rows an element of an output or gradient sums, by case.
        cost: what else the cost model needs to know of a case.
        arguments: the operation's own arguments of a case, where the subject's public function takes others.
        own: outputs that a peer draws for itself.
        peers: further ways of stock PyTorch to compute the same on a GPU, by name.
        targets: what is to be reached.
    """

    subject: Subject
    reference: ModuleType
    stock: Callable[..., Any]
    make: Callable[[Case, torch.dtype, torch.Generator], Values]
    cpu_cases: tuple[Case, ...]
    gpu_cases: tuple[Case, ...]
    gpu_rest: tuple[Case, ...] = ()
    dtypes: tuple[str, ...] = ("bfloat16", "float32")
    modes: tuple[str, ...] = (FORWARD, BOTH)
    images: bool = False
    ordered: tuple[str, ...] = ()
    captured: bool = True
    rows: Callable[[Case], dict[str, int]] = field(default=lambda case: {})
    cost: Callable[[Case], dict[str, Any]] = field(default=lambda case: {})
    arguments: Callable[[Values], Values] = field(default=dict)
    own: tuple[str, ...] = ()
    peers: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    targets: tuple[Target, ...] = ()

    @property
    def layout(self) -> str:
        """The memory layout our backends are timed in."""
        return "channels_last" if self.images else "contiguous"

    def cases(self, device: str, *, quick: bool = False) -> tuple[Case, ...]:
        """Returns the first cases for a device type; ``quick`` cuts them to a size that only tries the code out."""
        found = self.cpu_cases if device == "cpu" else self.gpu_cases
        return tuple(_cut(case, images=self.images) for case in found) if quick else found


def _cut(case: Case, longest: int = 8, *, images: bool) -> Case:
    """Returns the case with its maps or tokens cut to ``longest``; channels, heads and the batch of maps stay."""
    kept = (0, 1) if images else (2, 3) if len(case.shape) == 4 else (len(case.shape) - 1,)
    shape = tuple(size if dim in kept else min(size, longest) for dim, size in enumerate(case.shape))
    return dataclasses.replace(case, name=f"{case.name} cut to {'x'.join(map(str, shape))}", shape=shape)


@dataclass(frozen=True)
class Work:
    """One case in one dtype, a row per mode; one gate serves them all."""

    bench: OpBench
    case: Case
    dtype: str
    modes: tuple[str, ...]

    def key(self, mode: str) -> dict[str, str]:
        """Returns the entries that tell its row from others."""
        return {"op": self.bench.subject.op, "case": self.case.name, "dtype": self.dtype, "mode": mode}


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        device: "cpu" or "cuda".
        compile: whether torch.compile takes part; compiling takes seconds per row on a CPU, and up to half a minute
            per row with max-autotune on a GPU.
        rounds: samples of each contestant.
        budget_s: seconds after which no further round of a row starts.
        sets: input sets to rotate; None for as many as exceed the cache twice.
        faults: contestants that crashed the GPU in an earlier process, as ``ContextLostError`` has them.
        copy: takes a turn in every round; without it rows say nothing of the copy bandwidth.
    """

    device: str
    compile: bool = False
    rounds: int = 11
    budget_s: float = 5.0
    sets: int | None = None
    faults: tuple[dict[str, Any], ...] = ()
    copy: Copy | None = None


@dataclass(frozen=True)
class Contestant:
    """Something to time: ``call`` takes the op's arguments, tensors in ``layout``."""

    name: str
    layout: str
    call: Callable[..., Any]
    backend: str | None = None


def works(bench: OpBench, cases: tuple[Case, ...], *, modes: tuple[str, ...] | None = None) -> Iterator[Work]:
    """Yields what to measure for ``cases``: the first dtype of all cases first."""
    for dtype, case in itertools.product(bench.dtypes, cases):
        yield Work(bench, case, dtype, modes or bench.modes)


def contestants(bench: OpBench, device: str, *, compile: bool) -> list[Contestant]:
    """Returns the op's backends for the device, stock PyTorch in each memory layout, and that compiled if asked for."""
    found = []
    info = registry()[bench.subject.op]
    offered = (info.backend(name) for name in NATIVE[device])
    for backend in (b.name for b in offered if b is not None and not b.composed):  # composed: that is eager

        def ours(backend: str = backend, **values: Any) -> Any:
            with use_backend(backend):
                return bench.subject.public(**values)

        found.append(Contestant(backend, bench.layout, ours, backend))
    calls = {"eager": bench.stock, **(bench.peers if device == "cuda" else {})}
    if compile:
        mode = "max-autotune-no-cudagraphs" if device == "cuda" else "default"
        calls["compile"] = torch.compile(bench.stock, mode=mode, dynamic=False)
    for name, call in calls.items():
        for layout in LAYOUTS if bench.images else ("contiguous",):
            found.append(Contestant(f"{name} {layout}" if bench.images else name, layout, call))
    return found


def place(values: Values, layout: str, ordered: tuple[str, ...] = ()) -> Values:
    """Returns ``values`` with every [N,C,H,W] tensor in the memory layout, but for those that are ``ordered``."""

    def moves(name: str) -> bool:
        return isinstance(values[name], torch.Tensor) and values[name].ndim == 4 and name not in ordered

    return {n: v.contiguous(memory_format=LAYOUTS[layout]) if moves(n) else v for n, v in values.items()}


def fastest(row: Mapping[str, Any], prefix: str) -> str | None:
    """Returns the fastest timed contestant whose name begins with ``prefix``, or None."""
    timed = {
        n: c["seconds"]["median"] for n, c in row["contestants"].items() if "seconds" in c and n.startswith(prefix)
    }
    return min(timed, key=timed.__getitem__) if timed else None


def with_ratios(row: dict[str, Any], targets: tuple[Target, ...]) -> dict[str, Any]:
    """Adds to every timed contestant how many times as fast as eager it is, and to the row its targets.

    ``speedup`` is over eager in its faster memory layout, ``same_layout`` over eager in the contestant's own.
    """
    eager = fastest(row, "eager")
    for found in row["contestants"].values():
        if "samples" not in found:
            continue
        for name, against in (("speedup", eager), ("same_layout", _eager_in(row, found["layout"]))):
            if against is not None:
                found[name] = quotient(row["contestants"][against]["samples"], found["samples"]).as_dict()
    row["baseline"] = eager
    key = (row["case"], row["dtype"], row["mode"])
    row["targets"] = [dataclasses.asdict(t) for t in targets if (t.case, t.dtype, t.mode) == key]
    return row


def _eager_in(row: Mapping[str, Any], layout: str) -> str | None:
    """Returns the name of eager in a memory layout, or None where it was not timed."""
    found = row["contestants"]
    return next((n for n in ("eager", f"eager {layout}") if "samples" in found.get(n, {})), None)


def copy_share(row: Mapping[str, Any], name: str) -> float | None:
    """Returns a timed contestant's bandwidth, by the op's least traffic, over the copy's, round by round."""
    if "copy" not in row:
        return None
    copy = row["copy"]
    return row["bytes"] / copy["bytes"] * quotient(copy["samples"], row["contestants"][name]["samples"]).median


def verdicts(row: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    """Returns for every target of a row what it asks, what was reached (None when not timed), and whether it was."""
    found: list[tuple[str, float | None, bool]] = []
    for target in row["targets"]:
        contestant = row["contestants"].get(target["backend"], {})
        timed = "seconds" in contestant
        speedup = contestant["same_layout"]["median"] if "same_layout" in contestant else None
        what = f"{target['backend']} at least {target['speedup']:g} times eager in the same layout"
        found.append((what, speedup, speedup is not None and speedup >= target["speedup"]))
        if target["copy_share"] is not None:
            share = copy_share(row, target["backend"]) if timed else None
            what = f"{target['backend']} at least {target['copy_share']:.0%} of copy bandwidth"
            found.append((what, share, share is not None and share >= target["copy_share"]))
    chosen = row.get("chosen")
    ratio = row["contestants"].get(chosen, {}).get("same_layout")
    if ratio is not None:
        # Slower only where three quarters of the rounds say so: half of them do by chance for equals.
        what = f"{chosen}, which the registry takes, no slower than eager in the same layout"
        found.append((what, ratio["median"], ratio["high"] >= 1))
    return found


def stage_verdicts(row: Mapping[str, Any]) -> list[tuple[str, float | None, bool]]:
    """Returns the same for a row of a whole model: times another's speed by stage, milliseconds, or memory."""
    return [_stage_verdict(row, target) for target in row.get("targets", ())]


def _stage_verdict(row: Mapping[str, Any], target: Mapping[str, Any]) -> tuple[str, float | None, bool]:
    contestants = row["contestants"]
    if "seconds" in target:
        name, stage = target["contestant"], target["stage"]
        found = contestants.get(name, {}).get("stages", {}).get(stage, {}).get("median")
        value = None if found is None else 1e3 * found
        what = f"{name}, {stage} within {1e3 * target['seconds']:g} ms"
        return what, value, value is not None and value <= 1e3 * target["seconds"]
    if "memory_of" in target:
        name, other = target["contestant"], target["memory_of"]
        mine, its = (contestants.get(n, {}).get("memory_bytes") for n in (name, other))
        share = mine / its if mine and its else None
        most = target.get("share", 1)
        what = f"{name}, no more memory than {other}" if most == 1 else f"{name}, at most {most:g} of {other}'s memory"
        return what, share, share is not None and share <= most * (1 + SAME_MEMORY)
    reached = row["ratios"].get(target["stage"])
    value = None if reached is None else reached["median"]
    # As above, where not to be slower is all that is asked.
    best = None if reached is None else reached["high" if target["speedup"] == 1 else "median"]
    what = target.get("what") or f"{target['stage']} at least {target['speedup']:g} times stock in its faster layout"
    return what, value, best is not None and best >= target["speedup"]
