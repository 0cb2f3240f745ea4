"""From prompts to pictures in one step, or a few."""

from .pipeline import OneStepPipeline

__all__ = ["OneStepPipeline"]
