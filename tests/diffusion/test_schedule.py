"""The schedule is diffusers', and the grids are the paper's."""

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler

from sdxl_fast.diffusion import schedule
from sdxl_fast.models.config import scheduler_arguments


def test_alphas_cumprod_equal_diffusers() -> None:
    stock = EulerDiscreteScheduler(**scheduler_arguments("epsilon"))
    assert torch.equal(schedule.alphas_cumprod(), stock.alphas_cumprod)
    assert schedule.alphas_cumprod()[999].item() == pytest.approx(0.004660, abs=5e-7)


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32, 128])
def test_trailing_timesteps_equal_diffusers(steps: int) -> None:
    stock = DDIMScheduler(timestep_spacing="trailing", num_train_timesteps=1000)
    stock.set_timesteps(steps)
    assert schedule.trailing_timesteps(steps) == stock.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 8, 32, 128])
def test_next_timesteps_walk_the_trailing_grid(steps: int) -> None:
    grid = schedule.trailing_timesteps(steps)
    following = schedule.next_timesteps(torch.tensor(grid), 1000 / steps)
    assert following.tolist() == [*grid[1:], -1]


def test_next_timesteps_off_the_grid_and_at_the_end() -> None:
    t = torch.tensor([999, 749, 499, 249, -1])
    assert schedule.next_timesteps(t, 500).tolist() == [499, 249, -1, -1, -1]
    assert schedule.next_timesteps(t, 1000).tolist() == [-1] * 5


def test_alpha_sigma_of_the_clean_latent_is_exact() -> None:
    alpha, sigma = schedule.alpha_sigma(schedule.alphas_cumprod(), torch.tensor([-1, 999]), 4)
    assert alpha.shape == (2, 1, 1, 1)
    assert alpha[0].item() == 1.0 and sigma[0].item() == 0.0
    assert alpha[1].item() == pytest.approx(0.068265, abs=1e-6)
    assert sigma[1].item() == pytest.approx(0.997667, abs=1e-6)


@pytest.mark.parametrize("steps", [0, 1001])
def test_a_step_count_out_of_range_is_refused(steps: int) -> None:
    with pytest.raises(ValueError, match=f"num_steps is {steps}; allowed: 1 to 1000"):
        schedule.trailing_timesteps(steps)
