"""From prompts to pictures in one step, or a few: a pipeline of our own, and diffusers' pipelines made faster."""

from .calibration import calibrate
from .install import optimize, report, restore
from .pipeline import OneStepPipeline
from .pool import Each, EnginePool

__all__ = ["Each", "EnginePool", "OneStepPipeline", "calibrate", "optimize", "report", "restore"]
