# SPDX-License-Identifier: Apache-2.0
"""``lora_merge``: low-rank updates added to weights in place, all modules of a model at once."""

from __future__ import annotations

import inspect
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast import dispatch
from sdxl_fast.constraints import first_problem
from sdxl_fast.dispatch import OpInfo
from sdxl_fast.op import laid_out_like
from sdxl_fast.ops import _backends, _native
from sdxl_fast.ops._lora_rules import LISTS, RULES, RowsBelow, named
from sdxl_fast.reference import lora_merge as reference

Tensors = Sequence[torch.Tensor]
LEAD = "weights[0]"


def lora_merge(
    weights: Sequence[torch.Tensor],
    downs: Sequence[torch.Tensor],
    ups: Sequence[torch.Tensor],
    *,
    scales: float | Sequence[float] = 1.0,
    bases: Sequence[torch.Tensor] | None = None,
) -> None:
    """Adds ``scale * up @ down`` to every weight, in place: on a GPU one launch for any number of modules.

    The memory of the weights stays where it is, so CUDA graphs captured before remain valid. Undoing a merge by the
    opposite scale leaves the rounding of both behind; to swap LoRAs without drift, keep the original weights and
    pass them as ``bases``. No gradient; not to be part of a captured graph itself, which would merge at every replay.

    Args:
        weights: of linear layers or convolutions, [out, in] or [out, in, kh, kw], all float32, bfloat16, float16 or
            float64, contiguous or channels_last, none overlapping another. Written to.
        downs: for each weight the first factor, [rank, in] or [rank, in, kh, kw].
        ups: for each the second, [out, rank] or [out, rank, 1, 1]. All factors have one dtype: float32, bfloat16 or
            float16, whatever the weights', or float64 with float64.
        scales: strength times alpha / rank, one for all or one for each.
        bases: what to add to instead of the weights' own values: like the weights, which are only written then.

    Returns:
        None. Arithmetic is float32 (float64 for float64), rounded once.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.
        RuntimeError: while a CUDA graph is being captured.

    Source: Hu et al. 2021, section 4.1 (arXiv:2106.09685).
    """
    _OP(_values(weights, downs, ups, scales, bases))


def _values(weights: Any, downs: Any, ups: Any, scales: Any, bases: Any) -> dict[str, Any]:
    """Returns the arguments by name as the rules and backends take them: lists, the bases and scales spelled out."""
    values = {"weights": weights, "downs": downs, "ups": ups, "bases": weights if bases is None else bases}
    values = {name: list(v) if isinstance(v, list | tuple) else v for name, v in values.items()}
    count = len(values["weights"]) if isinstance(values["weights"], list) else 0
    values["scales"] = [scales] * count if isinstance(scales, int | float) else scales
    return values


def _in_order_of(weight: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Returns the first factor with its columns in the order in which the weight's lie in memory, copied if need be."""
    if weight.is_contiguous():
        return down.contiguous()
    return down.reshape(down.shape[0], *weight.shape[1:]).contiguous(memory_format=torch.channels_last)


def _table(weights: Tensors, bases: Tensors, downs: Tensors, ups: Tensors, scales: Sequence[float]) -> torch.Tensor:
    """Returns the bytes of as many ``sdxl_fast_lora_module``."""
    rows = bytearray()
    for weight, base, down, up, scale in zip(weights, bases, downs, ups, scales, strict=True):
        pointers = (weight.data_ptr(), base.data_ptr(), down.data_ptr(), up.data_ptr())
        sizes = (weight.shape[0], math.prod(weight.shape[1:]), down.shape[0], 0)
        rows += struct.pack("=4Q4qd", *pointers, *sizes, scale)
    return torch.frombuffer(rows, dtype=torch.uint8)


def _native_kernels(device: str) -> _backends.Functions:
    """Adapter from the raw signature to the C function of ``device``."""
    lib, name, tail = _native.binding(device), f"lora_merge_fwd_{device}", _native.TAIL[device]
    function = getattr(lib, name)

    def run(lead: torch.Tensor, factor_dtype: torch.dtype, table: torch.Tensor, count: int) -> None:
        codes = _native.DTYPE[lead.dtype], _native.DTYPE[factor_dtype], tail(lead)
        if device == "cpu":
            status = function(table.data_ptr(), count, *codes)
        else:
            tiles = lib.lora_merge_plan_cuda(table.data_ptr(), count)
            # Pinned, so that the copy waits for nothing; PyTorch keeps the memory until it is done.
            table = (table.pin_memory() if lead.is_cuda else table).to(lead.device, non_blocking=True)
            status = function(table.data_ptr(), count, tiles, *codes)
        if status:
            _native.fail(lib, status, name, lead)

    guarded = _native.guard(device, run)

    def fwd(weights: Tensors, bases: Tensors, downs: Tensors, ups: Tensors, scales: Sequence[float]) -> None:
        guarded(weights[0], downs[0].dtype, _table(weights, bases, downs, ups, scales), len(weights))

    return fwd, _backends.no_backward


def _capturing(lead: torch.Tensor) -> bool:
    return lead.is_cuda and torch.cuda.is_current_stream_capturing()


class _LoraMerge:
    """The op. Not a ``FusedOp``: it takes lists, writes to its arguments and returns nothing."""

    name = "lora_merge"
    parameters = ("weights", "bases", "downs", "ups", "scales")
    differentiable = 0
    rules = RULES
    backends = (
        _backends.native("cuda", LEAD, _native_kernels),
        _backends.triton("lora_merge", LEAD, RowsBelow(2**25)),
        _backends.native("cpu", LEAD, _native_kernels),
        _backends.eager(reference),
    )

    def __init__(self, public: Callable[..., Any]) -> None:
        signature = inspect.signature(public)

        def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ValueError(f"{self.name}: {error}") from None
            bound.apply_defaults()
            return self._with_lead(_values(**bound.arguments))

        self.info = OpInfo(self.name, LEAD, self.rules, self.backends, bind, lambda: None)
        dispatch.register(self.info)

    @staticmethod
    def _with_lead(values: dict[str, Any]) -> dict[str, Any]:
        """Adds the tensor whose device, dtype and size decide."""
        weights = values["weights"]
        given = isinstance(weights, list) and bool(weights) and isinstance(weights[0], torch.Tensor)
        return {**values, LEAD: weights[0] if given else torch.empty(0)}

    def __call__(self, values: dict[str, Any]) -> None:
        """Merges; ``values`` as ``_values`` makes them."""
        if torch.compiler.is_compiling():
            # Traced, the plain operations become part of the graph; addresses mean nothing there.
            reference.fwd(*(values[name] for name in self.parameters))
            return
        problem = first_problem(self.rules, values)
        if problem is not None:
            raise ValueError(f"{self.name}: {problem}")
        if not values["weights"]:
            return
        plain = all(type(t) in (torch.Tensor, torch.nn.Parameter) for _, t in named(values, *LISTS))
        if not plain or torch._C._len_torch_dispatch_stack():
            reference.fwd(*(values[name] for name in self.parameters))  # works on whatever behaves like a tensor
            return
        if _capturing(values["weights"][0]):
            raise RuntimeError(
                f"{self.name}: a CUDA graph is being captured, which would merge at every replay; merge before or after"
            )
        kernels = dispatch.select(self.info, self._with_lead(values))
        counts = dispatch.recorder()
        if counts is not None:
            counts[self.name, kernels.backend] += 1
        kernels.fwd(*self.prepare(values))
        # Autograd finds out this way that what it saved has been written to.
        torch.autograd.graph.increment_version([w for w in values["weights"] if not w.is_inference()])

    def prepare(self, values: dict[str, Any]) -> tuple[Any, ...]:
        """Returns the arguments of the raw function, dense and in one order of columns."""
        weights, bases = values["weights"], values["bases"]
        with torch.no_grad():
            bases = [laid_out_like(base, weight) for base, weight in zip(bases, weights, strict=True)]
            downs = [_in_order_of(weight, down) for weight, down in zip(weights, values["downs"], strict=True)]
            ups = [up.contiguous() for up in values["ups"]]
        return weights, bases, downs, ups, values["scales"]


_OP = _LoraMerge(lora_merge)
