"""Killed at any moment, told to stop, or out of disk: the run goes on to the weights of an uninterrupted one."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open

from sdxl_fast.files import file_sha256
from sdxl_fast.train import checkpoint
from sdxl_fast.train.interruptions import STOP, clear_temporaries

KILLS = 20


def _work(recipe: str, settings: list[str], cache: str, limit: int | None, message: Any) -> None:
    """A training run, in a process of its own; reports the error that ends it."""
    os.environ["SDXL_FAST_CACHE"] = cache
    torch.set_num_threads(1)
    from sdxl_fast.train import run

    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    try:
        run(recipe, settings, resume="latest")
    except OSError as error:
        message.put(str(error))
        raise SystemExit(2) from None


@pytest.fixture(scope="module")
def processes() -> Any:
    """Children of a server that has imported everything once and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        [
            *("sdxl_fast.train.stages", "sdxl_fast.train.vae", "diffusers", "peft"),
            *("matplotlib.figure", "matplotlib.backends.backend_agg", "transformers.models.clip.modeling_clip"),
        ]
    )
    first = context.Process(target=int)  # starts the server, which takes longest and is no part of any run
    first.start()
    first.join()
    return context


@pytest.fixture(scope="module")
def recipe(lightning_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A regression and one adversarial phase, with a checkpoint after every step."""
    tree = yaml.safe_load(lightning_recipe.read_text())
    regression, adversarial = tree["stages"][:2]
    regression |= {"name": "8-step", "steps": 8, "images": 12}  # few steps, as every checkpoint draws a contact sheet
    phase = {**adversarial["phases"][0], "images": 12}
    tree |= {"stages": [regression, {**adversarial, "name": "4-step", "steps": 4, "phases": [phase]}]}
    tree |= {"checkpoint_every": 4, "log_every": 4}
    path = tmp_path_factory.mktemp("recipe") / "interrupted.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Runs:
    """Starts the recipe in its own process, again and again."""

    def __init__(self, processes: Any, recipe: Path, cache: Path) -> None:
        self.processes, self.recipe, self.cache = processes, recipe, cache
        self.messages = processes.Queue()

    def start(self, name: str, limit: int | None = None, *settings: str) -> Any:
        arguments = (str(self.recipe), [f"run={name}", *settings], str(self.cache), limit, self.messages)
        process = self.processes.Process(target=_work, args=arguments)
        process.start()
        return process

    def finish(self, name: str) -> Path:
        process = self.start(name)
        process.join(600)
        assert process.exitcode == 0
        return self.cache / "runs" / name


@pytest.fixture
def runs(processes: Any, recipe: Path, tmp_path: Path) -> Runs:
    return Runs(processes, recipe, tmp_path / "cache")


def _weights(folder: Path) -> dict[str, str]:
    """Every weight that a run left for others, and its last checkpoints, by their hashes."""
    files = [path for path in sorted(folder.rglob("*.safetensors")) if "latents" not in path.name]
    return {str(path.relative_to(folder)): file_sha256(path) for path in files}


def _newest_loads(unit: Path) -> int | None:
    """Reads every tensor of the newest checkpoint; the images it stands at."""
    newest = checkpoint.latest(unit)
    if newest is None:
        return None
    state = json.loads((newest / "state.json").read_text())
    for name in state["structure"]:
        with safe_open(newest / f"{name}.safetensors", "pt") as file:
            assert all(torch.isfinite(file.get_tensor(key)).all() for key in file.keys())  # noqa: SIM118
    return int(state["images"])


@pytest.mark.slow(minutes=3)
def test_killed_at_random_moments(runs: Runs) -> None:
    started = time.perf_counter()
    whole = runs.finish("whole")
    length = time.perf_counter() - started
    draw, killed, finished = random.Random(0), 0, 0
    folder = runs.cache / "runs" / "killed"
    while killed < KILLS:
        process = runs.start("killed")
        process.join(draw.uniform(0.05, 0.9) * length)
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            killed += 1
            for unit in folder.glob("[0-9]*"):
                _newest_loads(unit)
            continue
        assert process.exitcode == 0
        finished += 1
        assert _weights(folder) == _weights(whole)
        shutil.rmtree(folder)
    again = runs.finish("killed")
    assert _weights(again) == _weights(whole)
    assert not list(again.rglob(".*")), "nothing half-written is left"


def _wait_for(condition: Any, process: Any) -> None:
    for _ in range(6000):
        if condition():
            return
        assert process.is_alive(), "the run ended before it could be told to stop"
        time.sleep(0.05)
    raise AssertionError("the run did not get there in time")


@pytest.mark.slow
def test_sigterm_saves_and_exits_0(runs: Runs) -> None:
    whole = runs.finish("whole")
    process = runs.start("told")
    unit = runs.cache / "runs" / "told" / "00-8-step-mse"
    _wait_for(lambda: checkpoint.latest(unit) is not None, process)
    before = checkpoint.latest(unit)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    assert process.exitcode == 0
    folder = runs.cache / "runs" / "told"
    assert not (folder / "export").exists()
    last = max(path for path in folder.rglob("checkpoint-*") if path.is_dir())
    assert before is not None and last >= before and _newest_loads(last.parent) is not None
    assert _weights(runs.finish("told")) == _weights(whole)


@pytest.mark.slow
def test_a_full_disk_leaves_the_last_checkpoint(runs: Runs) -> None:
    """A limit on the size of files stands for the disk: the write of the weights fails in the middle."""
    whole = runs.finish("whole")
    process = runs.start("full")
    unit = runs.cache / "runs" / "full" / "00-8-step-mse"
    _wait_for(lambda: checkpoint.latest(unit) is not None, process)
    os.kill(process.pid, signal.SIGTERM)
    process.join(300)
    folder = runs.cache / "runs" / "full"
    stood = {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoint-*/state.json")}
    assert stood
    process = runs.start("full", 100_000)
    process.join(300)
    assert process.exitcode == 2
    message = runs.messages.get(timeout=30)
    assert "cannot write" in message and "the last whole checkpoint is" in message
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("checkpoint-*/state.json")} == stood
    assert not list(folder.rglob(".checkpoint-*"))
    assert _weights(runs.finish("full")) == _weights(whole)


def test_signals_set_a_flag_inside_and_are_left_alone_outside() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with STOP.watching():
        os.kill(os.getpid(), signal.SIGTERM)
        with STOP.watching():
            assert STOP.set, "an inner watch sees what came before it"
        assert signal.getsignal(signal.SIGTERM) != before
    assert signal.getsignal(signal.SIGTERM) == before
    with STOP.watching():
        assert not STOP.set


def test_what_a_killed_process_left_is_cleared(tmp_path: Path) -> None:
    (tmp_path / "00-unit" / ".checkpoint-000000008").mkdir(parents=True)
    (tmp_path / "00-unit" / ".checkpoint-000000008" / "student.safetensors").write_text("half")
    (tmp_path / ".sheet-x.png").write_text("half")
    (tmp_path / "00-unit" / "checkpoint-000000004").mkdir()
    clear_temporaries(tmp_path)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "00-unit",
        "00-unit/checkpoint-000000004",
    ]
