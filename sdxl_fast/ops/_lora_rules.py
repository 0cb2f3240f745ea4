# SPDX-License-Identifier: Apache-2.0
"""What a call of ``lora_merge`` must satisfy: lists of one length, alike, of shapes that fit, apart in memory."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from sdxl_fast.constraints import Rule, Values, dtype_name, join

LISTS = ("weights", "bases", "downs", "ups")
FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def named(values: Values, *lists: str) -> Iterator[tuple[str, torch.Tensor]]:
    for name in lists:
        for i, tensor in enumerate(values[name]):
            yield f"{name}[{i}]", tensor


@dataclass(frozen=True)
class Lists:
    """The lists hold a tensor, and the scales a number, for each weight."""

    def check(self, values: Values) -> str | None:
        for name in LISTS:
            if not isinstance(values[name], list):
                return f"{name} must be a list of tensors, got {type(values[name]).__name__}"
            if len(values[name]) != len(values["weights"]):
                return f"{name} must be as many as weights, {len(values['weights'])}, got {len(values[name])}"
        for name, tensor in named(values, *LISTS):
            if not isinstance(tensor, torch.Tensor):
                return f"{name} must be a tensor, got {type(tensor).__name__}"
        scales = values["scales"]
        if not isinstance(scales, list | tuple) or len(scales) != len(values["weights"]):
            return f"scales must be a number or a list of {len(values['weights'])} numbers, got {scales!r}"
        for i, scale in enumerate(scales):
            if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
                return f"scales[{i}] must be a finite number, got {scale!r}"
        return None

    def describe(self) -> str:
        return "weights, downs, ups and bases must be lists of as many tensors, scales a number for each"


@dataclass(frozen=True)
class Alike:
    """The tensors of ``lists`` have one of ``dtypes``, all the same, and lie on one device with the weights."""

    lists: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]

    def check(self, values: Values) -> str | None:
        expected: tuple[str, torch.Tensor] | None = None
        for name, tensor in named(values, *self.lists):
            if expected is None:
                expected = name, tensor
                if tensor.dtype not in self.dtypes:
                    allowed = join(dtype_name(d) for d in self.dtypes)
                    return f"{name} must be {allowed}, got {dtype_name(tensor.dtype)}; convert it: {name}.float()"
            first, alike = expected
            if tensor.dtype != alike.dtype:
                wanted, got = dtype_name(alike.dtype), dtype_name(tensor.dtype)
                return (
                    f"{name} must have the dtype of {first}, {wanted}, got {got}; "
                    f"convert it: {name}.to(torch.{wanted}), or merge each dtype in a call of its own"
                )
            device = values["weights"][0].device
            if tensor.device != device:
                where = f"{device}, got {tensor.device}"
                return f"{name} must be on the device of weights[0], {where}; move it: {name}.to(weights[0].device)"
        return None

    def describe(self) -> str:
        return f"{' and '.join(self.lists)} must be {join(dtype_name(d) for d in self.dtypes)}, all alike"


@dataclass(frozen=True)
class Float64Alone:
    """float64 factors go with float64 weights, and no others with either."""

    def check(self, values: Values) -> str | None:
        kinds = {name: values[name][0].dtype for name in ("weights", "downs") if values[name]}
        if len({dtype == torch.float64 for dtype in kinds.values()}) < 2:
            return None
        got = " and ".join(f"{name} {dtype_name(dtype)}" for name, dtype in kinds.items())
        return f"{self.describe()}, got {got}; convert one of them"

    def describe(self) -> str:
        return "weights and factors must both be float64 or neither"


@dataclass(frozen=True)
class Shapes:
    """Factors fit their weights, and weights are dense."""

    def check(self, values: Values) -> str | None:
        for i, (weight, base, down, up) in enumerate(zip(*(values[name] for name in LISTS), strict=True)):
            if weight.ndim < 2:
                return f"weights[{i}] must have at least 2 dimensions [out, in, ...], got shape {list(weight.shape)}"
            if base.shape != weight.shape:
                return f"bases[{i}] must have the shape of its weight {list(weight.shape)}, got {list(base.shape)}"
            if down.ndim < 2 or math.prod(down.shape[1:]) != math.prod(weight.shape[1:]):
                expected = ", ".join(map(str, weight.shape[1:]))
                return f"downs[{i}] must have shape [rank, {expected}], got {list(down.shape)}"
            rank, rows = down.shape[0], weight.shape[0]
            if up.ndim < 2 or up.shape[:2] != (rows, rank) or math.prod(up.shape[2:]) != 1:
                return f"ups[{i}] must have shape [{rows}, {rank}] = [out, rank], got {list(up.shape)}"
            if not weight.is_contiguous() and not channels_last(weight):
                return (
                    f"weights[{i}] must be contiguous or channels_last to be written in place, got strides "
                    f"{list(weight.stride())}; merge into a contiguous copy"
                )
        return None

    def describe(self) -> str:
        return "each weight must be dense, its down [rank, in, ...] and its up [out, rank]"


@dataclass(frozen=True)
class WithoutGraph:
    """Nothing that requires grad while a graph is recorded: writing in place would not be part of it."""

    def check(self, values: Values) -> str | None:
        if torch.is_grad_enabled():
            for name, tensor in named(values, *LISTS):
                if tensor.requires_grad:
                    return f"{name} requires grad, and {self.describe()}; call it under torch.no_grad()"
        return None

    def describe(self) -> str:
        return "merging has no derivative"


@dataclass(frozen=True)
class Apart:
    """No weight shares memory with another tensor of the call, but its own base may be the weight."""

    def check(self, values: Values) -> str | None:
        if not values["weights"] or not _has_memory(values["weights"][0]):
            return None
        spans = sorted((*_span(t), name) for name, t in named(values, "weights") if t.numel())
        for (_, end, name), (start, _, other) in itertools.pairwise(spans):
            if start < end:
                return f"{name} and {other} share memory; merge them in calls of their own"
        starts = [start for start, _, _ in spans]
        for i, (name, tensor) in enumerate(named(values, "bases", "downs", "ups")):
            if i < len(values["weights"]) and _same_memory(tensor, values["weights"][i]):
                continue
            begin, end = _span(tensor)
            last = bisect.bisect_left(starts, end) - 1
            if tensor.numel() and last >= 0 and spans[last][1] > begin:
                return f"{name} shares memory with {spans[last][2]}, which is written; pass a copy: {name}.clone()"
        return None

    def describe(self) -> str:
        return "no weight may share memory with another tensor of the call"


def _has_memory(tensor: torch.Tensor) -> bool:
    return tensor.device.type != "meta" and type(tensor) in (torch.Tensor, torch.nn.Parameter)


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """Returns the first address of the tensor and the one behind its last element."""
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    start = tensor.data_ptr()
    return start, start + (reach + 1) * tensor.element_size()


def _same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.stride() == b.stride())


def channels_last(weight: torch.Tensor) -> bool:
    return weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class RowsBelow:
    """Rows of weights and factors have fewer than ``limit`` elements."""

    limit: int

    def check(self, values: Values) -> str | None:
        for name, tensor in named(values, "weights", "ups"):
            if math.prod(tensor.shape[1:]) >= self.limit:
                return f"{self.describe()}, got {name} of shape {list(tensor.shape)}"
        return None

    def describe(self) -> str:
        return f"weights and ups must have fewer than {self.limit} elements in a row"


RULES: tuple[Rule, ...] = (
    Lists(),
    Alike(("weights", "bases"), FLOATS),
    Alike(("downs", "ups"), FLOATS),
    Float64Alone(),
    Shapes(),
    WithoutGraph(),
    Apart(),
)
