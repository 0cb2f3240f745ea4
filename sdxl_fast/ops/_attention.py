# SPDX-License-Identifier: Apache-2.0
"""What the attention ops share: the raw signature, the rules, what is saved, and the glue to autograd."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch

from sdxl_fast.constraints import (
    DeviceLike,
    DimBetween,
    DimsLike,
    Dtype,
    DtypeLike,
    IsTensor,
    Ndim,
    NonNegative,
    Rule,
    SameShape,
)
from sdxl_fast.op import Args, FusedOp, MaybeTensor, reference_gradients
from sdxl_fast.ops import _backends
from sdxl_fast.reference._common import accumulation_dtype


def rules(layout: str) -> tuple[Rule, ...]:
    """Returns the rules of an attention op; ``layout`` is that of q, with S in second place: "[N,S,H,D]"."""
    names = layout.strip("[]").split(",")
    others = tuple(dim for dim in range(len(names)) if dim != 1)
    kept = "[" + ",".join(names[dim] for dim in others) + "]"
    return (
        *(IsTensor(arg) for arg in ("q", "k", "v")),
        Dtype("q", _backends.FLOATS),
        Ndim("q", len(names), layout),
        DimBetween("q", len(names) - 1, "channels", least=1),
        *(DtypeLike(arg, "q") for arg in ("k", "v")),
        *(DeviceLike(arg, "q") for arg in ("k", "v")),
        DimsLike("k", "q", others, kept),
        SameShape("v", "k"),
        DimBetween("k", 1, "tokens", least=1),
        NonNegative("scale", optional=True),
    )


def _rows(t: torch.Tensor) -> torch.Tensor:
    """Returns t itself where the channels lie side by side, as in any slice of a projection, else a copy."""
    return t if t.stride(-1) == 1 else t.contiguous()


class Attention(FusedOp):
    """Base of the three ops; a subclass has a name, the layout of q, the reference and the backends.

    The raw forward returns out and the log-sum-exp of each query's scaled scores, in natural units, from which the
    backward makes the probabilities again.
    """

    parameters = ("q", "k", "v", "scale")
    fwd_schema = "(Tensor q, Tensor k, Tensor v, float? scale) -> (Tensor, Tensor)"
    bwd_schema = (
        "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, float? scale, bool[] needs) "
        "-> (Tensor, Tensor, Tensor)"
    )
    reference: ClassVar[ModuleType]

    def prepare(self, args: Args) -> Args:
        *tensors, scale = args
        return *(_rows(t) for t in tensors), scale

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return *args[:3], *outputs

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        return _rows(dy), *saved, scalars[3], tuple(needs[:3])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, None

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.reference.fwd(q, k, v, scalars[3])[0]
            return out

        return *reference_gradients(forward, saved[:3], dy, needs[:3]), None

    def forward_arguments(self, bwd_args: Args) -> Args:
        _, q, k, v, _, _, scale, _ = bwd_args
        return q, k, v, scale

    def fake_fwd(self, args: Args) -> Any:
        q = args[0]
        lse = q.new_empty((q.shape[0], *q.shape[2:-1], q.shape[1]), dtype=accumulation_dtype(q.dtype))
        return q.new_empty(q.shape), lse

    def fake_bwd(self, bwd_args: Args) -> Any:
        _, *tensors, _, _, _, needs = bwd_args
        return tuple(t.new_empty(t.shape if need else 0) for t, need in zip(tensors, needs, strict=True))
