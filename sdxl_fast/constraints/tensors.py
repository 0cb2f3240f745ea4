# SPDX-License-Identifier: Apache-2.0
"""Rules about tensors: kind, dtype, device, shape, gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .rule import Values, dtype_name, join


def _shape(tensor: torch.Tensor) -> str:
    return "[" + ", ".join(str(size) for size in tensor.shape) + "]"


@dataclass(frozen=True)
class IsTensor:
    """``arg`` is a tensor; with ``optional`` it may also be None."""

    arg: str
    optional: bool = False

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        if isinstance(value, torch.Tensor) or (self.optional and value is None):
            return None
        return f"{self.describe()}, got {type(value).__name__}"

    def describe(self) -> str:
        return f"{self.arg} must be a tensor" + (" or None" if self.optional else "")


@dataclass(frozen=True)
class Dtype:
    """``arg`` has one of ``dtypes``."""

    arg: str
    dtypes: tuple[torch.dtype, ...]

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        if value is None or value.dtype in self.dtypes:
            return None
        remedy = f"{self.arg}.to(torch.{dtype_name(self.dtypes[0])})"
        return f"{self.describe()}, got {dtype_name(value.dtype)}; convert it: {remedy}"

    def describe(self) -> str:
        return f"{self.arg} must be {join(dtype_name(d) for d in self.dtypes)}"


@dataclass(frozen=True)
class DtypeLike:
    """``arg`` has the dtype of ``other``, or one of ``also`` (never for a float64 ``other``)."""

    arg: str
    other: str
    also: tuple[torch.dtype, ...] = ()

    def check(self, values: Values) -> str | None:
        value, other = values[self.arg], values[self.other]
        if value is None or value.dtype == other.dtype:
            return None
        if value.dtype in self.also and other.dtype != torch.float64:
            return None
        return (
            f"{self.describe()}; got {self.arg} {dtype_name(value.dtype)} with {self.other} "
            f"{dtype_name(other.dtype)}; convert it: {self.arg}.to({self.other}.dtype)"
        )

    def describe(self) -> str:
        also = "".join(f" or be {dtype_name(d)}" for d in self.also)
        return f"{self.arg} must have the dtype of {self.other}{also}"


@dataclass(frozen=True)
class DeviceLike:
    """``arg`` lies on the device of ``other``."""

    arg: str
    other: str

    def check(self, values: Values) -> str | None:
        value, other = values[self.arg], values[self.other]
        if value is None or value.device == other.device:
            return None
        return (
            f"{self.describe()}; got {self.arg} on {value.device} and {self.other} on {other.device}; "
            f"move it: {self.arg}.to({self.other}.device)"
        )

    def describe(self) -> str:
        return f"{self.arg} must be on the device of {self.other}"


@dataclass(frozen=True)
class DeviceType:
    """``arg`` lies on a device of type ``kind`` (``"cpu"``, ``"cuda"``)."""

    arg: str
    kind: str

    def check(self, values: Values) -> str | None:
        device = values[self.arg].device
        return None if device.type == self.kind else f"{self.describe()}, got one on {device}"

    def describe(self) -> str:
        return f"{self.arg} must be a {self.kind} tensor"


@dataclass(frozen=True)
class Ndim:
    """``arg`` has ``ndim`` dimensions, called ``layout`` in messages; ``at_least`` allows more."""

    arg: str
    ndim: int
    layout: str
    at_least: bool = False

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        if value is None or value.ndim == self.ndim or (self.at_least and value.ndim > self.ndim):
            return None
        return f"{self.describe()}, got shape {_shape(value)}"

    def describe(self) -> str:
        plural = "dimension" if self.ndim == 1 else "dimensions"
        return f"{self.arg} must have {'at least ' if self.at_least else ''}{self.ndim} {plural} {self.layout}"


@dataclass(frozen=True)
class ShapeFrom:
    """``arg`` has the shape made of the dimensions ``dims`` of ``other``, called ``layout`` in messages."""

    arg: str
    other: str
    dims: tuple[int, ...]
    layout: str

    def check(self, values: Values) -> str | None:
        value, other = values[self.arg], values[self.other]
        if value is None:
            return None
        expected = [other.shape[dim] for dim in self.dims]
        if list(value.shape) == expected:
            return None
        return f"{self.describe()} = {expected}, got {_shape(value)}"

    def describe(self) -> str:
        return f"{self.arg} must have shape {self.layout} of {self.other}"


@dataclass(frozen=True)
class SameShape:
    """``arg`` has the shape of ``other``."""

    arg: str
    other: str

    def check(self, values: Values) -> str | None:
        value, other = values[self.arg], values[self.other]
        if value is None or value.shape == other.shape:
            return None
        return f"{self.describe()} {_shape(other)}, got {_shape(value)}"

    def describe(self) -> str:
        return f"{self.arg} must have the shape of {self.other}"


@dataclass(frozen=True)
class DimsLike:
    """``arg`` has the sizes of ``other`` in the dimensions ``dims``, called ``layout`` in messages."""

    arg: str
    other: str
    dims: tuple[int, ...]
    layout: str

    def check(self, values: Values) -> str | None:
        value, other = values[self.arg], values[self.other]
        if value.ndim == other.ndim and all(value.shape[dim] == other.shape[dim] for dim in self.dims):
            return None
        return f"{self.describe()}; got {self.arg} {_shape(value)} with {self.other} {_shape(other)}"

    def describe(self) -> str:
        return f"{self.arg} must have the sizes {self.layout} of {self.other}"


@dataclass(frozen=True)
class Sizes:
    """``arg`` has the shape ``layout``, whose sizes ``expected(values)`` gives, None standing for any positive size."""

    arg: str
    layout: str
    expected: Callable[[Values], tuple[int | None, ...]]

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        if value is None:
            return None
        expected = self.expected(values)
        if value.ndim == len(expected) and all(
            size > 0 if wanted is None else size == wanted for size, wanted in zip(value.shape, expected, strict=True)
        ):
            return None
        sizes = ", ".join("any" if size is None else str(size) for size in expected)
        return f"{self.describe()} = [{sizes}], got {_shape(value)}"

    def describe(self) -> str:
        return f"{self.arg} must have shape {self.layout}"


@dataclass(frozen=True)
class EvenLast:
    """The last dimension of ``arg`` is even."""

    arg: str

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        return None if value.shape[-1] % 2 == 0 else f"{self.describe()}, got shape {_shape(value)}"

    def describe(self) -> str:
        return f"the last dimension of {self.arg} must be even"


@dataclass(frozen=True)
class LastAtMost:
    """The last dimension of ``arg`` is at most ``most``."""

    arg: str
    most: int

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        return None if value.shape[-1] <= self.most else f"{self.describe()}, got shape {_shape(value)}"

    def describe(self) -> str:
        return f"the last dimension of {self.arg} must be at most {self.most}"


@dataclass(frozen=True)
class LastMultiple:
    """The last dimension of ``arg`` is a multiple of ``of``."""

    arg: str
    of: int

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        return None if value.shape[-1] % self.of == 0 else f"{self.describe()}, got shape {_shape(value)}"

    def describe(self) -> str:
        return f"the last dimension of {self.arg} must be a multiple of {self.of}"


@dataclass(frozen=True)
class DimBetween:
    """Dimension ``dim`` of ``arg``, called ``what`` in messages, lies in ``least`` to ``most`` (no limit if None)."""

    arg: str
    dim: int
    what: str
    least: int = 0
    most: int | None = None

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        size = value.shape[self.dim]
        if size >= self.least and (self.most is None or size <= self.most):
            return None
        return f"{self.describe()}, got shape {_shape(value)}"

    def describe(self) -> str:
        limits = [f"at least {self.least}"] if self.least else []
        limits += [f"at most {self.most}"] if self.most is not None else []
        return f"{self.arg} must have {' and '.join(limits)} {self.what} (dimension {self.dim})"


@dataclass(frozen=True)
class Divides:
    """The integer ``arg`` is positive and divides dimension ``dim`` of ``other``, or of it and ``beside`` together."""

    arg: str
    other: str
    dim: int
    beside: str | None = None

    def check(self, values: Values) -> str | None:
        beside = None if self.beside is None else values[self.beside]
        value, size = values[self.arg], values[self.other].shape[self.dim]
        size += 0 if beside is None else beside.shape[self.dim]
        if value > 0 and size % value == 0:
            return None
        return f"{self.describe()}, got {self.arg}={value} for {size} channels"

    def describe(self) -> str:
        beside = "" if self.beside is None else f" (and {self.beside})"
        return f"{self.arg} must be positive and divide dimension {self.dim} of {self.other}{beside}"


@dataclass(frozen=True)
class NoGradient:
    """``arg`` does not require grad, because the op has no derivative for it."""

    arg: str

    def check(self, values: Values) -> str | None:
        value = values[self.arg]
        if value is None or not (value.requires_grad and torch.is_grad_enabled()):
            return None
        return f"{self.describe()}; detach it: {self.arg}.detach()"

    def describe(self) -> str:
        return f"no gradient is defined for {self.arg}, which requires grad"
