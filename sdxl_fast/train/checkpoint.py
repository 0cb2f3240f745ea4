"""Checkpoints of safetensors and JSON: written under a temporary name, renamed when whole, never pickled."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class Stateful(Protocol):
    """Anything with the state_dict pair: modules, optimisers, averages."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any: ...


def flatten(tree: Any, prefix: str = "") -> tuple[dict[str, Tensor], Any]:
    """Splits a tree of dicts, lists, tensors and JSON values into its tensors (by path) and the rest.

    In the rest a tensor is `{"$tensor": path}` and a dict with integer keys (an optimiser's state) `{"$int": {...}}`.
    """
    if isinstance(tree, Tensor):
        return {prefix: tree.detach().contiguous()}, {"$tensor": prefix}
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


def save(folder: Path, parts: dict[str, Stateful], state: dict[str, Any], *, keep: int = 2) -> Path:
    """Writes `folder/checkpoint-<images>` and removes all but the newest `keep`.

    Args:
        folder: the run's folder.
        parts: what to save, by name; one safetensors file each.
        state: JSON facts; `state["images"]` names the checkpoint.
        keep: complete checkpoints to leave.
    """
    target = folder / f"checkpoint-{state['images']:09d}"
    writing = folder / f".{target.name}.{os.getpid()}"
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    structure = {}
    for name, part in parts.items():
        tensors, structure[name] = flatten(part.state_dict())
        save_file({key: value.clone() for key, value in tensors.items()}, writing / f"{name}.safetensors")
    (writing / "state.json").write_text(json.dumps({**state, "structure": structure}))
    shutil.rmtree(target, ignore_errors=True)
    writing.rename(target)
    for old in sorted(folder.glob("checkpoint-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    for stale in folder.glob(".checkpoint-*"):
        shutil.rmtree(stale, ignore_errors=True)
    return target


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    found = [p for p in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", p.name)]
    return max(found, default=None)


def load(checkpoint: Path, parts: dict[str, Stateful]) -> dict[str, Any]:
    """Restores `parts` in place and returns the JSON facts that were saved with them.

    Raises:
        ValueError: the checkpoint lacks one of `parts`, or the folder is no checkpoint.
    """
    path = checkpoint / "state.json"
    if not path.is_file():
        raise ValueError(f"{checkpoint} is no checkpoint: it holds no state.json")
    state: dict[str, Any] = json.loads(path.read_text())
    structure = state.pop("structure")
    missing = sorted(set(parts) - set(structure))
    if missing:
        raise ValueError(f"{checkpoint} holds {', '.join(structure)}; missing: {', '.join(missing)}")
    for name, part in parts.items():
        tensors = load_file(checkpoint / f"{name}.safetensors")
        part.load_state_dict(unflatten(structure[name], tensors))
        if isinstance(part, torch.optim.Optimizer):
            _match_layout(part)
    return state


def _match_layout(optimizer: torch.optim.Optimizer) -> None:
    """Gives each moment the memory format of its parameter; files hold contiguous tensors, and torch's fused steps read
    parameter and moments side by side in memory.
    """
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == parameter.shape:
                state[key] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


class Average:
    """Exponential moving average of a module's trainable parameters, counted in images.

    Args:
        module: the module to follow; its current values are the start.
        half_life: images after which a past value weighs half.
        ramp: the half-life never exceeds this share of the images seen, so that the start is soon forgotten.
    """

    def __init__(self, module: torch.nn.Module, half_life: float, ramp: float = 0.1) -> None:
        self.half_life, self.ramp = half_life, ramp
        self.values = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, images: int, batch: int) -> None:
        """Moves the average towards the module after a step that brought the count to `images`."""
        half_life = min(self.half_life, max(images * self.ramp, 1e-8))
        weight = 1.0 - 0.5 ** (batch / half_life)
        live = dict(module.named_parameters())
        torch._foreach_lerp_(list(self.values.values()), [live[name].detach() for name in self.values], weight)

    @torch.no_grad()
    def copy_to(self, module: torch.nn.Module) -> None:
        """Writes the average into a module of the same architecture."""
        live = dict(module.named_parameters())
        for name, value in self.values.items():
            live[name].copy_(value)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.values)

    def load_state_dict(self, state_dict: dict[str, Any], /) -> None:
        for name, value in state_dict.items():
            self.values[name].copy_(value)
