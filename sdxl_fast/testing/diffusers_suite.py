"""A pytest plugin for diffusers' own SDXL pipeline tests: every pipeline is optimized before it is called.

Used as `pytest -p sdxl_fast.testing.diffusers_suite` in a checkout of diffusers; `--sdxl-fast-stock` runs the same
tests on stock pipelines, to compare with. Tokenizers of the hub's test accounts are replaced by a local one, so nothing
is downloaded; tests that pin numbers made with those fail either way.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest

EXCEPTIONS: dict[str, str] = {
    "test_torch_compile": "compiles the UNet module itself, which replaces what optimize put there",
}
"""Tests that are not run, by a part of their name, and why."""

_HUB_ACCOUNT = "hf-internal-testing/"
_PACKAGES = ("diffusers.pipelines.stable_diffusion_xl", "diffusers.pipelines.controlnet")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The option that leaves pipelines as they are."""
    parser.addoption("--sdxl-fast-stock", action="store_true", help="run on stock pipelines, to compare with")


def pytest_configure(config: pytest.Config) -> None:
    """Replace the hub's tokenizers and, unless told otherwise, optimize pipelines when they are first called."""
    _local_tokenizers()
    if not config.getoption("--sdxl-fast-stock"):
        for pipeline in _pipelines():
            _optimize_before_calls(pipeline)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the exceptions, with their reasons."""
    for item in items:
        for name, reason in EXCEPTIONS.items():
            if name in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


def _pipelines() -> Iterator[Any]:
    """diffusers' SDXL pipeline classes."""
    seen = set()
    for name in _PACKAGES:
        package = importlib.import_module(name)
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("pipeline_"):
                continue
            try:
                found = importlib.import_module(f"{name}.{module.name}")
            except ImportError:
                continue  # of another framework
            for cls in vars(found).values():
                named = inspect.isclass(cls) and cls.__name__.startswith("StableDiffusionXL")
                if named and cls.__name__.endswith("Pipeline") and "__call__" in vars(cls) and cls not in seen:
                    seen.add(cls)
                    yield cls


def _optimize_before_calls(pipeline: Any) -> None:
    from sdxl_fast import optimize

    stock = pipeline.__call__

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimize(self, shapes=())
        return stock(self, *args, **kwargs)

    pipeline.__call__ = call


def _local_tokenizers() -> None:
    import transformers

    from ..models.tokenizer import train_tokenizer
    from .toy import CAPTIONS

    tokenizer: Any = transformers.CLIPTokenizer
    stock = tokenizer.from_pretrained

    def from_pretrained(name: Any, *args: Any, **kwargs: Any) -> Any:
        if str(name).startswith(_HUB_ACCOUNT):
            return train_tokenizer(CAPTIONS, vocab_size=560)
        return stock(name, *args, **kwargs)

    tokenizer.from_pretrained = from_pretrained
