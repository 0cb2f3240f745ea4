"""Recipes are validated data."""

from pathlib import Path

import pytest

from sdxl_fast.train.config import RECIPES, LightningConfig, load_recipe


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_recipe_of_the_package_is_valid(name: str) -> None:
    assert load_recipe(name).run


def test_integers_become_the_floats_that_adam_wants(lightning_recipe: Path) -> None:
    config = load_recipe(lightning_recipe)
    assert isinstance(config, LightningConfig)
    assert config.adversarial_optimizer.betas == (0.0, 0.99)
    assert all(isinstance(beta, float) for beta in config.adversarial_optimizer.betas)


def test_overrides_reach_into_lists_and_are_typed(lightning_recipe: Path) -> None:
    config = load_recipe(lightning_recipe, ["batch=2", "stages.1.phases.0.images=40", "optimizer.lr=1.0e-5"])
    assert isinstance(config, LightningConfig)
    assert (config.batch, config.stages[1].phases[0].images, config.optimizer.lr) == (2, 40, 1e-5)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lrr=1", "optimizer.lrr is not a setting; did you mean lr?"),
        ("stages.1.phases.0.train=full", "stages.1.phases.0.train is not a setting; did you mean trains?"),
        ("gidance_scale=3", "gidance_scale is not a setting; did you mean guidance_scale?"),
        ("batch=0", "batch: Input should be greater than 0"),
        ("kind=lightening", "kind"),
        ("batch", "not of the form a.b=value"),
        ("stages.0.timestep_weights=[1,2]", "timestep_weights"),
        ("stages.1.phases.0.renoise_weights=[1]", "renoise_weights"),
    ],
)
def test_a_wrong_setting_is_named(lightning_recipe: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        load_recipe(lightning_recipe, [override])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("discriminator.r1=1", "discriminator.r1 is 1, .* set discriminator.approximate_r1 instead"),
        ("optimizer.kind=adamw8bit", "optimizer.kind is adamw8bit, .* set it to adamw_lean"),
    ],
)
def test_what_shards_cannot_do_is_refused(lightning_recipe: Path, override: str, message: str) -> None:
    assert load_recipe(lightning_recipe, [override])
    with pytest.raises(ValueError, match=message):
        load_recipe(lightning_recipe, [override, "parallel=fsdp"])


def test_an_unknown_recipe_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="emoji_lightning"):
        load_recipe("no_such_recipe")
