# SPDX-License-Identifier: Apache-2.0
"""What is said to people."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from sdxl_fast.text import duration, one_line, printable

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("error", "plain", "named"),
    [
        (OSError("first\n  second\tline "), "first second line", "OSError: first second line"),
        (KeyError("x"), "'x'", "KeyError: 'x'"),
        (StopIteration(), "StopIteration", "StopIteration"),
        (ValueError("name \udce4"), "name \\udce4", "ValueError: name \\udce4"),
    ],
)
def test_an_error_is_one_line(error: Exception, plain: str, named: str) -> None:
    assert one_line(error) == plain
    assert one_line(error, named=True) == named


def test_a_long_error_is_cut_where_asked() -> None:
    error = ValueError("x" * 1000)
    assert one_line(error, 20) == "x" * 19 + "…" and len(one_line(error)) == 300
    assert one_line(error, None) == "x" * 1000
    assert len(one_line(ValueError("\udce4" * 300)).encode()) == 6 * 300


def test_names_that_are_not_unicode_can_be_written() -> None:
    assert printable("größe") == "größe"
    assert printable("a\udcff.png").encode() == b"a\\udcff.png"


def test_durations() -> None:
    found = [duration(seconds) for seconds in (0, 41.6, 99.4, 100, 420, 5_969, 6_000, 11_100)]
    assert found == ["0 s", "42 s", "99 s", "2 min", "7 min", "99 min", "1 h 40 min", "3 h 05 min"]


def test_nobody_has_a_helper_of_these_of_its_own() -> None:
    names = {"printable", "one_line", "duration"}
    found = [
        f"{path.relative_to(ROOT)}::{node.name}"
        for folder in ("sdxl_fast", "benchmarks")
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and node.name.strip("_") in names
    ]
    assert sorted(found) == [f"sdxl_fast/text.py::{name}" for name in ("duration", "one_line", "printable")]
