"""Training: the VAE and teacher of the embedded pipeline, and progressive adversarial distillation."""

from __future__ import annotations

from pathlib import Path


def run(
    recipe: str | Path, overrides: list[str] | None = None, *, resume: str | None = None, dry_run: bool = False
) -> Path:
    """Runs a recipe to its end and returns the folder of its results; see `sdxl_fast.train.trainer.run`."""
    from .trainer import run as run_recipe

    return run_recipe(recipe, overrides or [], resume=resume, dry_run=dry_run)
