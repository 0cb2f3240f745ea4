"""Conversions invert one another, and the move between two levels is DDIM."""

import pytest
import torch
from diffusers import DDIMScheduler

from sdxl_fast import ops
from sdxl_fast.diffusion import prediction, schedule

TYPES = ["epsilon", "sample", "v_prediction"]
TABLE = schedule.alphas_cumprod().double()


def _sample(timesteps: list[int]) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(0)
    x0, noise = torch.randn(2, len(timesteps), 4, 8, 8, dtype=torch.float64)
    t = torch.tensor(timesteps)
    alpha, sigma = schedule.alpha_sigma(TABLE, t, 4)
    return x0, noise, t, alpha * x0 + sigma * noise


@pytest.mark.parametrize("kind", TYPES)
def test_the_right_output_gives_back_x0_and_noise(kind: prediction.PredictionType) -> None:
    x0, noise, t, x_t = _sample([0, 249, 999])
    output = prediction.target(x0, noise, t, TABLE, kind)
    torch.testing.assert_close(prediction.to_x0(output, x_t, t, TABLE, kind), x0)
    torch.testing.assert_close(prediction.to_epsilon(output, x_t, t, TABLE, kind), noise)


@pytest.mark.parametrize("kind", TYPES)
def test_move_equals_ddim(kind: prediction.PredictionType) -> None:
    _, _, _, x_t = _sample([999])
    output = torch.randn_like(x_t)
    stock = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="trailing",
        prediction_type=kind,
        clip_sample=False,
        set_alpha_to_one=True,
    )
    stock.set_timesteps(4)
    levels = {"timesteps": torch.tensor([999]), "next_timesteps": torch.tensor([749]), "alphas_cumprod": TABLE}
    moved = ops.ddim_move(x_t, output, **levels, prediction_type=kind)
    torch.testing.assert_close(moved, stock.step(output, 999, x_t).prev_sample, rtol=1e-6, atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    _, _, t, x_t = _sample([999])
    low = x_t.bfloat16()
    assert prediction.to_x0(low, low, t, TABLE, "epsilon").dtype == torch.float32


def test_an_unknown_prediction_type_names_the_known_ones() -> None:
    _, _, t, x_t = _sample([1])
    with pytest.raises(ValueError, match="allowed: epsilon, sample, v_prediction"):
        prediction.to_x0(x_t, x_t, t, TABLE, "eps")  # type: ignore[arg-type]
