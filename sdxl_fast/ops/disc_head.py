# SPDX-License-Identifier: Apache-2.0
"""``disc_head``: a discriminator's last normalisation, activation and projection, its logits and their loss, as one."""

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
    OneOf,
    ShapeFrom,
    Sizes,
    Values,
)
from sdxl_fast.dispatch import Backend, any_backend
from sdxl_fast.op import Args, FusedOp, Incoming, MaybeTensor, dense, reference_gradients
from sdxl_fast.ops import _backends, _native
from sdxl_fast.ops.group_norm_silu import _OP as GROUP_NORM_SILU
from sdxl_fast.reference import disc_head as reference
from sdxl_fast.reference._common import accumulation_dtype

_TENSORS = ("x", "weight", "bias", "projection", "offset")


def disc_head(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    *,
    num_groups: int,
    eps: float = 1e-5,
    loss: str = "non_saturating_real",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits of maps and the loss of each: what follows the last strided convolution of the head.

    ``logit = mean over positions of projection . SiLU(GroupNorm(x)) + offset``. Both results are differentiable twice
    in all five tensors; the loss's own slope is part of the backward.

    Args:
        x: [N,C,H,W] with H*W >= 1, float32, bfloat16, float16 or float64; contiguous or channels_last, anything else
            is copied. Made for the one position (or few) that the convolutions leave.
        weight, bias: [C], of the normalisation; x's dtype, or float32 beside a 16-bit x (autocast).
        projection: [C], of the 1x1 convolution to one channel, in such a dtype.
        offset: [1], its bias, in such a dtype.
        num_groups: G, divides C.
        eps: added to the (biased) variance.
        loss: ``"non_saturating_real"`` or ``"hinge_real"`` for maps that are to be judged real,
            ``"non_saturating_fake"`` or ``"hinge_fake"`` for those to be judged fake; a student that wants its own
            judged real takes ``"non_saturating_real"`` or ``"hinge_student"``.

    Returns:
        logits [N] and losses [N], both float32 (float64 for float64), as is the arithmetic: x is rounded nowhere.
        Autocast does not change the dtype.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: SDXL-Lightning, section 3.3 and eq. 19-20 (arXiv:2402.13929); hinge: ADD, eq. 2-3 (arXiv:2311.17042).
    """
    logits, losses, *_ = _OP(x, weight, bias, projection, offset, num_groups, eps, loss)
    return logits, losses


# Codes of the C ABI, by the kinds of the reference.
_LOSS = {"non_saturating": 0, "hinge": 1, "linear": 2}


def _native_kernels(device: str) -> _backends.Functions:
    """Adapters from the raw signature to the C functions of ``device``."""
    lib = _native.binding(device)
    return _native.guard(device, _native_fwd(lib, device)), _native.guard(device, _native_bwd(lib, device))


def _codes(x: torch.Tensor, parameters: Sequence[torch.Tensor], loss: str) -> tuple[int, ...]:
    kind, sign = reference.LOSSES[loss]
    dtypes = (_native.DTYPE[x.dtype], _native.DTYPE[parameters[0].dtype])
    return _LOSS[kind], int(sign > 0), _native.layout(x), *dtypes


def _native_fwd(lib: Any, device: str) -> Callable[..., reference.Outputs]:
    name = f"disc_head_fwd_{device}"
    function, tail = getattr(lib, name), _native.TAIL[device]

    def fwd(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        projection: torch.Tensor,
        offset: torch.Tensor,
        num_groups: int,
        eps: float,
        loss: str,
    ) -> reference.Outputs:
        n, c, h, w = x.shape
        parameters = _native.alike(weight, bias, projection, offset)
        logits, pooled, mean = (x.new_empty(s, dtype=torch.float32) for s in ((n,), (n, c), (n, num_groups)))
        found = (logits, torch.empty_like(logits), pooled, mean, torch.empty_like(mean))
        pointers = (t.data_ptr() for t in (x, *parameters, *found))
        status = function(*pointers, n, c, h * w, num_groups, eps, *_codes(x, parameters, loss), tail(x))
        if status:
            _native.fail(lib, status, name, x, *parameters)
        return found

    return fwd


def _native_bwd(lib: Any, device: str) -> Callable[..., reference.Gradients]:
    name = f"disc_head_bwd_{device}"
    function, workspace_size = getattr(lib, name), getattr(lib, f"disc_head_workspace_{device}")
    tail, pointer = _native.TAIL[device], _native.pointer

    def bwd(
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        projection: torch.Tensor,
        offset: torch.Tensor,
        dlogits: torch.Tensor | None,
        dlosses: torch.Tensor | None,
        logits: torch.Tensor,
        pooled: torch.Tensor,
        mean: torch.Tensor,
        rstd: torch.Tensor,
        num_groups: int,
        loss: str,
        needs: Sequence[bool],
    ) -> reference.Gradients:
        n, c, h, w = x.shape
        given = (weight, bias, projection, offset)
        parameters = _native.alike(*given)
        found = [torch.empty_like(t) if need else None for t, need in zip((x, *parameters), needs, strict=True)]
        workspace = _native.scratch(workspace_size(n, c), x)
        tensors = (x, *parameters[:3], dlogits, dlosses, logits, pooled, mean, rstd, *found, workspace)
        sizes = (n, c, h * w, num_groups, *_codes(x, parameters, loss))
        status = function(*map(pointer, tensors), *sizes, tail(x))
        if status:
            _native.fail(lib, status, name, x, *parameters)
        dx, *rest = (None if g is None else g.to(t.dtype) for g, t in zip(found, (x, *given), strict=True))
        return dx, *rest

    return bwd


def _norm_arguments(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, num_groups: int, eps: float
) -> tuple[Any, ...]:
    # In the dtype of the statistics: the normalised map must not be rounded to 16 bits before it is summed up.
    acc = accumulation_dtype(x.dtype)
    return x.to(acc), weight.to(acc), bias.to(acc), None, num_groups, eps, "silu", None, None


def _composed_fwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    num_groups: int,
    eps: float,
    loss: str,
) -> reference.Outputs:
    args = _norm_arguments(x, weight, bias, num_groups, eps)
    with any_backend():
        y, mean, rstd = GROUP_NORM_SILU.plan(args).fwd(*args)
    pooled = y.mean((2, 3)) if x.shape[2:] != (1, 1) else y.flatten(1)  # one position: nothing to average
    logits = (pooled * projection).sum(1) + offset  # no matrix product: autocast would round it
    return logits, reference.losses_of(logits, loss), pooled, mean, rstd


def _composed_bwd(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    projection: torch.Tensor,
    offset: torch.Tensor,
    dlogits: torch.Tensor | None,
    dlosses: torch.Tensor | None,
    logits: torch.Tensor,
    pooled: torch.Tensor,
    mean: torch.Tensor,
    rstd: torch.Tensor,
    num_groups: int,
    loss: str,
    needs: Sequence[bool],
) -> reference.Gradients:
    arrived = reference.arriving(dlogits, dlosses, logits, loss)
    found: tuple[MaybeTensor, ...] = (None, None, None)
    if any(needs[:3]):
        args = _norm_arguments(x, weight, bias, num_groups, 0.0)
        wide = args[0]
        share = arrived[:, None] * projection.to(logits.dtype) / (x.shape[2] * x.shape[3])
        dy = torch.empty_like(wide).copy_(share[..., None, None].expand(x.shape))
        with any_backend():
            kernels = GROUP_NORM_SILU.plan(args)
        found = kernels.bwd(dy, *args[:4], mean, rstd, num_groups, "silu", (*needs[:3], False))
    dx, dweight, dbias = (
        None if t is None else t.to(like.dtype) for t, like in zip(found, (x, weight, bias), strict=False)
    )
    dprojection = (arrived[:, None] * pooled).sum(0).to(projection.dtype) if needs[3] else None
    doffset = arrived.sum(0, keepdim=True).to(offset.dtype) if needs[4] else None
    return dx, dweight, dbias, dprojection, doffset


def _narrow_groups(values: Values) -> bool:
    return values["x"].shape[1] // values["num_groups"] <= 1024


class _DiscHead(FusedOp):
    name = "disc_head"
    parameters = (*_TENSORS, "num_groups", "eps", "loss")
    fwd_schema = (
        "(Tensor x, Tensor weight, Tensor bias, Tensor projection, Tensor offset, SymInt num_groups, float eps, "
        "str loss) -> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    bwd_schema = (
        "(Tensor x, Tensor weight, Tensor bias, Tensor projection, Tensor offset, Tensor? dlogits, Tensor? dlosses, "
        "Tensor logits, Tensor pooled, Tensor mean, Tensor rstd, SymInt num_groups, str loss, bool[] needs) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor)"
    )
    differentiable = 2
    rules = (
        *(IsTensor(arg) for arg in _TENSORS),
        Dtype("x", _backends.FLOATS),
        Ndim("x", 4, "[N,C,H,W]"),
        DimBetween("x", 1, "channels", least=1),
        DimBetween("x", 2, "rows", least=1),
        DimBetween("x", 3, "columns", least=1),
        Integer("num_groups"),
        Divides("num_groups", "x", 1),
        *(ShapeFrom(arg, "x", (1,), "[C]") for arg in ("weight", "bias", "projection")),
        Sizes("offset", "[1]", lambda values: (1,)),
        *(DtypeLike(arg, "x", also=(torch.float32,)) for arg in _TENSORS[1:]),
        *(DeviceLike(arg, "x") for arg in _TENSORS[1:]),
        NonNegative("eps"),
        OneOf("loss", tuple(reference.LOSSES)),
    )
    backends = (
        _backends.native("cuda", "x", _native_kernels),
        _backends.triton("disc_head", "x", Condition("a group must have at most 1024 channels", _narrow_groups)),
        Backend("library", lambda: (_composed_fwd, _composed_bwd)),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x, *parameters = args[:5]
        return dense(x), *(t.contiguous() for t in parameters), *args[5:]

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        logits, _, *rest = outputs
        return *args[:5], logits, *rest

    def bwd_arguments(self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]) -> Args:
        dlogits, dlosses = (None if t is None else t.contiguous() for t in dy)
        return *saved[:5], dlogits, dlosses, *saved[5:], scalars[5], scalars[7], tuple(needs[:5])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return *found, None, None, None

    def second_order(
        self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        flows = [index for index, t in enumerate(dy) if t is not None]

        def forward(*tensors: Any) -> Any:
            outputs = reference.fwd(*tensors, *scalars[5:])
            return [outputs[index] for index in flows]

        incoming: Any = [dy[index] for index in flows]
        return *reference_gradients(forward, saved[:5], incoming, needs[:5]), None, None, None

    def forward_arguments(self, bwd_args: Args) -> Args:
        return *bwd_args[:5], bwd_args[11], 0.0, bwd_args[12]

    def fake_fwd(self, args: Args) -> Any:
        x, num_groups = args[0], args[5]
        acc = accumulation_dtype(x.dtype)
        logits, mean = x.new_empty(x.shape[0], dtype=acc), x.new_empty((x.shape[0], num_groups), dtype=acc)
        return logits, logits.new_empty(x.shape[0]), x.new_empty(x.shape[:2], dtype=acc), mean, torch.empty_like(mean)

    def fake_bwd(self, bwd_args: Args) -> Any:
        tensors, needs = bwd_args[:5], bwd_args[13]
        return tuple(
            torch.empty_like(t) if need else tensors[0].new_empty(0) for t, need in zip(tensors, needs, strict=True)
        )


_OP = _DiscHead(disc_head)
