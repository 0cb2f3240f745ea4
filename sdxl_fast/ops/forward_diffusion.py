# SPDX-License-Identifier: Apache-2.0
"""``forward_diffusion``: noises clean latents, drawing the noise on the way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch

from sdxl_fast.constraints import (
    DeviceLike,
    Dtype,
    DtypeLike,
    ExactlyOne,
    Integer,
    IsTensor,
    Ndim,
    NoGradient,
    SameShape,
    ShapeFrom,
)
from sdxl_fast.op import Args, FusedOp, MaybeTensor, dense, laid_out_like
from sdxl_fast.ops import _backends, _native
from sdxl_fast.reference import forward_diffusion as reference
from sdxl_fast.reference._common import accumulation_dtype


def forward_diffusion(
    x0: torch.Tensor,
    *,
    alphas_cumprod: torch.Tensor,
    timesteps: torch.Tensor,
    seeds: torch.Tensor | None = None,
    stream: int = 0,
    noise: torch.Tensor | None = None,
    pure_noise_at: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns ``x_t = sqrt(ab_t) x0 + sqrt(1 - ab_t) noise`` and the noise; differentiable twice in x0.

    Drawn noise depends on (seed of the sample, stream, logical index in C,H,W) alone: a sample gets the same noise in
    every batch, memory format and backend (the integer stream bitwise, the normals within rounding).

    Args:
        x0: [N,C,H,W], float32, bfloat16, float16 or float64; contiguous or channels_last, other strides are made dense.
        alphas_cumprod: [T], float32 or float64, on x0's device; used in float32 (float64 for float64 x0).
        timesteps: int64 [N], 0 <= t < T. Values are checked on the CPU; on a GPU that would stall the queue, so there a
            timestep out of range makes its sample NaN (on the eager backend it raises or aborts as indexing does).
        seeds: int64 [N], one per sample, on x0's device. Either this or ``noise``.
        stream: separates several draws of one seed (x_T, re-noising, ...), 0 <= stream < 2**63.
        noise: like x0, to be used instead of a draw; not differentiated.
        pure_noise_at: timestep at which x_t is the noise exactly, as SDXL-Lightning trains at T; None for none.

    Returns:
        x_t and the noise it contains (the given tensor itself, if one was given), in x0's dtype and memory format.
        Arithmetic is float32 (float64 for float64); drawn noise is rounded to x0's dtype before it is mixed in.

    Raises:
        ValueError: naming the argument, what came, what is allowed and the remedy.
        UnsupportedError: when the backend forced by ``use_backend`` cannot run the call.

    Source: Ho et al. 2020, eq. 4 (arXiv:2006.11239); Lin et al. 2024, section 3.3 (arXiv:2402.13929);
    Philox4x32-10: Salmon et al. 2011.
    """
    x_t, drawn = _OP(x0, alphas_cumprod, timesteps, seeds, stream, noise, pure_noise_at)
    return x_t, drawn if noise is None else noise


def _native_kernels(device: str) -> _backends.Functions:
    """Adapters from the raw signature to the C functions of ``device``."""
    lib, tail = _native.binding(device), _native.TAIL[device]
    fwd_name, bwd_name = f"forward_diffusion_fwd_{device}", f"forward_diffusion_bwd_{device}"
    c_fwd, c_bwd, pointer = getattr(lib, fwd_name), getattr(lib, bwd_name), _native.pointer

    def fwd(
        x0: torch.Tensor,
        alphas_cumprod: torch.Tensor,
        timesteps: torch.Tensor,
        seeds: torch.Tensor | None,
        stream: int,
        noise: torch.Tensor | None,
        pure_noise_at: int | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        x_t = torch.empty_like(x0)
        drawn = torch.empty_like(x0) if noise is None else None
        status = c_fwd(
            *(x0.data_ptr(), alphas_cumprod.data_ptr(), timesteps.data_ptr(), pointer(seeds), pointer(noise)),
            *(x_t.data_ptr(), pointer(drawn), *x0.shape, alphas_cumprod.shape[0], stream),
            *(-1 if pure_noise_at is None else pure_noise_at, _native.layout(x0), _native.DTYPE[x0.dtype], tail(x0)),
        )
        if status:
            _native.fail(lib, status, fwd_name, x0, alphas_cumprod, timesteps, seeds, noise)
        return x_t, drawn if drawn is not None else noise  # type: ignore[return-value]

    def bwd(
        dx_t: torch.Tensor, alphas_cumprod: torch.Tensor, timesteps: torch.Tensor, pure_noise_at: int | None
    ) -> torch.Tensor:
        dx0 = torch.empty_like(dx_t)
        n, c, h, w = dx_t.shape
        status = c_bwd(
            *(dx_t.data_ptr(), alphas_cumprod.data_ptr(), timesteps.data_ptr(), dx0.data_ptr(), n, c * h * w),
            *(alphas_cumprod.shape[0], -1 if pure_noise_at is None else pure_noise_at),
            *(_native.DTYPE[dx_t.dtype], tail(dx_t)),
        )
        if status:
            _native.fail(lib, status, bwd_name, dx_t, alphas_cumprod, timesteps)
        return dx0

    return _native.guard(device, fwd), _native.guard(device, bwd)


class _ForwardDiffusion(FusedOp):
    name = "forward_diffusion"
    parameters = ("x0", "alphas_cumprod", "timesteps", "seeds", "stream", "noise", "pure_noise_at")
    fwd_schema = (
        "(Tensor x0, Tensor alphas_cumprod, Tensor timesteps, Tensor? seeds, SymInt stream, Tensor? noise, "
        "SymInt? pure_noise_at) -> (Tensor, Tensor)"
    )
    bwd_schema = "(Tensor dx_t, Tensor alphas_cumprod, Tensor timesteps, SymInt? pure_noise_at) -> Tensor"
    rules = (
        *(IsTensor(arg) for arg in ("x0", "alphas_cumprod", "timesteps")),
        *(IsTensor(arg, optional=True) for arg in ("seeds", "noise")),
        Dtype("x0", _backends.FLOATS),
        Ndim("x0", 4, "[N,C,H,W]"),
        Dtype("alphas_cumprod", (torch.float32, torch.float64)),
        Ndim("alphas_cumprod", 1, "[T]"),
        ExactlyOne("seeds", "noise"),
        *(Dtype(arg, (torch.int64,)) for arg in ("timesteps", "seeds")),
        *(ShapeFrom(arg, "x0", (0,), "[N]") for arg in ("timesteps", "seeds")),
        SameShape("noise", "x0"),
        DtypeLike("noise", "x0"),
        *(DeviceLike(arg, "x0") for arg in ("alphas_cumprod", "timesteps", "seeds", "noise")),
        Integer("stream", low=0, high=2**63),
        Integer("pure_noise_at", low=0, optional=True),
        NoGradient("noise"),
        NoGradient("alphas_cumprod"),
    )
    backends = (
        _backends.native("cuda", "x0", _native_kernels),
        _backends.triton("forward_diffusion", "x0"),
        _backends.native("cpu", "x0", _native_kernels),
        _backends.eager(reference),
    )

    def prepare(self, args: Args) -> Args:
        x0, alphas_cumprod, timesteps, seeds, stream, noise, pure_noise_at = args
        x0 = dense(x0)
        alphas_cumprod = alphas_cumprod.to(accumulation_dtype(x0.dtype)).contiguous()
        seeds = None if seeds is None else seeds.contiguous()
        noise = None if noise is None else laid_out_like(noise, x0)
        return x0, alphas_cumprod, timesteps.contiguous(), seeds, stream, noise, pure_noise_at

    def check_values(self, args: Args) -> None:
        _, alphas_cumprod, timesteps, *_ = args
        if timesteps.device.type != "cpu":
            return
        listed, total = timesteps.tolist(), alphas_cumprod.shape[0]
        if listed and not (min(listed) >= 0 and max(listed) < total):
            raise ValueError(
                f"{self.name}: timesteps must be >= 0 and < {total}, the length of alphas_cumprod, got "
                f"{min(listed)} to {max(listed)}"
            )

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        return args[1], args[2]

    def bwd_arguments(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> Args:
        return dense(dy), saved[0], saved[1], scalars[6]

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        return (found, *(None,) * 6)

    def second_order(
        self, dy: torch.Tensor, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        alphas_cumprod, timesteps = cast(tuple[torch.Tensor, torch.Tensor], saved)
        # x_t is linear in x0, so the gradient does not contain x0 and the closed form is differentiable as it stands.
        return (reference.bwd(dy, alphas_cumprod, timesteps, scalars[6]), *(None,) * 6)

    def forward_arguments(self, bwd_args: Args) -> Args:
        dx_t, alphas_cumprod, timesteps, pure_noise_at = bwd_args
        return dx_t, alphas_cumprod, timesteps, None, 0, dx_t, pure_noise_at

    def library_outputs(self, args: Args, outputs: Any) -> Any:
        x_t, noise = outputs
        return x_t, noise if args[5] is None else noise.new_empty(0)

    def fake_fwd(self, args: Args) -> Any:
        x0, noise = args[0], args[5]
        return torch.empty_like(x0), torch.empty_like(x0) if noise is None else x0.new_empty(0)

    def fake_bwd(self, bwd_args: Args) -> Any:
        return torch.empty_like(bwd_args[0])


_OP = _ForwardDiffusion(forward_diffusion)
