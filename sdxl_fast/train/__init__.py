"""Training: the VAE and teacher of the embedded pipeline, and progressive adversarial distillation."""

from __future__ import annotations

from pathlib import Path


def run(
    recipe: str | Path,
    overrides: list[str] | None = None,
    *,
    resume: str | None = None,
    dry_run: bool = False,
    processes: int | None = None,
) -> Path:
    """Runs a recipe to its end.

    Args:
        recipe: path of a YAML recipe, or the name of one of the package's.
        overrides: `a.b=value` settings that replace the recipe's.
        resume: "latest" goes on from the newest checkpoint of the run; None starts anew and refuses a folder in use.
        dry_run: print what would run and stop.
        processes: for how many to print it; None: those that are running.

    Returns:
        the folder of its exported result.

    Raises:
        ValueError: bad recipe or `resume`, or the run's folder already holds a run.
    """
    from .trainer import run as run_recipe

    return run_recipe(recipe, overrides or [], resume=resume, dry_run=dry_run, processes=processes)
