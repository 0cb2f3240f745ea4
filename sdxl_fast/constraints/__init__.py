# SPDX-License-Identifier: Apache-2.0
"""Rules about the arguments of an op, as data that can check themselves and describe themselves.

An op lists its rules beside its definition, twice: the rules every call must satisfy (breaking one is a
:class:`ValueError`) and, per backend, the rules that backend adds (breaking one means that backend is not used).
A rule is a frozen dataclass: ``check(values)`` returns ``None`` or one sentence that names the argument, what came,
what is allowed and, where there is one, the remedy; ``describe()`` states the rule itself. ``values`` maps argument
names to what the caller passed. A rule about an absent (``None``) argument holds unless the rule says otherwise.
"""

from .rule import Condition, Rule, Values, dtype_name, first_problem, join
from .tensors import (
    DeviceLike,
    DeviceType,
    DimBetween,
    DimsLike,
    Divides,
    Dtype,
    DtypeLike,
    EvenLast,
    IsTensor,
    LastAtMost,
    LastMultiple,
    Ndim,
    NoGradient,
    SameShape,
    ShapeFrom,
    Sizes,
)
from .values import ExactlyOne, Integer, NonNegative, OneOf, Together

__all__ = [
    "Condition",
    "DeviceLike",
    "DeviceType",
    "DimBetween",
    "DimsLike",
    "Divides",
    "Dtype",
    "DtypeLike",
    "EvenLast",
    "ExactlyOne",
    "Integer",
    "IsTensor",
    "LastAtMost",
    "LastMultiple",
    "Ndim",
    "NoGradient",
    "NonNegative",
    "OneOf",
    "Rule",
    "SameShape",
    "ShapeFrom",
    "Sizes",
    "Together",
    "Values",
    "dtype_name",
    "first_problem",
    "join",
]
