"""Where image-to-image starts."""

from __future__ import annotations

import pytest
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler

from sdxl_fast.inference.start import check_strength, remaining, single_step, start_timestep


def test_the_last_steps_are_walked_and_at_least_one() -> None:
    grid = (999, 749, 499, 249)
    assert remaining(grid, 1.0) == grid
    assert remaining(grid, 0.5) == (499, 249)
    assert remaining(grid, 0.99) == (749, 499, 249)
    assert remaining(grid, 0.2) == (199,)
    assert remaining((999,), 1.0) == (999,)
    assert remaining((399,), 0.5) == (499,)


def test_a_strength_is_a_noise_level() -> None:
    assert [start_timestep(s) for s in (1.0, 0.9999, 0.8, 0.001, 0.0001)] == [999, 999, 799, 0, 0]


@pytest.mark.parametrize("strength", [0.0, -0.1, 1.01, float("nan"), "0.5", True, None])
def test_what_is_no_strength_is_refused(strength: object) -> None:
    with pytest.raises(ValueError, match="strength is"):
        check_strength(strength)  # type: ignore[arg-type]


def test_a_scheduler_is_set_to_one_step() -> None:
    scheduler = EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    scheduler.set_timesteps(timesteps=[599])
    wanted = float(scheduler.sigmas[0])
    scheduler.set_timesteps(1)
    assert single_step(scheduler, 0.6).tolist() == [599]
    assert scheduler.sigmas.tolist() == pytest.approx([wanted, 0.0], rel=1e-5)
    ddim = DDIMScheduler()
    ddim.set_timesteps(3)
    assert single_step(ddim, 0.1).tolist() == [99]
    assert ddim.num_inference_steps == 1
    with pytest.raises(ValueError, match="HeunDiscreteScheduler cannot"):
        single_step(HeunDiscreteScheduler(), 0.5)
