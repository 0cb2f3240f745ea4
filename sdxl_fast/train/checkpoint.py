"""Checkpoints of safetensors and JSON: written under a temporary name, renamed when on the disk, never pickled.

They hold what changes. Of a module's parameters those that do not require gradients are left out: a task has made them,
from the base, the stages before or its seed, when a checkpoint is loaded into it.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, distribute_tensor

from ..files import sync_folder, sync_names
from . import distributed
from .distributed import local, on_cpu, whole

SHARDS = "shards"
WRITING = (OSError, SafetensorError)
REMEDY = "resume with the settings that it was written by, or start a run of another name"


class Stateful(Protocol):
    """Anything with the state_dict pair: modules, optimisers, averages."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Splits a tree of dicts, lists, tensors and JSON values into its tensors (by path) and the rest.

    In the rest a tensor is `{"$tensor": path}` and a dict with integer keys (an optimiser's state) `{"$int": {...}}`.
    """
    if isinstance(tree, Tensor):
        return {prefix: tree.detach()}, {"$tensor": prefix}
    if not isinstance(tree, dict | list | tuple):
        return {}, tree
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, Any] = {}
    for key, value in items:
        below, rest[str(key)] = flatten(value, f"{prefix}/{key}" if prefix else str(key))
        tensors.update(below)
    if isinstance(tree, list | tuple):
        return tensors, list(rest.values())
    return tensors, {"$int": rest} if any(isinstance(key, int) for key in tree) else rest


def unflatten(rest: Any, tensors: dict[str, Tensor]) -> Any:
    """The tree that `flatten` split; tuples come back as lists."""
    if isinstance(rest, list):
        return [unflatten(value, tensors) for value in rest]
    if not isinstance(rest, dict):
        return rest
    if "$tensor" in rest:
        return tensors[rest["$tensor"]]
    if "$int" in rest:
        return {int(key): unflatten(value, tensors) for key, value in rest["$int"].items()}
    return {key: unflatten(value, tensors) for key, value in rest.items()}


def _changing(part: Stateful) -> dict[str, Any]:
    """The state of a part; of a module what trains, and its buffers."""
    state = part.state_dict()
    if not isinstance(part, nn.Module):
        return state
    frozen = {name for name, p in part.named_parameters(remove_duplicate=False) if not p.requires_grad}
    return {name: value for name, value in state.items() if name not in frozen}


def save(folder: Path, parts: dict[str, Stateful], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes `folder/checkpoint-<images>` and removes all but the newest `keep` whole ones.

    Args:
        folder: the run's folder.
        parts: what to save, by name; one safetensors file each, of modules without what is frozen.
        state: JSON facts; `state["images"]` names the checkpoint.
        keep: complete checkpoints to leave.

    Raises:
        OSError: it cannot be written, in every process; nothing of it is left, and the checkpoints before it are.
    """
    target = folder / f"checkpoint-{state['images']:09d}"
    writing = folder / f".{target.name}"
    tensors: dict[str, dict[str, Tensor]] = {}
    structure = {}
    for name, part in parts.items():
        tensors[name], structure[name] = flatten(_changing(part))
    try:
        _write(writing, tensors, {**state, "structure": structure})
    except (*WRITING, CheckpointException) as error:
        if distributed.is_first():
            shutil.rmtree(writing, ignore_errors=True)
        kept = latest(folder)
        raise OSError(
            f"cannot write {target}: {_reason(error)}; the last whole checkpoint is {kept or 'none'}"
        ) from error
    if distributed.is_first():
        _put_aside(target)
        writing.rename(target)
        sync_names(folder)
        prune(folder, keep)
    distributed.barrier()
    return target


def prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` whole checkpoints, and what was left of writing or removing others.

    `save` does; whoever resumes must too, for a process that was killed between the two halves of its last `save`.
    """
    whole_ones = [path for path in _found(folder) if _is_whole(path)]
    for path in _found(folder):
        if path not in whole_ones[-keep:]:
            _put_aside(path)
    for stale in folder.glob(".checkpoint-*"):
        shutil.rmtree(stale, ignore_errors=True)


def _put_aside(checkpoint: Path) -> None:
    """Takes its name from a checkpoint that is to be removed: whoever is killed meanwhile leaves no half of one."""
    aside = checkpoint.with_name(f".{checkpoint.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if checkpoint.exists():
        checkpoint.rename(aside)


def _reason(error: BaseException) -> str:
    """What went wrong; of several processes that write shards, in each, without torch's stack traces."""
    if not isinstance(error, CheckpointException):
        return str(error)
    return "; ".join(f"process {rank}: {failure}" for rank, (failure, _) in error.failures.items())


def _write(folder: Path, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """One safetensors file per part; of spread tensors (FSDP2) each process writes its shards, by torch's DCP.

    All is on the disk in the end.
    """
    spread = any(isinstance(tensor, DTensor) for part in tensors.values() for tensor in part.values())

    def begin() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / "state.json").write_text(json.dumps(state))
        for name, part in {} if spread else tensors.items():
            save_file({key: on_cpu(value) for key, value in part.items()}, folder / f"{name}.safetensors")

    _by_the_first(begin)
    if spread:
        flat = {
            f"{name}/{path}": tensor.contiguous() for name, part in tensors.items() for path, tensor in part.items()
        }
        dcp.save(flat, storage_writer=dcp.HuggingFaceStorageWriter(str(folder / SHARDS), save_distributed=True))
    _by_the_first(lambda: sync_folder(folder))


def _by_the_first(work: Callable[[], None]) -> None:
    """What the first process does alone; where it fails, every one raises, or the others would wait for it."""
    failure: Exception | None = None
    if distributed.is_first():
        try:
            work()
        except WRITING as error:
            failure = error
    if distributed.agreed(failure is not None):
        raise failure or OSError("the first process could not")


def _found(folder: Path) -> list[Path]:
    """What is named like a checkpoint, oldest first."""
    return sorted(p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name))


def _is_whole(checkpoint: Path) -> bool:
    """Whether all files are there that `state.json` speaks of."""
    try:
        structure = json.loads((checkpoint / "state.json").read_text())["structure"]
    except (OSError, ValueError, KeyError):
        return False
    shards = checkpoint / SHARDS
    if shards.is_dir():
        return any(shards.iterdir())
    return all((checkpoint / f"{name}.safetensors").is_file() for name in structure)


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return next(filter(_is_whole, reversed(_found(folder))), None)


def load(checkpoint: Path, parts: dict[str, Stateful]) -> dict[str, Any]:
    """Restores `parts` in place and returns the JSON facts that were saved with them.

    Parts may be whole or spread (FSDP2), over any number of processes, however they were when saved. Frozen weights,
    which checkpoints used to hold, are read where they are there.

    Raises:
        ValueError: the checkpoint lacks one of `parts` or does not fit it, or the folder is no checkpoint.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: it holds no state.json")
    state: dict[str, Any] = json.loads(path.read_text())
    structure = state.pop("structure")
    missing = sorted(set(parts) - set(structure))
    if missing:
        raise ValueError(f"{checkpoint} holds {', '.join(structure)}; missing: {', '.join(missing)}; {REMEDY}")
    for name, part in parts.items():
        _check_names(f"{checkpoint}: {name}", part, structure[name])
    in_shards = (checkpoint / SHARDS).is_dir()
    if in_shards:
        loaded = _read_shards(checkpoint, {name: _targets(part, structure[name]) for name, part in parts.items()})
    for name, part in parts.items():
        if in_shards:
            tensors = loaded[name]
        else:
            tensors = load_file(checkpoint / f"{name}.safetensors")
            if _is_spread(part):
                tensors = _spread_like(_targets(part, structure[name]), tensors)
        values = unflatten(structure[name], tensors)
        if isinstance(part, nn.Module):
            part.load_state_dict(values, strict=False)  # frozen weights may be missing; the names are checked
        else:
            part.load_state_dict(values)
        if isinstance(part, torch.optim.Optimizer):
            _match_layout(part)
    return state


def _is_spread(part: Stateful) -> bool:
    """Whether a part's weights, or what an optimiser moves, are spread over processes (FSDP2)."""
    if isinstance(part, torch.optim.Optimizer):
        return any(isinstance(p, DTensor) for group in part.param_groups for p in group["params"])
    return any(isinstance(value, DTensor) for value in part.state_dict().values())


def _check_names(where: str, part: Stateful, structure: Any) -> None:
    """That a checkpoint has all of a part that changes and nothing unknown; an optimiser's state comes with its steps.

    Raises:
        ValueError: it lacks or holds something else; names the first.
    """
    if isinstance(part, torch.optim.Optimizer):
        return
    saved = set(_names(structure))
    _refuse(f"{where} lacks", flatten(_changing(part))[0].keys() - saved, "that train by this recipe")
    _refuse(f"{where} holds", saved - flatten(part.state_dict())[0].keys(), "that this recipe has not")


def _refuse(what: str, names: Collection[str], why: str) -> None:
    if names:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise ValueError(f"{what} {min(names)}{others} {why}; {REMEDY}")


def _targets(part: Stateful, structure: Any) -> dict[str, Tensor]:
    """The part's own tensors of those names that the checkpoint has; an optimiser makes its state if it is there.

    One that had not moved anything when it was saved, as the student's while D warms up, has none.

    Raises:
        ValueError: the checkpoint has a tensor that the part lacks.
    """
    names = _names(structure)
    if isinstance(part, torch.optim.Optimizer) and names:
        _initialise(part)
    own = flatten(part.state_dict())[0]
    _refuse("the checkpoint holds", set(names) - own.keys(), "that this recipe has not")
    return {name: own[name] for name in names}


def _names(structure: Any) -> list[str]:
    """Where the tensors of a tree lie that `flatten` split."""
    if isinstance(structure, list):
        return [name for value in structure for name in _names(value)]
    if not isinstance(structure, dict):
        return []
    if "$tensor" in structure:
        return [structure["$tensor"]]
    return [name for value in structure.values() for name in _names(value)]


def _read_shards(checkpoint: Path, wanted: dict[str, dict[str, Tensor]]) -> dict[str, dict[str, Tensor]]:
    """What this process needs of a spread checkpoint, written by any number of processes."""
    flat = {f"{name}/{path}": tensor for name, part in wanted.items() for path, tensor in part.items()}
    try:
        dcp.load(flat, storage_reader=dcp.HuggingFaceStorageReader(str(checkpoint / SHARDS)))
    except CheckpointException as error:
        raise ValueError(f"cannot read {checkpoint}: {_reason(error)}") from error
    return wanted


def _spread_like(targets: dict[str, Tensor], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors, spread as `targets` are; each process keeps its part of what it has read."""
    return {
        name: distribute_tensor(
            tensors[name].to(target.device), target.device_mesh, target.placements, src_data_rank=None
        )
        if isinstance(target, DTensor)
        else tensors[name]
        for name, target in targets.items()
    }


def _initialise(optimizer: torch.optim.Optimizer) -> None:
    """Makes the state an optimiser would have after its first step, without moving a weight."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives each moment the memory format of its parameter; files hold contiguous tensors, and torch's fused steps read
    parameter and moments side by side in memory.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _wide(tensor: Tensor) -> Tensor:
    """An average of bfloat16 weights is float32: in 8 bits it would not move."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor


class Average:
    """Exponential moving average of a module's trainable parameters, counted in images.

    Args:
        module: the module to follow; its current values are the start.
        half_life: images after which a past value weighs half.
        ramp: the half-life never exceeds this share of the images seen, so that the start is soon forgotten.
    """

    def __init__(self, module: nn.Module, half_life: float, ramp: float = 0.1) -> None:
        self.half_life, self.ramp = half_life, ramp
        self.values = {name: _wide(p.detach()).clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: nn.Module, images: int, batch: int) -> None:
        """Moves the average towards the module after a step that brought the count to `images`."""
        half_life = min(self.half_life, max(images * self.ramp, 1e-8))
        weight = 1.0 - 0.5 ** (batch / half_life)
        live = dict(module.named_parameters())
        averages = [local(value) for value in self.values.values()]
        torch._foreach_lerp_(averages, [_wide(local(live[name].detach())) for name in self.values], weight)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        """Writes the average into a module of the same architecture, spread like it or whole."""
        live = dict(module.named_parameters())
        for name, value in self.values.items():
            if isinstance(live[name], DTensor):
                local(live[name]).copy_(local(value))
            else:
                live[name].copy_(whole(value))

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        for name, value in state_dict.items():
            local(self.values[name]).copy_(local(value))
