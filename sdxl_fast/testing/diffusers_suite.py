"""A pytest plugin for diffusers' own SDXL tests: every pipeline is optimized when it is made and before it is called.

Used as `pytest -p sdxl_fast.testing.diffusers_suite` in a checkout of diffusers; `--sdxl-fast-stock` runs the same
tests on stock pipelines, to compare with. What the tests take from the hub's test accounts, tokenizers and tiny text
encoders, is made here instead (`hub_stand_ins`), so nothing is downloaded; tests that pin numbers made with those fail
either way, but for those of IP-Adapter, which compute what they pin where they are given nothing. The session ends with
how many calls of each network ran packed, and why others did not.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from ..inference.install import optimize, report
from .hub_stand_ins import put_in_place

EXCEPTIONS: dict[str, str] = {}
"""Tests that are not run, by a part of their name, and why. None with the tests of diffusers 0.40 on 0.42."""

_PACKAGES = ("stable_diffusion_xl", "controlnet", "pag", "t2i_adapter")
_PACKED = "packed"

calls: dict[str, Counter[str]] = {}
"""Calls of every network, by how they ran: "packed", or why the modules ran."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options that leave pipelines as they are and keep the counts."""
    parser.addoption("--sdxl-fast-stock", action="store_true", help="run on stock pipelines, to compare with")
    parser.addoption("--sdxl-fast-calls", metavar="FILE", help="write there, as JSON, how the networks' calls ran")


def pytest_configure(config: pytest.Config) -> None:
    """Replace what comes from the hub and, unless told otherwise, optimize pipelines."""
    put_in_place()
    for pipeline in _pipelines():
        _after_init(pipeline, _evaluate)
        if not config.getoption("--sdxl-fast-stock"):
            _optimize(pipeline)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the exceptions, with their reasons, and have IP-Adapter's tests compute what they compare with."""
    for item in items:
        for base in getattr(getattr(item, "cls", None), "__mro__", ()):
            if base.__name__ == "IPAdapterTesterMixin":
                _unpin(base)
        for name, reason in EXCEPTIONS.items():
            if name in item.name:
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say how the networks' calls ran."""
    file = config.getoption("--sdxl-fast-calls")
    if file is not None:
        Path(file).write_text(json.dumps(calls))
    if not calls:
        return
    terminalreporter.section("calls of optimized networks")
    for name, ways in calls.items():
        terminalreporter.write_line(f"{name}: {ways[_PACKED]} of {ways.total()} packed")
        for way, count in ways.most_common():
            if way != _PACKED:
                terminalreporter.write_line(f"{count:6d} by its modules: {way}")


def _unpin(mixin: Any) -> None:
    stock = mixin.test_ip_adapter
    if hasattr(stock, "__wrapped__"):
        return  # done for another class

    @functools.wraps(stock)
    def test_ip_adapter(self: Any, *args: Any, expected_pipe_slice: Any = None, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)

    mixin.test_ip_adapter = test_ip_adapter


def _pipelines() -> Iterator[Any]:
    """diffusers' SDXL pipeline classes."""
    seen = set()
    for name in _PACKAGES:
        package = importlib.import_module(f"diffusers.pipelines.{name}")
        for module in pkgutil.iter_modules(package.__path__):
            if not module.name.startswith("pipeline_"):
                continue
            try:
                found = importlib.import_module(f"{package.__name__}.{module.name}")
            except ImportError:
                continue  # of another framework
            for cls in vars(found).values():
                named = inspect.isclass(cls) and cls.__name__.startswith("StableDiffusionXL")
                if named and cls.__name__.endswith("Pipeline") and "__call__" in vars(cls) and cls not in seen:
                    seen.add(cls)
                    yield cls


def _after_init(pipeline: Any, act: Callable[[Any], Any]) -> None:
    stock = pipeline.__init__

    @functools.wraps(stock)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        stock(self, *args, **kwargs)
        act(self)

    pipeline.__init__ = init


def _evaluate(pipe: Any) -> None:
    """Take networks out of training mode, as loading them does: the tests make theirs, and packed code refuses it."""
    for network in pipe.components.values():
        if isinstance(network, nn.Module):
            network.eval()


def _optimize(pipeline: Any) -> None:
    """Have a class's pipelines optimized when they are made, and again before calls, as networks may be replaced."""
    _after_init(pipeline, _optimize_if_whole)
    stock = pipeline.__call__

    @functools.wraps(stock)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        optimize(self, shapes=())
        return _counted(self, lambda: stock(self, *args, **kwargs))

    pipeline.__call__ = call


def _optimize_if_whole(pipe: Any) -> None:
    """Tests make pipelines that only encode prompts, too."""
    if pipe.unet is not None and pipe.vae is not None:
        optimize(pipe, shapes=())


def _counted(pipe: Any, run: Callable[[], Any]) -> Any:
    """What `run` returns; the networks' calls in it are added to `calls`."""
    before = _ways(pipe)
    try:
        return run()
    finally:
        for name, ways in _ways(pipe).items():
            calls.setdefault(name, Counter()).update(ways - before.get(name, Counter()))


def _ways(pipe: Any) -> dict[str, Counter[str]]:
    return {name: part.use.modules + Counter({_PACKED: part.use.packed}) for name, part in report(pipe).parts.items()}
