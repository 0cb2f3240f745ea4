"""The README's commands work.

A fenced block is run when its info string has the word `run` after the language: ```bash run``` or ```python run```.
Blocks run in order, in one empty directory, with this interpreter's `bin` first on the path, and must succeed. Commands
that build the project or run for minutes (`make ...`, training) stay unmarked; of those, `make` targets must exist.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
_FENCE = re.compile(r"^```(?P<language>\w+)(?P<words>[^\n]*)\n(?P<body>.*?)^```$", re.DOTALL | re.MULTILINE)


def _blocks() -> list[tuple[str, str, bool]]:
    """(language, body, whether marked `run`) of every fenced block with a language."""
    found = _FENCE.finditer(README.read_text(encoding="utf-8"))
    return [(m["language"], m["body"], "run" in m["words"].split()) for m in found]


MARKED = [(language, body) for language, body, marked in _blocks() if marked]


@pytest.fixture(scope="module")
def empty_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readme")


@pytest.mark.parametrize(("language", "body"), MARKED, ids=[body.splitlines()[0] for _, body in MARKED])
def test_marked_blocks_run(empty_directory: Path, language: str, body: str) -> None:
    command = {"bash": ["bash", "-euo", "pipefail", "-c", body], "python": [sys.executable, "-c", body]}[language]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | {"PATH": path}
    done = subprocess.run(command, cwd=empty_directory, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{body}\n{done.stdout}\n{done.stderr}"


def test_there_is_something_to_run_in_both_languages() -> None:
    assert {language for language, _ in MARKED} == {"bash", "python"}


def test_make_targets_exist() -> None:
    targets = {
        word
        for language, body, _ in _blocks()
        if language == "bash"
        for line in body.splitlines()
        if line.startswith("make ")
        for word in line.partition("#")[0].split()[1:]
        if "=" not in word and not word.startswith("-")
    }
    assert {"demo", "test"} <= targets
    for target in targets:
        done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


def test_links_inside_the_repository_are_alive() -> None:
    """Those of every page that is tracked: files and folders exist, and so do the headings that are pointed at."""
    listed = subprocess.run(["git", "ls-files", "*.md"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    pages = [ROOT / name for name in listed.split()] or [README]
    dead = []
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for target, heading in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
            if "://" in target:
                continue
            found = page.parent / target if target else page
            slugs = _slugs(found) if heading else {heading}
            if not found.exists() or heading not in slugs:
                dead.append(f"{page.relative_to(ROOT)}: {target}#{heading}")
    assert not dead


def _slugs(page: Path) -> set[str]:
    """What headings of a page are called in links."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
