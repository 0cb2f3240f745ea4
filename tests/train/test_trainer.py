"""The loop beneath every recipe: what it keeps of a batch that is not finite, when it stops, what it holds on to."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_fast.train import checkpoint, stages
from sdxl_fast.train.config import AddConfig, LcmConfig, load_recipe
from sdxl_fast.train.interruptions import STOP
from sdxl_fast.train.lightning import AdversarialTask
from sdxl_fast.train.trainer import Task, fit, means_of, run

MakeTask = Callable[..., AdversarialTask]
LORA: dict[str, Any] = {"steps": 8, "trains": "lora"}
FOUR = ("accumulate=4", "log_every=4", "checkpoint_every=100")


def _poison(task: Any, monkeypatch: pytest.MonkeyPatch, images: int, use: str) -> list[torch.Tensor]:
    """Makes the first micro-batch of one use NaN; what all of its micro-batches are, in the end."""
    noised, seen = task.bench.noised, []

    def poisoned(latents: torch.Tensor, timesteps: Any, *key: Any, **options: Any) -> Any:
        x_t, t = noised(latents, timesteps, *key, **options)
        if key == (images, use):
            seen.append(x_t.fill_(float("nan")) if task.bench.share.start == 0 else x_t)
        return x_t, t

    monkeypatch.setattr(task.bench, "noised", poisoned)
    return seen


def _fails(task: Task, config: Any, folder: Path, moved: str) -> dict[str, torch.Tensor]:
    with pytest.raises(FloatingPointError, match=f"is nan after 4 images; {moved}"):
        fit(task, config, 8, folder, resume=False, label="test")
    assert [path.name for path in folder.glob("not-finite*")] == ["not-finite-000000004-rank0.safetensors"]
    return load_file(folder / "not-finite-000000004-rank0.safetensors")


@pytest.mark.parametrize(
    ("use", "moved"),
    [("discriminator", "nothing was updated"), ("student", "the discriminator was updated, the other network not")],
)
def test_all_micro_batches_of_a_gradient_that_is_not_finite_are_kept(
    phase_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, use: str, moved: str
) -> None:
    task = phase_task(*FOUR, **LORA)
    seen = _poison(task, monkeypatch, 4, use)
    kept = _fails(task, task.bench.config, tmp_path / "run", moved)
    assert kept["x_t"].isnan().flatten(1).any(1).tolist() == [True, False, False, False]
    assert torch.equal(kept["x_t"][1:], torch.cat(seen)[1:])
    assert {name: len(rows) for name, rows in kept.items()} == dict.fromkeys(
        ("x_t", "timesteps", "prompt_embeds", "pooled", "time_ids"), 4
    )


def test_lcm_and_add_keep_all_micro_batches_too(
    pictures: Path, teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")
    from sdxl_fast.train.add import AddTask
    from sdxl_fast.train.lcm import LcmTask

    data = f"data={{folder: {pictures}, resolution: 64, art_size: 64}}"
    settings = [f"teacher={teacher_folder}", data, "draws=2", "batch=4", "precision=fp32", *FOUR]
    lcm, add = load_recipe("emoji_lcm", settings), load_recipe("emoji_add", settings)
    assert isinstance(lcm, LcmConfig) and isinstance(add, AddConfig)
    add = add.model_copy(update={"d_warmup": 0})
    for task, moved in (
        (LcmTask(lcm, tmp_path / "lcm"), "nothing was updated"),
        (AddTask(add, tmp_path / "add"), "nothing was updated"),
    ):
        _poison(task, monkeypatch, 4, "lcm" if isinstance(task, LcmTask) else "add")
        kept = _fails(task, task.config, tmp_path / type(task).__name__, moved)
        assert kept["x_t"].isnan().flatten(1).any(1).tolist() == [True, False, False, False]
        assert {"timesteps", "prompt_embeds", "pooled", "time_ids"} <= kept.keys()


class Killed(BaseException):
    """Stands for SIGKILL."""


class Toy(Task):
    """Moves one weight by 1 a step; `die` is killed there, `stop` is told to stop."""

    def __init__(self, *, die: int | None = None, stop: int | None = None) -> None:
        self.layer, self.batch, self.seen = torch.nn.Linear(1, 1), 4, {}
        self.parts, self.die, self.stop = {"layer": self.layer}, die, stop
        self.sheets: list[str] = []

    def step(self, images: int) -> dict[str, float]:
        if images == self.die:
            raise Killed
        STOP.set = STOP.set or images == self.stop
        return {"loss": float(images)}

    def preview(self, path: Path) -> None:
        path.touch()
        self.sheets.append(path.name)
        self.drawn = torch.rand(2, 3, 16, 16)

    def export(self, folder: Path) -> None: ...


TOY = load_recipe("emoji_lcm", ["batch=4", "images=40", "log_every=4", "checkpoint_every=1000", "device=cpu"])


def _fit(task: Toy, folder: Path, config: Any = TOY, *, resume: bool = True) -> bool:
    return fit(task, config, 40, folder, resume=resume, label="toy")


def test_what_is_saved_is_not_saved_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save = checkpoint.save

    def spy(folder: Path, parts: Any, state: Any, **options: Any) -> Path:
        saved.append(state["images"])
        return save(folder, parts, state, **options)

    monkeypatch.setattr(checkpoint, "save", spy)
    assert not _fit(Toy(stop=16), tmp_path) and saved == [20]
    with STOP.watching():  # told to stop before the first step
        STOP.set = True
        assert not _fit(Toy(), tmp_path) and saved == [20]
        assert not _fit(Toy(), tmp_path / "new") and saved == [20]
    assert _fit(Toy(), tmp_path) and saved == [20, 40]
    again = Toy()
    assert _fit(again, tmp_path) and saved == [20, 40] and again.sheets == []
    (tmp_path / "sheet-000000040.png").unlink()  # killed between the checkpoint and its sheet
    assert _fit(again, tmp_path) and saved == [20, 40] and again.sheets == ["sheet-000000040.png"]


def test_checkpoints_that_a_killed_process_had_no_time_to_remove_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where all is trained, and nothing is left to save."""
    prune = checkpoint.prune

    def killed(folder: Path, keep: int) -> None:
        if (folder / "checkpoint-000000040").exists():
            raise Killed
        prune(folder, keep)

    def there() -> list[int]:
        return sorted(int(path.name[-9:]) for path in tmp_path.glob("checkpoint-*"))

    often = TOY.model_copy(update={"checkpoint_every": 20})
    assert not _fit(Toy(stop=32), tmp_path, often)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "prune", killed)
        _fit(Toy(), tmp_path, often)
    assert there() == [20, 36, 40]
    assert _fit(Toy(), tmp_path, often)
    assert there() == [36, 40]


def test_what_a_training_begins_with_is_drawn_once_and_compared_with_nothing(tmp_path: Path) -> None:
    first, again, resumed = Toy(die=0), Toy(stop=16), Toy()
    with pytest.raises(Killed):
        _fit(first, tmp_path)
    assert not _fit(again, tmp_path) and _fit(resumed, tmp_path)
    assert first.sheets == ["sheet-000000000.png"] and first.drawn is None
    assert again.sheets == [] and resumed.sheets == ["sheet-000000040.png"]
    lines = (tmp_path / "sheets.jsonl").read_text().splitlines()
    assert [json.loads(line)["images"] for line in lines] == [40]


def test_a_contact_sheet_leaves_the_training_as_it_is(phase_task: MakeTask, tmp_path: Path) -> None:
    """Neither weights nor the random state change."""
    task = phase_task("hand_on_average=true", **LORA)
    state = torch.get_rng_state()
    before = {name: checkpoint.flatten(part.state_dict())[0] for name, part in task.parts.items()}
    before = {name: {key: value.clone() for key, value in part.items()} for name, part in before.items()}
    task.preview(tmp_path / "sheet.png")
    assert torch.equal(torch.get_rng_state(), state)
    for name, part in task.parts.items():
        after = checkpoint.flatten(part.state_dict())[0]
        assert all(torch.equal(value, after[key]) for key, value in before[name].items()), name


def test_lines_of_a_process_killed_before_its_first_checkpoint_are_not_doubled(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        _fit(Toy(die=20), tmp_path)
    assert _fit(Toy(), tmp_path)
    lines = [json.loads(line)["images"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(4, 44, 4))


PHASES = (
    "[{name: a, condition: true, trains: lora, images: 4, teacher: base},"
    "{name: b, condition: true, trains: full, images: 4, teacher: base}]"
)
TWO_UNITS = [f"stages=[{{name: 8-step, steps: 8, loss: adversarial, phases: {PHASES}}}]", "log_every=4"]


def test_an_unfinished_line_of_the_chain_counts_not(lightning_recipe: Path, cache: Path) -> None:
    folder = cache / "runs" / "distil"
    run(lightning_recipe, TWO_UNITS)
    chain = folder / "chain.jsonl"
    lines = chain.read_text().splitlines()
    chain.write_text(f"{lines[0]}\n{lines[1][:-40]}")
    assert stages.finished_units(folder) == {"00-8-step-a"}
    run(lightning_recipe, TWO_UNITS, resume="latest")
    names = ("unit", "sha256", "previous")
    again = [json.loads(line) for line in chain.read_text().splitlines()]
    assert [[line[name] for name in names] for line in again] == [
        [json.loads(line)[name] for name in names] for line in lines
    ]
    chain.write_text(f"{lines[0][:-40]}\n{lines[1]}\n")
    with pytest.raises(ValueError, match="line 1 is damaged; put it back, or remove it and all behind"):
        run(lightning_recipe, TWO_UNITS, resume="latest")


def test_a_units_networks_are_gone_before_the_next_are_built(
    lightning_recipe: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[weakref.ref[Any]] = []
    make_task = stages.make_task

    def spy(*arguments: Any) -> Any:
        assert all(each() is None for each in made)
        task = make_task(*arguments)
        made.extend(map(weakref.ref, (task, task.student.unet, task.discriminator)))
        return task

    monkeypatch.setattr(stages, "make_task", spy)
    run(lightning_recipe, TWO_UNITS)
    assert len(made) == 6


@pytest.mark.parametrize(("sub_step", "reached"), [("_discriminator_loss", 4), ("_student_loss", 8)])
def test_a_step_is_left_between_micro_batches_while_nothing_has_moved(
    phase_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sub_step: str, reached: int
) -> None:
    task = phase_task(*FOUR, **LORA)
    loss, config, folder = getattr(task, sub_step), task.bench.config, tmp_path / "run"
    begun: list[int] = []

    def told(images: int) -> Any:
        begun.append(images)
        STOP.set = STOP.set or (images == 4 and task.bench.share.start == 1)  # in the second of the four
        return loss(images)

    monkeypatch.setattr(task, sub_step, told)
    assert not fit(task, config, 12, folder, resume=False, label="test")
    assert begun == [0] * 4 + [4] * (2 if reached == 4 else 4)
    assert all(p.grad is None for update in task.updates for p in update.parameters)
    assert task.bench.share == slice(0, None)
    assert [path.name for path in folder.glob("checkpoint-*")] == [f"checkpoint-{reached:09d}"]
    monkeypatch.undo()
    resumed, whole = (phase_task(*FOUR, **LORA) for _ in range(2))
    assert fit(resumed, config, 12, folder, resume=True, label="test")
    assert fit(whole, config, 12, tmp_path / "whole", resume=False, label="test")
    for a, b in zip(resumed.parts.values(), whole.parts.values(), strict=True):
        one, other = (checkpoint.flatten(part.state_dict())[0] for part in (a, b))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_step_that_is_left_leaves_the_discriminator_to_train(
    phase_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the checkpoint, which holds what trains, would hold none of it."""
    alone: dict[str, Any] = {**LORA, "adversarial_weight": 0, "regression_weight": 1}
    task = phase_task(*FOUR, **alone)
    loss, folder = task._student_loss, tmp_path / "run"

    def told(images: int) -> Any:
        STOP.set = STOP.set or images == 4
        return loss(images)

    monkeypatch.setattr(task, "_student_loss", told)
    assert not fit(task, task.bench.config, 12, folder, resume=False, label="test")
    assert all(p.requires_grad for p in task.discriminator.parameters())
    again = phase_task(*FOUR, **alone)
    assert fit(again, task.bench.config, 8, folder, resume=True, label="test")


def test_sheets_are_decoded_one_by_one(phase_task: MakeTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pictures, to the rounding of other batch sizes, by no more memory than one takes."""
    task = phase_task("checkpoint_every=100", **LORA)
    bench, sizes = task.bench, []
    decode = type(bench).decode

    def spy(latents: torch.Tensor) -> torch.Tensor:
        sizes.append(len(latents))
        return decode(bench, latents)

    monkeypatch.setattr(bench, "decode", spy)
    task.preview(tmp_path / "one.png")
    count = 2 * len(bench.previews["pooled"])
    assert sizes == [1] * count and task.drawn is not None and not task.drawn.requires_grad
    latents = bench.pure_noise(torch.arange(3))
    torch.testing.assert_close(bench.pictures(latents), decode(bench, latents).detach(), rtol=1e-4, atol=1e-5)


class Fetches(TorchDispatchMode):
    """Counts how often a number is fetched from a tensor, for which a host waits on a GPU."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_step_fetches_the_norms_that_guard_the_weights_and_no_other_number(phase_task: MakeTask) -> None:
    task = phase_task(**LORA)
    task.step(0)
    with Fetches() as fetches:
        facts = task.step(4)
    assert fetches.count == 2
    means = means_of({name: [value, value] for name, value in facts.items()})
    assert means == {name: float(value) for name, value in facts.items()}
