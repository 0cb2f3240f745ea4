"""Where image-to-image starts: how much of a picture is kept, as a noise level.

With n steps and strength s, diffusers walks the last ⌊n·s⌋ of them, which is none for one step and any strength below
one. Here there is then one step, from the noise level that the strength stands for: t = round(s·T) - 1, the level at
which a fraction s of the noising process has run.
"""

from __future__ import annotations

from typing import Any

import torch

from ..diffusion import schedule

_ONE_STEP_SCHEDULERS = (
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "DDIMScheduler",
    "LCMScheduler",
    "TCDScheduler",
)


def check_strength(strength: float) -> float:
    """`strength` as a number in (0, 1]; raises ValueError otherwise."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not 0.0 < strength <= 1.0:
        raise ValueError(f"strength is {strength!r}; it must be above 0 (the picture as it is) and at most 1 (all new)")
    return float(strength)


def start_timestep(strength: float, num_train_timesteps: int = schedule.NUM_TRAIN_TIMESTEPS) -> int:
    """The 0-based timestep of a single step of this strength."""
    return max(round(strength * num_train_timesteps) - 1, 0)


def remaining(grid: tuple[int, ...], strength: float) -> tuple[int, ...]:
    """The part of a descending grid of timesteps that is walked for a strength; at least one step."""
    count = int(len(grid) * strength)
    return grid[len(grid) - count :] if count else (start_timestep(strength),)


def single_step(scheduler: Any, strength: float) -> torch.Tensor:
    """Set a diffusers scheduler, after its `set_timesteps`, to one step of a strength.

    Returns:
        its timesteps, [1].

    Raises:
        ValueError: a scheduler that this is not known to work with.
    """
    kind = type(scheduler).__name__
    if kind not in _ONE_STEP_SCHEDULERS:
        known = ", ".join(_ONE_STEP_SCHEDULERS)
        raise ValueError(f"{kind} cannot start one step at strength {strength}; these can: {known}")
    before = scheduler.timesteps
    timestep = start_timestep(strength, scheduler.config.num_train_timesteps)
    scheduler.timesteps = torch.tensor([timestep], dtype=before.dtype, device=before.device)
    if hasattr(scheduler, "sigmas") and isinstance(scheduler.sigmas, torch.Tensor):
        kept = scheduler.alphas_cumprod[timestep].double()
        sigma = float(((1 - kept) / kept).sqrt())
        old = scheduler.sigmas
        scheduler.sigmas = torch.tensor([sigma, 0.0], dtype=old.dtype, device=old.device)
    scheduler.num_inference_steps = 1
    for name in ("_step_index", "_begin_index"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, None)
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(0)
    return scheduler.timesteps
