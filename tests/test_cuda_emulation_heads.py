# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of disc_head and token_head, run on a CPU. See test_cuda_emulation.py."""

from __future__ import annotations

import ctypes
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdxl_fast.reference import disc_head as disc_head_reference
from sdxl_fast.reference import token_head as token_head_reference
from sdxl_fast.testing.emulation import COMPILER, channels_last, check

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = pytest.mark.parametrize("layout", [torch.Tensor.contiguous, channels_last], ids=["nchw", "nhwc"])

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")


def _normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _parameters(params: str, dtype: torch.dtype, *tensors: torch.Tensor) -> list[torch.Tensor]:
    """In x's dtype, in float32, or every other one in each."""
    dtypes = {"like x": (dtype, dtype), "float32": (torch.float32,) * 2, "mixed": (dtype, torch.float32)}[params]
    return [t.to(dtypes[index % 2]) for index, t in enumerate(tensors)]


# ---- disc_head ----

# The map that the convolutions leave, and a wider one; more groups than warps; wide, ragged and single-channel groups.
MAPS = [((3, 1280, 1, 1), 32), ((8, 64, 2, 3), 4), ((6, 21, 3, 3), 3), ((5, 40, 2, 4), 40), ((7, 90, 1, 2), 1)]


def _disc_run(loss: str, groups: int) -> Callable[..., dict[str, torch.Tensor]]:
    def run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        fwd, bwd = op
        *tensors, dlogits, dlosses = values
        logits, losses, pooled, mean, rstd = fwd(*tensors, groups, 1e-5, loss)
        rest = (logits, pooled, mean, rstd, groups, loss, (True,) * 5)
        names = ("dx", "dweight", "dbias", "dprojection", "doffset")
        found = dict(zip(names, bwd(*tensors, dlogits, dlosses, *rest), strict=True))
        return found | {"logits": logits, "losses": losses, "pooled": pooled, "mean": mean, "rstd": rstd}

    return run


def _disc_draw(shape: tuple[int, ...], dtype: torch.dtype, params: str, layout: Any) -> Callable[[int], Any]:
    def draw(seed: int) -> tuple[Any, ...]:
        weight, bias, projection = _normal(3, shape[1], seed=seed + 10)
        parameters = _parameters(params, dtype, 1 + weight / 2, bias / 2, projection, torch.tensor([0.375]))
        dlogits, dlosses = _normal(2, shape[0], seed=seed + 20)
        return layout((2 * _normal(*shape, seed=seed) + 3).to(dtype)), *parameters, dlogits, dlosses

    return draw


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), MAPS, ids=str)
def test_disc_head(kernels: Any, shape: tuple[int, ...], groups: int, dtype: torch.dtype, layout: Any) -> None:
    reference = (disc_head_reference.fwd, disc_head_reference.bwd)
    rows = dict.fromkeys(("dweight", "dbias", "dprojection"), shape[0] * shape[2] * shape[3])
    rows["doffset"] = math.prod(shape)  # of slopes at logits, each of which is a sum over the map
    for params, loss in zip(("like x", "float32", "mixed"), itertools.cycle(disc_head_reference.LOSSES)):
        draw = _disc_draw(shape, dtype, params, layout)
        check("disc_head", kernels("disc_head"), reference, _disc_run(loss, groups), draw, **rows)


@pytest.mark.parametrize("loss", disc_head_reference.LOSSES)
def test_disc_head_has_every_loss(kernels: Any, loss: str) -> None:
    draw = _disc_draw((4, 12, 2, 1), torch.float32, "like x", torch.Tensor.contiguous)
    reference = (disc_head_reference.fwd, disc_head_reference.bwd)
    check("disc_head", kernels("disc_head"), reference, _disc_run(loss, 4), draw, dweight=8, dbias=8, doffset=96)


def test_disc_head_computes_what_is_needed(kernels: Any) -> None:
    *tensors, dlogits, dlosses = _disc_draw((3, 16, 2, 1), torch.float32, "like x", torch.Tensor.contiguous)(0)
    fwd, bwd = kernels("disc_head")
    logits, _, *rest = fwd(*tensors, 4, 1e-5, "non_saturating_fake")
    for given in ((dlogits, None), (None, dlosses), (dlogits, dlosses)):
        common = (*tensors, *given, logits, *rest, 4, "non_saturating_fake")
        everything = bwd(*common, (True,) * 5)
        for needs in itertools.product([True, False], repeat=5):
            for need, gradient, full in zip(needs, bwd(*common, needs), everything, strict=True):
                assert torch.equal(gradient, full) if need else gradient is None


def test_disc_head_of_nothing(kernels: Any) -> None:
    fwd, bwd = kernels("disc_head")
    tensors = (torch.zeros(0, 8, 1, 1), *torch.ones(3, 8), torch.ones(1))
    logits, losses, *rest = fwd(*tensors, 4, 1e-5, "hinge_real")
    assert logits.shape == losses.shape == (0,)
    dx, *gradients = bwd(*tensors, logits, losses, logits, *rest, 4, "hinge_real", (True,) * 5)
    assert dx.shape == (0, 8, 1, 1) and not any(g.any() for g in gradients)


# ---- token_head ----

# Heads over a vision transformer's tokens; more tokens than threads, more channels than warps and than factors.
TOKENS = [((2, 48, 65), 6), ((1, 16, 300), 2), ((3, 21, 7), 3), ((2, 8, 1), 2), ((2, 150, 20), 2)]


def _token_run(groups: int) -> Callable[..., dict[str, torch.Tensor]]:
    def run(op: Any, values: tuple[Any, ...]) -> dict[str, torch.Tensor]:
        fwd, bwd = op
        *tensors, dlogits = values
        logits, mean, rstd = fwd(*tensors, groups, 1e-5)
        names = ("dhidden", "dresidual", "dweight", "dbias", "ddirection", "doffset")
        found = dict(zip(names, bwd(*tensors, dlogits, mean, rstd, groups, (True,) * 6), strict=True))
        return found | {"logits": logits, "mean": mean, "rstd": rstd}

    return run


def _token_draw(shape: tuple[int, ...], dtype: torch.dtype, params: str) -> Callable[[int], Any]:
    def draw(seed: int) -> tuple[Any, ...]:
        n, channels, length = shape
        hidden, residual = ((2 * _normal(2, *shape, seed=seed)) + 1).to(dtype)
        weight, bias = _normal(2, channels, seed=seed + 10)
        # Away from zero, where the derivative of the activation jumps and a rounding would decide which it is.
        parameters = _parameters(
            *(params, dtype, 1 + weight / 2, bias + 0.25 * bias.sign()),
            *(_normal(n, channels, seed=seed + 20), _normal(n, seed=seed + 30)),
        )
        return hidden, residual, *parameters, _normal(n, length, seed=seed + 40)

    return draw


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shape", "groups"), TOKENS, ids=str)
def test_token_head(kernels: Any, shape: tuple[int, ...], groups: int, dtype: torch.dtype) -> None:
    n, _, length = shape
    reference = (token_head_reference.fwd, token_head_reference.bwd)
    rows = {"dweight": n * length, "dbias": n * length, "ddirection": length, "doffset": length}
    for params in ("like x", "float32", "mixed"):
        draw = _token_draw(shape, dtype, params)
        check("token_head", kernels("token_head"), reference, _token_run(groups), draw, **rows)


def test_token_head_computes_what_is_needed(kernels: Any) -> None:
    *tensors, dlogits = _token_draw((2, 24, 11), torch.float32, "like x")(0)
    fwd, bwd = kernels("token_head")
    _, mean, rstd = fwd(*tensors, 3, 1e-5)
    everything = bwd(*tensors, dlogits, mean, rstd, 3, (True,) * 6)
    for needs in itertools.product([True, False], repeat=6):
        for need, gradient, full in zip(needs, bwd(*tensors, dlogits, mean, rstd, 3, needs), everything, strict=True):
            assert torch.equal(gradient, full) if need else gradient is None


def test_token_head_of_nothing(kernels: Any) -> None:
    fwd, bwd = kernels("token_head")
    empty = torch.zeros(0, 8, 5)
    tensors = (empty, empty, *torch.ones(2, 8), torch.zeros(0, 8), torch.zeros(0))
    logits, mean, rstd = fwd(*tensors, 2, 1e-5)
    assert logits.shape == (0, 5)
    gradients = bwd(*tensors, logits, mean, rstd, 2, (True,) * 6)
    assert [g.shape for g in gradients] == [t.shape for t in tensors] and not any(g.any() for g in gradients)


# ---- both ----


def test_heads_do_not_depend_on_the_order_of_threads(library: ctypes.CDLL, kernels: Any) -> None:
    disc = _disc_draw((3, 40, 2, 2), torch.bfloat16, "like x", channels_last)(0)
    token = _token_draw((2, 24, 70), torch.bfloat16, "like x")(0)
    found = []
    for backwards in (0, 1):
        library.sdxl_fast_emulation_configure(4, backwards)
        found.append(
            _disc_run("hinge_fake", 20)(kernels("disc_head"), disc) | _token_run(3)(kernels("token_head"), token)
        )
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_statuses(library: ctypes.CDLL) -> None:
    memory = torch.zeros(4096)
    p = memory.data_ptr()
    fwd = library.sdxl_fast_disc_head_fwd_cuda
    assert fwd(*(p,) * 10, 1, 8, 1, 4, 1e-5, 0, 1, 0, 0, 0, None) == 0
    assert fwd(*(p,) * 10, 1, 8, 1, 3, 1e-5, 0, 1, 0, 0, 0, None) == 1  # groups that do not divide
    assert fwd(*(p,) * 10, 1, 8, 0, 4, 1e-5, 0, 1, 0, 0, 0, None) == 1  # no position
    assert fwd(*(p,) * 10, 1, 8, 1, 4, 1e-5, 3, 1, 0, 0, 0, None) == 1  # no such loss
    assert fwd(*(p,) * 10, 1, 8, 1, 4, 1e-5, 0, 1, 0, 1, 1, None) == 2  # float64
    assert fwd(*(p,) * 10, 1, 8, 1, 4, 1e-5, 0, 1, 0, 0, 2, None) == 2  # bf16 parameters beside f32
    token = library.sdxl_fast_token_head_fwd_cuda
    assert token(*(p,) * 10, 1, 8, 4, 2, 1e-5, 0, 0, None) == 0
    assert token(*(p,) * 10, 1, 8, 4, 0, 1e-5, 0, 0, None) == token(*(p,) * 10, 1, 8, 0, 2, 1e-5, 0, 0, None) == 1
    assert token(*(p,) * 10, -1, 8, 4, 2, 1e-5, 0, 0, None) == 1
    assert token(*(p,) * 10, 1, 8, 4, 2, 1e-5, 1, 1, None) == 2  # float64
