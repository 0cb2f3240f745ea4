# SPDX-License-Identifier: Apache-2.0
"""What a rule is, how it speaks, and the first one that is broken."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Values = Mapping[str, Any]


class Rule(Protocol):
    """What every rule offers."""

    def check(self, values: Values) -> str | None:
        """Returns the problem in one sentence, or ``None`` when the rule holds."""
        ...

    def describe(self) -> str:
        """Returns the rule itself in words."""
        ...


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def join(names: Iterable[str]) -> str:
    """Returns ``"a, b or c"``."""
    listed = list(names)
    return listed[0] if len(listed) == 1 else f"{', '.join(listed[:-1])} or {listed[-1]}"


@dataclass(frozen=True)
class Condition:
    """A rule given as a function of the values, for what the classes above cannot say."""

    text: str
    holds: Callable[[Values], bool]

    def check(self, values: Values) -> str | None:
        return None if self.holds(values) else self.text

    def describe(self) -> str:
        return self.text


def first_problem(rules: Iterable[Rule], values: Values) -> str | None:
    """Returns the sentence of the first broken rule, or ``None``."""
    for rule in rules:
        problem = rule.check(values)
        if problem is not None:
            return problem
    return None
