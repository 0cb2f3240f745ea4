"""From prompts to pictures in one step, or a few: a pipeline of our own, and diffusers' pipelines made faster."""

from .calibration import calibrate
from .install import optimize, report, restore
from .pipeline import OneStepPipeline

__all__ = ["OneStepPipeline", "calibrate", "optimize", "report", "restore"]
