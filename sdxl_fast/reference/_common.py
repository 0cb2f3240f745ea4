# SPDX-License-Identifier: Apache-2.0
"""What the reference modules share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch

FLOAT8 = torch.float8_e4m3fn


class Wrong(NamedTuple):
    """A deliberately wrong variant of one function of an op."""

    of: str  # "fwd" or "bwd"
    function: Callable[..., Any]


def wrong_variants(**variants: Mapping[str, Callable[..., Any]]) -> dict[str, Wrong]:
    """Returns ``{name: Wrong(of, function)}`` from ``fwd={name: function}, bwd={...}``."""
    return {name: Wrong(of, function) for of, named in variants.items() for name, function in named.items()}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype an op computes in: float64 for float64, float32 for everything lower."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantise(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Returns x / scale in float8_e4m3fn, rounded to nearest even; beyond its largest number, 448, that number.

    Args:
        x: any shape, any float dtype.
        scale: float32, one element; the largest magnitude that is to survive, divided by 448. x is multiplied by its
            reciprocal in float32, as in the kernels: exactly the quotient for a power of two.
    """
    largest = torch.finfo(FLOAT8).max
    return (x.float() * scale.to(x.device).reciprocal()).clamp_(-largest, largest).to(FLOAT8)


def rounded(y: torch.Tensor, scale_y: torch.Tensor | None) -> torch.Tensor:
    """Returns what an op gives that computed y: y itself, or with a scale y in float8."""
    return y if scale_y is None else quantise(y, scale_y)


def itemsize(dtype: torch.dtype) -> int:
    """Returns bytes per element."""
    return torch.empty((), dtype=dtype).element_size()


def without_autocast(x: torch.Tensor) -> AbstractContextManager[None]:
    """Returns a context in which matrix products and convolutions on the device of x keep the dtypes they are given."""
    kind = x.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def autocast(x: torch.Tensor, *others: torch.Tensor | None) -> tuple[Any, ...]:
    """Returns x and others as a matrix product of x takes them: in autocast's dtype where that is on, else unchanged.

    As there, float64 stays what it is; so does what is no tensor, for the rules to name.
    """
    kind = x.device.type if isinstance(x, torch.Tensor) and x.dtype.itemsize > 1 else "meta"
    if kind == "meta" or x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return x, *others
    if not torch.is_autocast_enabled(kind):
        return x, *others
    dtype = torch.get_autocast_dtype(kind)
    return tuple(t.to(dtype) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in (x, *others))
