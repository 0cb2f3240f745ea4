# SPDX-License-Identifier: Apache-2.0
"""``token_head``: normalisation, leaky ReLU, residual and projection of a discriminator's head over tokens, as one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_fast.constraints import (
    Condition,
    DeviceLike,
    DimBetween,
    Divides,
    Dtype,
    DtypeLike,
    Integer,
    IsTensor,
    Ndim,
    NonNegative,
    SameShape,
    ShapeFrom,
    Values,
)
from sdxl_fast.op import Args, FusedOp, MaybeTensor, reference_gradients
from sdxl_fast.ops import _backends, _native
from sdxl_fast.reference import token_head as reference
from sdxl_fast.reference._common import accumulation_dtype

_TENSORS = ("hidden", "residual", "weight", "bias", "direction", "offset")


def token_head(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    direction: torch.Tensor,
    offset: torch.Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
) -> torch.Tensor:
    """Returns a logit per token: what follows the k=9 convolution of ADD's heads.

    ``logit = direction . (residual + LeakyReLU(GroupNorm(hidden), 0.2)) + offset``, differentiable twice in all six
    tensors. The projection to 64 channels and its product with the mapped condition are one direction per sample:
    ``direction = mapped @ projection_weight``, ``offset = mapped @ projection_bias``.

    Args:
        hidden: [N,C,L] with L >= 1, float32, bfloat16, float16 or float64; contiguous, anything else is copied.
        residual: [N,C,L] in hidden's dtype.
        weight, bias: [C], of the normalisation; hidden's dtype, or float32 beside a 16-bit one (autocast).
        direction: [N,C], in such a dtype.
        offset: [N], in such a dtype.
        num_groups: G, divides C.
        eps: added to the (biased) variance.

    Returns:
        logits [N,L], float32 (float64 for float64), as is the arithmetic. Autocast does not change the dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: ADD section 3.2 (arXiv:2311.17042), after StyleGAN-T (arXiv:2301.09515).
    """
    logits: torch.Tensor = _OP(hidden, residual, weight, bias, direction, offset, num_groups, eps)[0]
    return logits


def _native_kernels(device: str) -> _backends.Functions:
    """Adapters from the raw signature to the C functions of ``device``."""
    lib = _native.binding(device)
    return _native.guard(device, _native_fwd(lib, device)), _native.guard(device, _native_bwd(lib, device))


def _native_fwd(lib: Any, device: str) -> Callable[..., reference.Outputs]:
    name = f"token_head_fwd_{device}"
    function, workspace_size = getattr(lib, name), getattr(lib, f"token_head_workspace_{device}")
    tail, pointer = _native.TAIL[device], _native.pointer

    def fwd(
        hidden: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        direction: torch.Tensor,
        offset: torch.Tensor,
        num_groups: int,
        eps: float,
    ) -> reference.Outputs:
        n, c, length = hidden.shape
        parameters = _native.alike(weight, bias, direction, offset)
        acc = accumulation_dtype(hidden.dtype)
        logits, mean = (hidden.new_empty((n, size), dtype=acc) for size in (length, num_groups))
        rstd = torch.empty_like(mean)
        workspace = _native.scratch(workspace_size(n, c, length, num_groups, 0), hidden)
        tensors = (hidden, residual, *parameters, logits, mean, rstd, workspace)
        dtypes = (_native.DTYPE[hidden.dtype], _native.DTYPE[parameters[0].dtype])
        status = function(*map(pointer, tensors), n, c, length, num_groups, eps, *dtypes, tail(hidden))
        if status:
            _native.fail(lib, status, name, hidden, residual, *parameters)
        return logits, mean, rstd

    return fwd


def _native_bwd(lib: Any, device: str) -> Callable[..., reference.Gradients]:
    name = f"token_head_bwd_{device}"
    function, workspace_size = getattr(lib, name), getattr(lib, f"token_head_workspace_{device}")
    tail, pointer = _native.TAIL[device], _native.pointer

    def bwd(
        hidden: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        direction: torch.Tensor,
        offset: torch.Tensor,
        dlogits: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        num_groups: int,
        needs: Sequence[bool],
    ) -> reference.Gradients:
        n, c, length = hidden.shape
        given = (hidden, residual, weight, bias, direction, offset)
        parameters = _native.alike(*given[2:])
        like = (hidden, residual, *parameters)
        found = [torch.empty_like(t) if need else None for t, need in zip(like, needs, strict=True)]
        workspace = _native.scratch(workspace_size(n, c, length, num_groups, 1), hidden)
        tensors = (*like[:5], dlogits, mean, rstd, *found, workspace)
        dtypes = (_native.DTYPE[hidden.dtype], _native.DTYPE[parameters[0].dtype])
        status = function(*map(pointer, tensors), n, c, length, num_groups, *dtypes, tail(hidden))
        if status:
            _native.fail(lib, status, name, hidden, residual, *parameters)
        return tuple(None if g is None else g.to(t.dtype) for g, t in zip(found, given, strict=True))

    return bwd


def _narrow_groups(values: Values) -> bool:
    return values["hidden"].shape[1] // values["num_groups"] <= 1024


class _TokenHead(FusedOp):
    name = "token_head"
    parameters = (*_TENSORS, "num_groups", "eps")
    fwd_schema = (
        "(Tensor hidden, Tensor residual, Tensor weight, Tensor bias, Tensor direction, Tensor offset, "
        "SymInt num_groups, float eps) -> (Tensor, Tensor, Tensor)"
    )
    bwd_schema = (
        "(Tensor hidden, Tensor residual, Tensor weight, Tensor bias, Tensor direction, Tensor offset, "
        "Tensor dlogits, Tensor mean, Tensor rstd, SymInt num_groups, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    rules = (
        *(IsTensor(arg) for arg in _TENSORS),
        Dtype("hidden", _backends.FLOATS),
        Ndim("hidden", 3, "[N,C,L]"),
        DimBetween("hidden", 1, "channels", least=1),
        DimBetween("hidden", 2, "tokens", least=1),
        SameShape("residual", "hidden"),
        DtypeLike("residual", "hidden"),
        Integer("num_groups"),
        Divides("num_groups", "hidden", 1),
        *(ShapeFrom(arg, "hidden", (1,), "[C]") for arg in ("weight", "bias")),
        ShapeFrom("direction", "hidden", (0, 1), "[N,C]"),
        ShapeFrom("offset", "hidden", (0,), "[N]"),
        *(DtypeLike(arg, "hidden", also=(torch.float32,)) for arg in _TENSORS[2:]),
        *(DeviceLike(arg, "hidden") for arg in _TENSORS[1:]),
        NonNegative("eps"),
    )
    backends = (
        _backends.native("cuda", "hidden", _native_kernels),
        _backends.triton("token_head", "hidden", Condition("a group must have at most 1024 channels", _narrow_groups)),
        _backends.native("cpu", "hidden", _native_kernels),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        return *(t.contiguous() for t in args[:6]), *args[6:]

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return *args[:6], *outputs[1:]

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        return *saved[:6], dy.contiguous(), *saved[6:], scalars[6], tuple(needs[:6])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, None, None

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        found = reference_gradients(lambda *t: reference.fwd(*t, *scalars[6:])[0], saved[:6], dy, needs[:6])
        return *found, None, None

    def forward_arguments(self, bwd_args: Args) -> Args:
        return *bwd_args[:6], bwd_args[9], 0.0

    def fake_fwd(self, args: Args) -> Any:
        hidden, num_groups = args[0], args[6]
        n, _, length = hidden.shape
        acc = accumulation_dtype(hidden.dtype)
        mean = hidden.new_empty((n, num_groups), dtype=acc)
        return hidden.new_empty((n, length), dtype=acc), mean, torch.empty_like(mean)

    def fake_bwd(self, bwd_args: Args) -> Any:
        tensors, needs = bwd_args[:6], bwd_args[10]
        return tuple(
            torch.empty_like(t) if need else tensors[0].new_empty(0) for t, need in zip(tensors, needs, strict=True)
        )


_OP = _TokenHead(token_head)
