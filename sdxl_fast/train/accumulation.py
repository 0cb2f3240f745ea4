"""Gradients gathered over micro-batches."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from . import distributed
from .bench import Bench
from .interruptions import STOP, StepAbandonedError
from .trainer import Task, Update


class AccumulatingTask(Task):
    """A task whose batches come from a `Bench`, in micro-batches."""

    bench: Bench[Any]

    def reading_ahead(self) -> AbstractContextManager[None]:
        return self.bench.reading_ahead()

    def gather(
        self, update: Update, loss: Callable[[], tuple[Tensor, dict[str, Tensor]]], *, moved: bool = False
    ) -> dict[str, Tensor]:
        """Adds up the gradients of this process's micro-batches; the means of what they have to log.

        Args:
            update: of the network that the gradients are for.
            loss: the loss of the micro-batch that the bench stands at, and what to log of it.
            moved: this step has moved another network already, so that it must go through to its end.

        Raises:
            StepAbandonedError: a process was told to stop between two micro-batches and nothing has moved yet.
        """
        facts: list[dict[str, Tensor]] = []
        for _ in self.bench.shares():
            if facts and not moved and distributed.agreed(STOP.set):
                update.optimizer.zero_grad(set_to_none=True)
                raise StepAbandonedError
            value, fact = loss()
            (value / self.bench.config.accumulate).backward()  # type: ignore[no-untyped-call]
            facts.append(fact)
        return {name: torch.stack([fact[name] for fact in facts]).mean() for name in facts[0]}
