# SPDX-License-Identifier: Apache-2.0
"""What is said to people: errors on one line, names that any file can hold, durations."""

from __future__ import annotations


def printable(text: str) -> str:
    """The text with lone surrogates as escapes: names that are not Unicode can be written to any file."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def one_line(error: BaseException, limit: int | None = 300, *, named: bool = False) -> str:
    """An exception's text on one line, or its type where it has none.

    Args:
        error: what is told.
        limit: most characters, the last an ellipsis where more were cut; None: all of it.
        named: begin with the type, which says more than the text of a KeyError.
    """
    text = " ".join(str(error).split())
    text = f"{type(error).__name__}: {text}".rstrip(": ") if named or not text else text
    return printable(text if limit is None or len(text) <= limit else text[: limit - 1] + "…")


def duration(seconds: float) -> str:
    """Seconds as "42 s", "7 min" or "3 h 05 min"."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
