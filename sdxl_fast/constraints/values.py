# SPDX-License-Identifier: Apache-2.0
"""Rules about plain arguments, and about which go together."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from .rule import Values, join


@dataclass(frozen=True)
class Integer:
    """``arg`` is a Python int in ``low <= arg < high``; with ``optional`` it may also be None."""

    arg: str
    low: int | None = None
    high: int | None = None
    optional: bool = False

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        if value is None and self.optional:
            return None
        if isinstance(value, bool) or not isinstance(value, int | torch.SymInt):
            return f"{self.describe()}, got {value!r}"
        if (self.low is not None and value < self.low) or (self.high is not None and value >= self.high):
            return f"{self.describe()}, got {value}"
        return None

    def describe(self) -> str:
        text = f"{self.arg} must be an int"
        if self.low is not None:
            text += f" >= {self.low}"
        if self.high is not None:
            text += f" and < {self.high}"
        return text + (" or None" if self.optional else "")


@dataclass(frozen=True)
class NonNegative:
    """``arg`` is a finite number >= 0; with ``optional`` it may also be None."""

    arg: str
    optional: bool = False

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        if value is None and self.optional:
            return None
        good = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
        return None if good else f"{self.describe()}, got {value!r}"

    def describe(self) -> str:
        return f"{self.arg} must be a finite number >= 0" + (" or None" if self.optional else "")


@dataclass(frozen=True)
class OneOf:
    """``arg`` is one of ``choices``."""

    arg: str
    choices: tuple[str, ...]

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        return None if value in self.choices else f"{self.describe()}, got {value!r}"

    def describe(self) -> str:
        return f"{self.arg} must be {join(repr(c) for c in self.choices)}"


@dataclass(frozen=True)
class Together:
    """``first`` and ``second`` are both given or both None."""

    first: str
    second: str

    def check(self, values: Values) -> str | None:
        if (values[self.first] is None) == (values[self.second] is None):
            return None
        missing = self.first if values[self.first] is None else self.second
        return f"{self.describe()}, got None only for {missing}"

    def describe(self) -> str:
        return f"{self.first} and {self.second} must both be given or both be None"


@dataclass(frozen=True)
class ExactlyOne:
    """Just one of ``first`` and ``second`` is given."""

    first: str
    second: str

    def check(self, values: Values) -> str | None:
        given = [values[self.first] is not None, values[self.second] is not None]
        if sum(given) == 1:
            return None
        return f"{self.describe()}, got {'both' if all(given) else 'neither'}"

    def describe(self) -> str:
        return f"exactly one of {self.first} and {self.second} must be given"
