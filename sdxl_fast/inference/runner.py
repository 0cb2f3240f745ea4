"""Packed code in a network's place: kept up to date with the weights, replayed as a CUDA graph where there is a GPU.

A runner belongs to one network. It hands out the packed program when that computes what the network's modules would,
and otherwise the reason why not, in which case the modules themselves run: slower, never wrong.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from ..nn import FuseReport
from .float8 import Scales
from .graphs import GraphCache, Stage, through
from .packing import NotPackableError
from .watch import Change, Watch


class Program(Protocol):
    """What a runner keeps: packed code that can be told that weights changed."""

    dtype: torch.dtype
    device: torch.device

    def refresh(self) -> None:
        """Forget or make again what was computed from weights."""


P = TypeVar("P", bound=Program)

SLOT = "_sdxl_fast_runner"
"""Attribute of a network under which its runner is kept."""


@dataclass(slots=True)
class Use:
    """How a network's calls ran: packed, and by its own modules with the reasons."""

    packed: int = 0
    modules: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        lines = [f"{self.packed} calls packed"]
        return "\n".join(lines + [f"{count} calls by its modules: {why}" for why, count in self.modules.items()])


class Runner(Generic[P]):
    """The packed program of one network.

    Args:
        network: the module.
        build: makes the program, or raises NotPackableError.
        facts: what else decides how the network computes; see `Watch`.
        graphs: None runs without CUDA graphs.
    """

    def __init__(
        self,
        network: nn.Module,
        build: Callable[[Any], P],
        *,
        facts: Callable[[], Hashable] = lambda: None,
        graphs: GraphCache | None = None,
    ) -> None:
        self.network = network
        self.graphs = graphs
        self.use = Use()
        self.fusion = FuseReport()
        self.was_contiguous = False
        self._build = build
        self._program: P | None = None
        self._reason = ""
        self.scales: Scales | None = None
        self.place: tuple[torch.dtype, torch.device] | None = None
        self._made = 0
        self._make()
        self._watch = Watch(network, facts=facts)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copied network has weights of its own, which nobody packed: its modules run."""
        return None

    @property
    def program(self) -> P | None:
        """The program as of the last call."""
        return self._program

    @property
    def reason(self) -> str:
        """Why there is no program; empty if there is one."""
        return self._reason

    def touch(self) -> None:
        """Say that weights changed without leaving a trace, as a write through `.data` does."""
        self._watch.touch()

    def ready(self) -> P | None:
        """The program, made again if the network has changed under it; None if the modules have to run."""
        change = self._watch.look()
        if change is Change.STRUCTURE:
            if self.graphs is not None and len(self.graphs):
                warnings.warn(
                    f"weights of {type(self.network).__name__} have moved or been replaced since its CUDA graphs were "
                    "captured; they are captured again",
                    RuntimeWarning,
                    stacklevel=4,
                )
                self.graphs.clear()
            self._make()
            self._watch.look()  # packing moves weights too
        elif change is Change.VALUES and self._program is not None:
            self._program.refresh()
        return self._program

    def quantise(self, scales: Scales | None) -> None:
        """Have the program compute in float8, now and whenever it is made again; None takes it back."""
        program: Any = self._program
        program.quantise(scales)
        self.scales = scales
        self._made += 1
        if self.graphs is not None:
            self.graphs.clear()

    @property
    def identity(self) -> Hashable:
        """Stands for the program and the addresses of all weights: what a CUDA graph was captured with."""
        return self._made, self._watch.identity

    def run(self, name: str, stage: Stage, inputs: tuple[Tensor, ...]) -> Tensor:
        """A stage of the program, through a graph where there are graphs; the first input is what it is applied to."""
        return through(self.graphs, name, stage, inputs, self.identity, size=inputs[0].nbytes)

    def by_modules(self, reason: str) -> None:
        """Note that a call goes to the modules."""
        self.use.modules[reason] += 1

    def _make(self) -> None:
        self._program, self._reason = None, ""
        self._made += 1
        try:
            self._program = self._build(self.network)
            if self.scales is not None:
                program: Any = self._program
                program.quantise(self.scales)
            self.place = (self.network.dtype, self.network.device)  # type: ignore[assignment]
        except NotPackableError as reason:
            self._reason = str(reason)


def runner_of(network: Any) -> Runner[Any] | None:
    """The runner that `accelerated.attach` made for a network; None if there is none."""
    found: Runner[Any] | None = getattr(network, "__dict__", {}).get(SLOT)
    return found


def refusal(network: nn.Module, program: Program, sample: Tensor, given: dict[str, Any]) -> str | None:
    """Why this call is none for packed code; None if it is one.

    Args:
        network: in training mode it may drop out.
        program: its packed code.
        sample: what it is applied to.
        given: arguments that packed code does not know, by name; any that is not empty refuses.
    """
    for name, value in given.items():
        if value is not None and not (isinstance(value, dict | list | tuple) and not value):
            return f"{name} was given"
    if torch.is_grad_enabled():
        return "gradients are recorded"
    if network.training:
        return "it is in training mode"
    if torch.compiler.is_compiling():
        return "it is being compiled"
    if torch.is_autocast_enabled(sample.device.type):
        return "autocast is on"
    if sample.device != program.device:
        return f"the input is on {sample.device}, the weights on {program.device}"
    return None


def tensors(values: Sequence[Any]) -> bool:
    """Whether all are tensors."""
    return all(isinstance(value, Tensor) for value in values)
