# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call, and why the others do not.

Every op offers some of five backends. ``cuda`` and ``cpu`` are the native library, ``triton`` the Triton kernels,
``library`` the libraries PyTorch brings (fused attention, matrix products, convolutions: where there is no better
kernel) or other ops put together, and ``eager`` the reference in plain PyTorch, which runs anywhere. A backend is used
when it loads on this machine, its rules hold for the call, and it comes first in the preference for the tensor's
device; :func:`use_backend` forces one.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from sdxl_fast.constraints import Rule, Values, dtype_name, first_problem, join
from sdxl_fast.errors import UnavailableError, UnsupportedError

BACKENDS = ("cuda", "triton", "cpu", "library", "eager")

_forced: ContextVar[str | None] = ContextVar("sdxl_fast_backend", default=None)
_recorder: ContextVar[Counter[tuple[str, str]] | None] = ContextVar("sdxl_fast_recorder", default=None)


class Kernels(NamedTuple):
    """The raw functions of one op on one backend.

    ``alone``, where a backend has it, is the forward of a call that no backward follows: its outputs end with those
    that carry gradients. ``composed`` is that of the backend.
    """

    backend: str
    fwd: Callable[..., Any]
    bwd: Callable[..., Any]
    alone: Callable[..., Any] | None = None
    composed: bool = False


@dataclass(frozen=True)
class Backend:
    """One backend of one op: how to load it, and what it asks of the arguments beyond the op's own rules.

    ``load`` returns the raw functions in the order of :class:`Kernels` or raises :class:`UnavailableError` with the
    reason. The forward of a ``composed`` backend is made of operations that PyTorch differentiates; it is called as it
    is, its backward never, and its outputs end with those that carry gradients.
    """

    name: str
    load: Callable[[], tuple[Callable[..., Any], ...]]
    rules: tuple[Rule, ...] = ()
    composed: bool = False


@dataclass(frozen=True)
class OpInfo:
    """What the registry knows of one op.

    ``bind`` maps the arguments of the public function to the values the rules speak of, filling in defaults; ``lead``
    names the tensor whose device, dtype and size the choice depends on; ``forget`` drops the choices the op has cached.
    """

    name: str
    lead: str
    rules: tuple[Rule, ...]
    backends: tuple[Backend, ...]
    bind: Callable[..., dict[str, Any]]
    forget: Callable[[], None]
    _loaded: dict[str, Kernels | str] = field(default_factory=dict)

    def load(self, backend: Backend) -> Kernels | str:
        """Returns the kernels of ``backend`` or the reason why it cannot be used here; the answer is kept."""
        found = self._loaded.get(backend.name)
        if found is None:
            try:
                fwd, bwd, *alone = backend.load()
                found = Kernels(backend.name, fwd, bwd, alone[0] if alone else None, backend.composed)
            except UnavailableError as reason:
                found = str(reason)
            self._loaded[backend.name] = found
        return found

    def backend(self, name: str) -> Backend | None:
        """Returns the backend called ``name``, or None when the op has none of that name."""
        return next((b for b in self.backends if b.name == name), None)


_registry: dict[str, OpInfo] = {}


def register(info: OpInfo) -> None:
    """Adds an op; its name must be new and its backends known."""
    if info.name in _registry:
        raise ValueError(f"op {info.name!r} is registered already")
    unknown = [b.name for b in info.backends if b.name not in BACKENDS]
    if unknown or info.backend("eager") is None:
        raise ValueError(f"op {info.name!r}: backends must be among {BACKENDS} and include eager")
    _registry[info.name] = info


def registry() -> Mapping[str, OpInfo]:
    """Returns all ops by name."""
    # Ops register themselves when their package is imported; whoever asks for the list wants them all. By name, since
    # this layer lies below the ops and must not depend on them to be imported itself.
    importlib.import_module("sdxl_fast.ops")
    return dict(sorted(_registry.items()))


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Forces one backend for every op called inside the block, in this thread or task.

    A call that the backend cannot run raises :class:`UnsupportedError` with the reason instead of taking another.
    The backward of a call runs on the backend of its forward. Around a compiled function, put the block around the
    call: the choice is made when the graph runs, not when it is traced.

    Args:
        name: ``"cuda"``, ``"triton"``, ``"cpu"``, ``"library"`` or ``"eager"``.

    Raises:
        ValueError: for an unknown name.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be {join(repr(b) for b in BACKENDS)}, got {name!r}")
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


@contextlib.contextmanager
def any_backend() -> Iterator[None]:
    """Inside the block no backend is forced: for a backend that is made of other ops, which have other backends."""
    token = _forced.set(None)
    try:
        yield
    finally:
        _forced.reset(token)


def forced_backend() -> str | None:
    """Returns the backend forced by the enclosing :func:`use_backend`, if any."""
    return _forced.get()


@contextlib.contextmanager
def record() -> Iterator[Counter[tuple[str, str]]]:
    """Counts the forward calls made inside the block, in this thread or task: (op, backend) to number of calls.

    Blocks nest; the innermost one counts.
    """
    counts: Counter[tuple[str, str]] = Counter()
    token = _recorder.set(counts)
    try:
        yield counts
    finally:
        _recorder.reset(token)


def recorder() -> Counter[tuple[str, str]] | None:
    """Returns the counts of the enclosing :func:`record`, if any."""
    return _recorder.get()


@functools.cache
def _preferences() -> tuple[dict[str, Any], ...]:
    return tuple(json.loads((Path(__file__).parent / "ops" / "preferences.json").read_text())["rows"])


def preference(op: str, lead: torch.Tensor) -> tuple[str, ...]:
    """Returns the backends to try for ``op`` on a tensor like ``lead``, fastest first.

    The first row of ``ops/preferences.json`` that fits decides. A row names a device type and may narrow itself to
    an op, a dtype and a range of element counts; what was measured stands beside it.
    """
    for row in _preferences():
        if (
            row["device"] in (lead.device.type, "*")
            and row.get("op", op) == op
            and row.get("dtype") in (None, dtype_name(lead.dtype))
            and row.get("min_elements", 0) <= lead.numel() < row.get("max_elements", float("inf"))
        ):
            return tuple(row["order"])
    return ("eager",)


def _refusal(info: OpInfo, name: str, values: Values) -> Kernels | str:
    """Returns the kernels of a backend for these arguments, or the reason why it does not run them."""
    backend = info.backend(name)
    if backend is None:
        return "this op has no such backend"
    loaded = info.load(backend)
    if isinstance(loaded, str):
        return loaded
    return first_problem(backend.rules, values) or loaded


def select(info: OpInfo, values: Values) -> Kernels:
    """Returns the kernels that run this call.

    Args:
        info: the op.
        values: its arguments by name, already checked against the op's own rules.

    Raises:
        UnsupportedError: when the forced backend, or every backend, refuses; the message carries the reasons.
    """
    forced = _forced.get()
    if forced is not None:
        found = _refusal(info, forced, values)
        if isinstance(found, str):
            raise UnsupportedError(f"{info.name}: backend {forced!r} cannot run this call: {found}")
        return found
    reasons = []
    for name in preference(info.name, values[info.lead]):
        found = _refusal(info, name, values)
        if not isinstance(found, str):
            return found
        if info.backend(name) is not None:
            reasons.append(f"{name}: {found}")
    raise UnsupportedError(f"{info.name}: no backend can run this call; " + "; ".join(reasons))


@dataclass(frozen=True)
class Explanation:
    """Answer of :func:`explain`; prints as a short table.

    Attributes:
        op: name of the op.
        backend: the backend that runs the call, or None when none can.
        forced: whether :func:`use_backend` decided it.
        reasons: for every other backend, why it does not run.
    """

    op: str
    backend: str | None
    forced: bool
    reasons: dict[str, str]

    def __str__(self) -> str:
        how = " (forced)" if self.forced else ""
        lines = [f"{self.op} runs on {self.backend}{how}" if self.backend else f"{self.op} cannot run{how}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def explain(op: str | Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Says which backend a call would run on, and why the others would not. Runs nothing.

    Args:
        op: name of an op, or its public function.
        *args, **kwargs: as for the public function.

    Returns:
        the backend chosen, whether it was forced, and by backend why it is not taken; printed, a line each.

    Raises:
        ValueError: for an unknown op, and for arguments that the op itself would reject.
    """
    name = op if isinstance(op, str) else getattr(op, "__name__", repr(op))
    info = registry().get(name)
    if info is None:
        raise ValueError(f"op must be {join(repr(n) for n in registry())}, got {name!r}")
    values = info.bind(*args, **kwargs)
    problem = first_problem(info.rules, values)
    if problem is not None:
        raise ValueError(f"{name}: {problem}")
    forced = _forced.get()
    chosen: str | None = None
    reasons: dict[str, str] = {}
    order = (forced,) if forced else preference(name, values[info.lead])
    for candidate in dict.fromkeys((*order, *BACKENDS)):
        found = _refusal(info, candidate, values)
        if isinstance(found, str):
            reasons[candidate] = found
        elif candidate not in order:
            reasons[candidate] = f"use_backend({forced!r}) is in force" if forced else "never chosen for this device"
        elif chosen is None:
            chosen = candidate
        else:
            reasons[candidate] = f"would run, but {chosen} is preferred"
    return Explanation(name, chosen, forced is not None, reasons)


def available_backends() -> dict[str, dict[str, str | None]]:
    """Returns, per op and backend, None when the backend can be used on this machine, else the reason why not."""
    table: dict[str, dict[str, str | None]] = {}
    for name, info in registry().items():
        row: dict[str, str | None] = {}
        for backend_name in BACKENDS:
            backend = info.backend(backend_name)
            loaded = "this op has no such backend" if backend is None else info.load(backend)
            row[backend_name] = loaded if isinstance(loaded, str) else None
        table[name] = row
    return table


def matrix_markdown() -> str:
    """Returns the op x backend table of the README, as the registry has it; the same on every machine."""
    lines = ["| op | " + " | ".join(BACKENDS) + " |", "|---|" + "---|" * len(BACKENDS)]
    for name, info in registry().items():
        cells = ["yes" if info.backend(b) is not None else "-" for b in BACKENDS]
        lines.append(f"| `{name}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def reset() -> None:
    """Forgets which backends loaded and what was chosen, for tests that change what is available."""
    for info in _registry.values():
        info._loaded.clear()
        info.forget()
    _preferences.cache_clear()
