# SPDX-License-Identifier: Apache-2.0
"""``ddim_move``: the deterministic step between two noise levels, and its result noised anew in the same pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch

from sdxl_fast.constraints import (
    Condition,
    DeviceLike,
    Dtype,
    Integer,
    IsTensor,
    Ndim,
    NoGradient,
    OneOf,
    SameShape,
    ShapeFrom,
    Together,
    Values,
)
from sdxl_fast.op import Args, FusedOp, Incoming, MaybeTensor, dense, laid_out_like
from sdxl_fast.ops import _backends, _native
from sdxl_fast.reference import ddim_move as reference
from sdxl_fast.reference._common import accumulation_dtype


def ddim_move(
    x_t: torch.Tensor,
    model_output: torch.Tensor,
    *,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    next_timesteps: torch.Tensor,
    prediction_type: str,
    renoise_timesteps: torch.Tensor | None = None,
    seeds: torch.Tensor | None = None,
    stream: int = 0,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Returns x at ``next_timesteps``, and that noised to ``renoise_timesteps`` if they are given.

    ``x_next = alpha' x0 + sigma' epsilon`` with what ``x_t`` and ``model_output`` say of x0 and epsilon. A step from t
    to t is the identity; at the clean latent the epsilon of a sample prediction is undefined and counts as 0. The noise
    of ``x_renoised`` is that of ``forward_diffusion`` for the same seeds and stream. Differentiable twice in x_t and
    model_output, through both results.

    Args:
        x_t: [N,C,H,W], float32, bfloat16, float16 or float64; contiguous or channels_last, others are made dense.
        model_output: like x_t, of its dtype, or bfloat16 or float16 beside a float32 x_t (autocast).
        alphas_cumprod: [T], float32 or float64, on x_t's device; used in float32 (float64 for float64 x_t).
        timesteps: int64 [N], the level of x_t, -1 <= t < T; -1 is the clean latent. Values are checked on the CPU; on a
            GPU that would stall the queue, so there a level out of range makes its sample NaN.
        next_timesteps: int64 [N], the level to move to, likewise.
        prediction_type: what the model predicts: "epsilon", "sample" (x0) or "v_prediction".
        renoise_timesteps: int64 [N], 0 <= t < T, or None.
        seeds: int64 [N], one per sample, with renoise_timesteps.
        stream: which draw of the seeds, 0 <= stream < 2**63.

    Returns:
        x_next in x_t's dtype and memory format; with renoise_timesteps the pair (x_next, x_renoised), equal to
        ``forward_diffusion(x_next, timesteps=renoise_timesteps, ...)``. Arithmetic is float32 (float64 for float64).

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Song et al. 2021, eq. 12 (arXiv:2010.02502); Lin et al. 2024, eq. 3-5 and 25 (arXiv:2402.13929).
    """
    found = _OP(
        *(x_t, model_output, alphas_cumprod, timesteps, next_timesteps, prediction_type),
        *(renoise_timesteps, seeds, stream),
    )
    if isinstance(found, torch.Tensor):
        return found
    x_next, x_renoised = found
    return x_next if renoise_timesteps is None else (x_next, x_renoised)


def _native_kernels(device: str) -> _backends.Functions:
    """Adapters from the raw signature to the C functions of ``device``."""
    lib = _native.binding(device)
    return _native.guard(device, _native_fwd(lib, device)), _native.guard(device, _native_bwd(lib, device))


def _native_fwd(lib: Any, device: str) -> Callable[..., Any]:
    name = f"ddim_move_fwd_{device}"
    function, tail, pointer = getattr(lib, name), _native.TAIL[device], _native.pointer

    def fwd(
        x_t: torch.Tensor,
        model_output: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor,
        prediction_type: str,
        renoise_timesteps: torch.Tensor | None,
        seeds: torch.Tensor | None,
        stream: int,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        x_next = torch.empty_like(x_t)
        x_renoised = None if renoise_timesteps is None else torch.empty_like(x_t)
        status = function(
            *(x_t.data_ptr(), model_output.data_ptr(), alphas_cumprod.data_ptr(), timesteps.data_ptr()),
            *(next_timesteps.data_ptr(), pointer(renoise_timesteps), pointer(seeds)),
            *(x_next.data_ptr(), pointer(x_renoised), *x_t.shape, alphas_cumprod.shape[0], stream),
            *(_native.PREDICTION[prediction_type], _native.layout(x_t)),
            *(_native.DTYPE[x_t.dtype], _native.DTYPE[model_output.dtype], tail(x_t)),
        )
        if status:
            _native.fail(lib, status, name, x_t, model_output, alphas_cumprod, timesteps, next_timesteps, seeds)
        return x_next if x_renoised is None else (x_next, x_renoised)

    return fwd


def _native_bwd(lib: Any, device: str) -> Callable[..., Any]:
    name = f"ddim_move_bwd_{device}"
    function, tail, pointer = getattr(lib, name), _native.TAIL[device], _native.pointer

    def bwd(
        output_like: torch.Tensor,
        dx_next: torch.Tensor | None,
        dx_renoised: torch.Tensor | None,
        alphas_cumprod: torch.Tensor,
        timesteps: torch.Tensor,
        next_timesteps: torch.Tensor,
        prediction_type: str,
        renoise_timesteps: torch.Tensor | None,
        needs: Sequence[bool],
    ) -> tuple[MaybeTensor, MaybeTensor]:
        given = _given(dx_next, dx_renoised)
        n, c, h, w = given.shape
        dx_t = torch.empty_like(given) if needs[0] else None
        doutput = torch.empty_like(given, dtype=output_like.dtype) if needs[1] else None
        status = function(
            *(pointer(dx_next), pointer(dx_renoised), alphas_cumprod.data_ptr(), timesteps.data_ptr()),
            *(next_timesteps.data_ptr(), pointer(renoise_timesteps), pointer(dx_t), pointer(doutput)),
            *(n, c * h * w, alphas_cumprod.shape[0], _native.PREDICTION[prediction_type]),
            *(_native.DTYPE[given.dtype], _native.DTYPE[output_like.dtype], tail(given)),
        )
        if status:
            _native.fail(lib, status, name, dx_next, dx_renoised, alphas_cumprod, timesteps, next_timesteps)
        return dx_t, doutput

    return bwd


def _given(dx_next: MaybeTensor, dx_renoised: MaybeTensor) -> torch.Tensor:
    return cast(torch.Tensor, dx_renoised if dx_next is None else dx_next)


def _output_dtype_fits(values: Values) -> bool:
    x, output = values["x_t"].dtype, values["model_output"].dtype
    return x == output or (x == torch.float32 and output in (torch.bfloat16, torch.float16))


class _DdimMove(FusedOp):
    name = "ddim_move"
    parameters = (
        *("x_t", "model_output", "alphas_cumprod", "timesteps", "next_timesteps", "prediction_type"),
        *("renoise_timesteps", "seeds", "stream"),
    )
    fwd_schema = (
        "(Tensor x_t, Tensor model_output, Tensor alphas_cumprod, Tensor timesteps, Tensor next_timesteps, "
        "str prediction_type, Tensor? renoise_timesteps, Tensor? seeds, SymInt stream) -> (Tensor, Tensor)"
    )
    bwd_schema = (
        "(Tensor output_like, Tensor? dx_next, Tensor? dx_renoised, Tensor alphas_cumprod, Tensor timesteps, "
        "Tensor next_timesteps, str prediction_type, Tensor? renoise_timesteps, bool[] needs) -> (Tensor, Tensor)"
    )
    differentiable = 2
    rules = (
        *(IsTensor(arg) for arg in ("x_t", "model_output", "alphas_cumprod", "timesteps", "next_timesteps")),
        *(IsTensor(arg, optional=True) for arg in ("renoise_timesteps", "seeds")),
        Dtype("x_t", _backends.FLOATS),
        Ndim("x_t", 4, "[N,C,H,W]"),
        SameShape("model_output", "x_t"),
        Dtype("model_output", _backends.FLOATS),
        Condition(
            "model_output must have the dtype of x_t, or be bfloat16 or float16 beside a float32 x_t; convert it: "
            "model_output.to(x_t.dtype)",
            _output_dtype_fits,
        ),
        Dtype("alphas_cumprod", (torch.float32, torch.float64)),
        Ndim("alphas_cumprod", 1, "[T]"),
        OneOf("prediction_type", reference.PREDICTION_TYPES),
        Together("renoise_timesteps", "seeds"),
        *(Dtype(arg, (torch.int64,)) for arg in ("timesteps", "next_timesteps", "renoise_timesteps", "seeds")),
        *(ShapeFrom(arg, "x_t", (0,), "[N]") for arg in ("timesteps", "next_timesteps", "renoise_timesteps", "seeds")),
        *(
            DeviceLike(arg, "x_t")
            for arg in ("model_output", "alphas_cumprod", "timesteps", "next_timesteps", "renoise_timesteps", "seeds")
        ),
        Integer("stream", low=0, high=2**63),
        NoGradient("alphas_cumprod"),
    )
    backends = (
        _backends.native("cuda", "x_t", _native_kernels),
        _backends.triton("ddim_move", "x_t"),
        _backends.native("cpu", "x_t", _native_kernels),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x_t, model_output, alphas_cumprod, timesteps, next_timesteps, prediction_type, again, seeds, stream = args
        x_t = dense(x_t)
        return (
            *(x_t, laid_out_like(model_output, x_t)),
            alphas_cumprod.to(accumulation_dtype(x_t.dtype)).contiguous(),
            *(timesteps.contiguous(), next_timesteps.contiguous(), prediction_type),
            *(None if t is None else t.contiguous() for t in (again, seeds)),
            stream,
        )

    def check_values(self, args: Args) -> None:
        _, _, alphas_cumprod, timesteps, next_timesteps, _, again, *_ = args
        if timesteps.device.type != "cpu":
            return
        total = alphas_cumprod.shape[0]
        for name, values, low in (
            ("timesteps", timesteps, -1),
            ("next_timesteps", next_timesteps, -1),
            ("renoise_timesteps", again, 0),
        ):
            listed = [] if values is None else values.tolist()
            if listed and not (min(listed) >= low and max(listed) < total):
                raise ValueError(
                    f"{self.name}: {name} must be >= {low} and < {total}, the length of alphas_cumprod, got "
                    f"{min(listed)} to {max(listed)}"
                )

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        # The op is linear: of the model's output only the dtype is needed.
        return args[1].new_empty(0), *args[2:5], args[6]

    def bwd_arguments(self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]) -> Args:
        output_like, alphas_cumprod, timesteps, next_timesteps, again = saved
        dx_next, dx_renoised = dy
        dx_next = None if dx_next is None else dense(dx_next)
        if dx_renoised is not None:
            dx_renoised = dense(dx_renoised) if dx_next is None else laid_out_like(dx_renoised, dx_next)
        levels = (alphas_cumprod, timesteps, next_timesteps, scalars[5], again)
        return output_like, dx_next, dx_renoised, *levels, tuple(needs[:2])

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return (*found, *(None,) * 7)

    def second_order(
        self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        # Linear in both inputs, so the gradient contains neither and the closed form is differentiable as it stands.
        return self.place_gradients(reference.bwd(*self.bwd_arguments(dy, saved, scalars, needs)))

    def forward_arguments(self, bwd_args: Args) -> Args:
        output_like, dx_next, dx_renoised, alphas_cumprod, timesteps, next_timesteps, prediction_type, again, _ = (
            bwd_args
        )
        x_t = _given(dx_next, dx_renoised)
        output = output_like.new_empty(()).expand(x_t.shape)
        levels = (alphas_cumprod, timesteps, next_timesteps, prediction_type)
        return x_t, output, *levels, again, again, 0

    def library_outputs(self, args: Args, outputs: Any) -> Any:
        return (outputs, args[0].new_empty(0)) if args[6] is None else outputs

    def fake_fwd(self, args: Args) -> Any:
        x_t = args[0]
        return torch.empty_like(x_t), x_t.new_empty(0) if args[6] is None else torch.empty_like(x_t)

    def fake_bwd(self, bwd_args: Args) -> Any:
        output_like, dx_next, dx_renoised, *_, needs = bwd_args
        given = _given(dx_next, dx_renoised)
        return (
            torch.empty_like(given) if needs[0] else output_like.new_empty(0),
            torch.empty_like(given, dtype=output_like.dtype) if needs[1] else output_like.new_empty(0),
        )


_OP = _DdimMove(ddim_move)
