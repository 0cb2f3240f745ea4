# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels that add noise, run on a CPU: forward_diffusion and ddim_move. See test_cuda_emulation.py."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from sdxl_fast.reference import ddim_move as ddim_move_reference
from sdxl_fast.reference import forward_diffusion as forward_diffusion_reference
from sdxl_fast.testing.emulation import COMPILER, channels_last, check, unaligned

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# ---- forward_diffusion ----

ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
SEEDS = torch.tensor([0, -1, 2**40 + 7])


def _diffusion_run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    fwd, bwd = op
    dx_t, x0, timesteps, seeds, stream, noise, pure = values
    alphas_cumprod = ALPHAS_CUMPROD.to(torch.float64 if x0.dtype == torch.float64 else torch.float32)
    x_t, used = fwd(x0, alphas_cumprod, timesteps, seeds, stream, noise, pure)
    return {"x_t": x_t, "noise": used, "dx0": bwd(dx_t, alphas_cumprod, timesteps, pure)}


def _diffusion_draw(shape: tuple[int, ...], dtype: torch.dtype, nhwc: bool, stream: int, given: bool) -> Any:
    def draw(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        x0, dx_t, noise = (torch.randn(shape, generator=generator).to(dtype) for _ in range(3))
        if nhwc:
            x0, dx_t, noise = channels_last(x0), channels_last(dx_t), channels_last(noise)
        timesteps = torch.tensor([999, 0, 500])[: shape[0]]
        seeds = None if given else SEEDS[: shape[0]] + seed
        return dx_t, x0, timesteps, seeds, stream, noise if given else None, 999

    return draw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 3, 5, 7), (1, 8, 6, 2), (2, 16, 4, 4), (3, 1, 1, 1)], ids=str)
def test_forward_diffusion(kernels: Any, shape: tuple[int, ...], nhwc: bool, dtype: torch.dtype) -> None:
    reference = (forward_diffusion_reference.fwd, forward_diffusion_reference.bwd)
    for stream, given in ((0, False), (2**33 + 5, False), (0, True)):
        draw = _diffusion_draw(shape, dtype, nhwc, stream, given)
        check("forward_diffusion", kernels("forward_diffusion"), reference, _diffusion_run, draw)


def test_noise_ignores_batch_and_memory_format(kernels: Any) -> None:
    fwd, _ = kernels("forward_diffusion")
    x0 = torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([1, 2, 3])
    together = fwd(x0, ALPHAS_CUMPROD, timesteps, SEEDS, 3, None, None)[1]
    assert torch.equal(together, fwd(channels_last(x0), ALPHAS_CUMPROD, timesteps, SEEDS, 3, None, None)[1])
    for i in range(3):
        one = slice(i, i + 1)
        alone = fwd(x0[one], ALPHAS_CUMPROD, timesteps[one], SEEDS[one].clone(), 3, None, None)[1]
        assert torch.equal(alone[0], together[i])
    ragged = fwd(x0[:, :, :, :7].contiguous(), ALPHAS_CUMPROD, timesteps, SEEDS, 3, None, None)[1]
    assert torch.equal(ragged.flatten(1)[:, :200], together.flatten(1)[:, :200])  # the index alone decides


def test_timestep_outside_the_schedule_is_nan(kernels: Any) -> None:
    fwd, bwd = kernels("forward_diffusion")
    x0, timesteps = torch.randn(3, 4, 4, 4), torch.tensor([1000, 5, -1])
    for seeds, noise in ((SEEDS, None), (None, x0.clone())):
        x_t, _ = fwd(x0, ALPHAS_CUMPROD, timesteps, seeds, 0, noise, 1000)
        assert x_t[0].isnan().all() and x_t[1].isfinite().all() and x_t[2].isnan().all()
    dx0 = bwd(x0, ALPHAS_CUMPROD, timesteps, None)
    assert dx0[0].isnan().all() and dx0[1].isfinite().all() and dx0[2].isnan().all()


# ---- ddim_move ----

NOW, THEN, AGAIN = torch.tensor([999, 250, 10]), torch.tensor([-1, 250, 749]), torch.tensor([749, 10, 0])
OUTPUTS = [*((dtype, dtype) for dtype in DTYPES), (torch.float32, torch.bfloat16), (torch.float32, torch.float16)]


def _move_run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
    fwd, bwd = op
    dx_next, dx_renoised, x_t, output, kind, stream, seeds = values
    n = x_t.shape[0]
    alphas_cumprod = ALPHAS_CUMPROD.to(torch.float64 if x_t.dtype == torch.float64 else torch.float32)
    levels = (alphas_cumprod, NOW[:n], THEN[:n], kind)
    again = AGAIN[:n]
    (x_next, x_renoised), plain = (
        fwd(x_t, output, *levels, again, seeds, stream),
        fwd(x_t, output, *levels, None, None, 0),
    )
    dx, doutput = bwd(output, dx_next, dx_renoised, *levels, again, (True, True))
    _, direct = bwd(output, dx_next, None, *levels, None, (False, True))
    noised, _ = bwd(output, None, dx_renoised, *levels, again, (True, False))
    return {
        "x_next": x_next, "x_renoised": x_renoised, "plain": plain,
        "dx": dx, "doutput": doutput, "direct": direct, "dnoised": noised,
    }  # fmt: skip


def _move_draw(shape: tuple[int, ...], dtypes: Any, nhwc: bool, kind: str, stream: int = 2**33 + 5) -> Any:
    def draw(seed: int) -> tuple[Any, ...]:
        generator = torch.Generator().manual_seed(seed)
        tensors = [torch.randn(shape, generator=generator).to(dtypes[0]) for _ in range(3)]
        tensors.append(torch.randn(shape, generator=generator).to(dtypes[1]))
        return *(channels_last(t) if nhwc else t for t in tensors), kind, stream, SEEDS[: shape[0]] + seed

    return draw


@pytest.mark.parametrize("dtypes", OUTPUTS, ids=str)
@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", [(3, 4, 8, 8), (2, 3, 5, 7), (1, 8, 6, 2), (3, 1, 1, 1)], ids=str)
def test_ddim_move(kernels: Any, shape: tuple[int, ...], nhwc: bool, dtypes: Any) -> None:
    reference = (ddim_move_reference.fwd, ddim_move_reference.bwd)
    for kind in ddim_move_reference.PREDICTION_TYPES:
        check("ddim_move", kernels("ddim_move"), reference, _move_run, _move_draw(shape, dtypes, nhwc, kind))


@pytest.mark.parametrize("kind", ddim_move_reference.PREDICTION_TYPES)
def test_ddim_move_rounds_its_coefficients_once(kernels: Any, kind: str) -> None:
    """To the last bit: their error is shared by a whole sample, no mean makes it smaller."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randperm(1001, generator=generator) - 1 for _ in range(2)]
    one, zero = torch.ones(1001, 1, 1, 1), torch.zeros(1001, 1, 1, 1)
    exact = ddim_move_reference.coefficients(ALPHAS_CUMPROD.double(), *levels, kind, torch.float64)
    for inputs, expected in zip(((one, zero), (zero, one)), exact, strict=True):
        got = kernels("ddim_move")[0](*inputs, ALPHAS_CUMPROD, *levels, kind, None, None, 0)
        assert torch.equal(got.flatten(), expected.float())


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_ddim_move_draws_the_noise_of_forward_diffusion(kernels: Any, nhwc: bool) -> None:
    """Bit for bit, in every kernel: at ab = 0 the noised copy is the noise."""
    for dtype, shape in ((torch.float32, (3, 4, 8, 8)), (torch.bfloat16, (3, 4, 8, 8)), (torch.float16, (3, 3, 5, 7))):
        x = torch.zeros(shape, dtype=dtype)
        x = channels_last(x) if nhwc else x
        stay, last, table = (
            torch.zeros(3, dtype=torch.int64),
            torch.ones(3, dtype=torch.int64),
            torch.tensor([1.0, 0.0]),
        )
        _, noise = kernels("forward_diffusion")[0](x, table, last, SEEDS, 7, None, None)
        _, renoised = kernels("ddim_move")[0](x, x, table, stay, stay, "epsilon", last, SEEDS, 7)
        assert torch.equal(renoised, noise)


def test_ddim_move_takes_unaligned_pointers(kernels: Any) -> None:
    for dtypes in OUTPUTS:
        values = _move_draw((3, 4, 4, 4), dtypes, True, "v_prediction")(0)
        aligned = _move_run(kernels("ddim_move"), values)
        shifted = _move_run(kernels("ddim_move"), (*(unaligned(t) for t in values[:4]), *values[4:]))
        assert all(torch.equal(aligned[name], shifted[name]) for name in aligned)


@pytest.mark.parametrize("kind", ddim_move_reference.PREDICTION_TYPES)
def test_ddim_move_outside_the_schedule_is_nan(kernels: Any, kind: str) -> None:
    fwd, bwd = kernels("ddim_move")
    x, inside = torch.randn(3, 4, 4, 4), torch.tensor([5, 5, -1])
    for wrong in (torch.tensor([1000, 5, -2]), torch.tensor([1000, 6, -2])):
        for levels in ((wrong, inside), (inside, wrong), (wrong, wrong)):
            moved = fwd(x, x, ALPHAS_CUMPROD, *levels, kind, None, None, 0)
            dx, doutput = bwd(x, x, None, ALPHAS_CUMPROD, *levels, kind, None, (True, True))
            for t in (moved, dx, doutput):
                assert t[0].isnan().all() and t[1].isfinite().all() and t[2].isnan().all()
    _, renoised = fwd(x, x, ALPHAS_CUMPROD, inside, inside, kind, torch.tensor([1000, 5, -1]), SEEDS, 0)
    assert renoised[0].isnan().all() and renoised[1].isfinite().all() and renoised[2].isnan().all()


# ---- the C ABI ----


def test_statuses(library: ctypes.CDLL) -> None:
    x = torch.zeros(64)
    p = x.data_ptr()
    diffusion = library.sdxl_fast_forward_diffusion_fwd_cuda
    timesteps = torch.zeros(1, dtype=torch.int64)
    t = timesteps.data_ptr()
    neither = (p, p, t, None, None, p, None, 1, 1, 2, 2, 1, 0, -1, 1, 0, 0)
    both = (p, p, t, t, p, p, p, 1, 1, 2, 2, 1, 0, -1, 1, 0, 0)
    assert diffusion(*neither) == diffusion(*both) == 1


def test_ddim_move_statuses(library: ctypes.CDLL) -> None:
    memory = torch.zeros(64, dtype=torch.int64)
    p = memory.data_ptr()
    forward: dict[str, Any] = {
        "x_t": p, "output": p, "table": p, "now": p, "then": p, "again": p, "seeds": p, "x_next": p, "x_renoised": p,
        "n": 1, "c": 1, "h": 2, "w": 2, "total": 1, "stream": 0, "kind": 0,
        "layout": 0, "dtype": 0, "output_dtype": 0, "cuda_stream": 0,
    }  # fmt: skip
    backward: dict[str, Any] = {
        "dx_next": p, "dx_renoised": p, "table": p, "now": p, "then": p, "again": p, "dx_t": None, "doutput": None,
        "n": 1, "elements": 4, "total": 1, "kind": 0, "dtype": 0, "output_dtype": 0, "cuda_stream": 0,
    }  # fmt: skip

    def fwd(**changes: Any) -> int:
        return int(library.sdxl_fast_ddim_move_fwd_cuda(*{**forward, **changes}.values()))

    def bwd(**changes: Any) -> int:
        return int(library.sdxl_fast_ddim_move_bwd_cuda(*{**backward, **changes}.values()))

    assert fwd(n=0, seeds=None) == fwd() == bwd() == bwd(n=0, dx_next=None, dx_renoised=None) == 0
    assert fwd(seeds=None) == fwd(again=None) == fwd(x_renoised=None) == fwd(kind=3) == fwd(layout=2) == fwd(c=-1) == 1
    assert bwd(dx_next=None, dx_renoised=None) == bwd(again=None) == bwd(kind=-1) == bwd(elements=-1) == 1
    assert fwd(dtype=1, output_dtype=1) == fwd(dtype=2) == bwd(dtype=2, output_dtype=3) == bwd(output_dtype=1) == 2
