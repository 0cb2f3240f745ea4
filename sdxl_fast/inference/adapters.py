"""LoRAs merged into the weights in place: load, mix, swap and remove them while pictures are drawn.

The weights stay where they are, so CUDA graphs stay valid; a copy of every weight that a LoRA touches is kept, from
which each mixture is made afresh and rounded once, so that removing the LoRAs gives the first weights back bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..errors import ModelError
from ..models.lora import check_pair
from ..models.lora_file import read_lora_file
from ..models.weights import listing

Factors = tuple[Tensor, Tensor, float]


@dataclass(slots=True)
class Adapter:
    """A LoRA that is loaded: (down, up, alpha / rank) by component and module, and its present strength."""

    path: Path
    factors: dict[str, dict[str, Factors]]
    strength: float

    @property
    def nbytes(self) -> int:
        """Memory of its matrices."""
        pairs = (pair for modules in self.factors.values() for pair in modules.values())
        return sum(down.nbytes + up.nbytes for down, up, _ in pairs)


@dataclass(slots=True)
class _Network:
    component: str
    module: nn.Module
    pristine: dict[str, Tensor] = field(default_factory=dict)


class Adapters:
    """The LoRAs of a pipeline.

    Args:
        networks: what LoRAs change, by the names files give them: "unet", "text_encoder", "text_encoder_2".
        changed: called after weights have changed.
    """

    def __init__(self, networks: Mapping[str, nn.Module], *, changed: Callable[[], None]) -> None:
        self._networks = [_Network(name, module) for name, module in networks.items()]
        self._changed = changed
        self._loaded: dict[str, Adapter] = {}

    @property
    def strengths(self) -> dict[str, float]:
        """Loaded LoRAs and how strongly each is merged; 0 is not at all."""
        return {name: adapter.strength for name, adapter in self._loaded.items()}

    @property
    def nbytes(self) -> int:
        """Memory of the LoRAs and of the copies of the first weights."""
        kept = sum(t.nbytes for network in self._networks for t in network.pristine.values())
        return kept + sum(adapter.nbytes for adapter in self._loaded.values())

    def add_network(self, component: str, module: nn.Module) -> None:
        """Another network that the LoRAs of a component belong in, such as the UNet for another step count."""
        self._networks.append(_Network(component, module))
        if self._loaded:
            self._apply()

    def load(
        self, path: str | Path, *, name: str | None = None, strength: float = 1.0, alpha: float | None = None
    ) -> str:
        """Read a LoRA in kohya's, diffusers' or peft's dialect and merge it beside those that are loaded.

        Args:
            path: a .safetensors file or the folder of a peft adapter.
            name: to speak of it by; None is the file's name.
            strength: factor of its change.
            alpha: what it was trained with, for a file that does not say.

        Returns:
            its name.

        Raises:
            ModelError: unsafe or broken, keys that match no module (they are listed), or of another architecture;
                nothing has changed then.
            ValueError: a name that is taken.
        """
        path = Path(path)
        name = path.name.removesuffix(".safetensors") if name is None else name
        if name in self._loaded:
            raise ValueError(f"a LoRA called {name!r} is loaded already; give it another name, or delete that first")
        self._loaded[name] = Adapter(path, self._read(path, alpha), check_strength(strength))
        self._apply()
        return name

    def set(self, names: Sequence[str], strengths: Sequence[float]) -> None:
        """Merge exactly these, each as strongly as given; the others stay loaded with strength 0."""
        if len(names) != len(strengths):
            raise ValueError(f"{len(strengths)} weights for {len(names)} LoRAs")
        wanted = {name: check_strength(strength) for name, strength in zip(names, strengths, strict=True)}
        for name in wanted:
            self._known(name)
        for name, adapter in self._loaded.items():
            adapter.strength = wanted.get(name, 0.0)
        self._apply()

    def delete(self, names: Sequence[str]) -> None:
        """Remove LoRAs; with the last one the first weights are back, bit for bit."""
        for name in names:
            self._known(name)
        for name in names:
            self._loaded.pop(name, None)
        self._apply()
        if not self._loaded:
            for network in self._networks:
                network.pristine.clear()

    def clear(self) -> None:
        """Remove all LoRAs."""
        self.delete(list(self._loaded))

    def _known(self, name: str) -> None:
        if name not in self._loaded:
            raise ValueError(f"no LoRA called {name!r} is loaded; there are: {listing(self._loaded) or 'none'}")

    def _read(self, path: Path, alpha: float | None) -> dict[str, dict[str, Factors]]:
        """The file's matrices on the networks' devices, every one checked against the weight it is for."""
        unet = next(network.module for network in self._networks if network.component == "unet")
        file = read_lora_file(path, modules=[name for name, _ in unet.named_modules()], alpha=alpha)
        found: dict[str, dict[str, Factors]] = {}
        unmatched = []
        for key, pair in file.pairs.items():
            component, _, module = key.partition(".")
            targets = [network.module for network in self._networks if network.component == component]
            weight = weight_of(targets[0], module) if targets else None
            if weight is None:
                unmatched.append(key)
                continue
            check_pair(path, key, pair, weight)
            down, up = (part.read().to(weight.device, copy=True) for part in (pair.down, pair.up))
            if not bool(down.isfinite().all() and up.isfinite().all()):
                raise ModelError(f"{path}: {key} holds numbers that are not finite")
            found.setdefault(component, {})[module] = (down, up, pair.alpha / pair.rank)
        if unmatched:
            raise ModelError(f"{path}: {len(unmatched)} keys match no module: {listing(unmatched)}")
        return found

    @torch.no_grad()
    def _apply(self) -> None:
        """Make every touched weight from its first value and the LoRAs in force."""
        for network in self._networks:
            mixture: dict[str, list[Factors]] = {}
            for adapter in self._loaded.values():
                for module, (down, up, scale) in adapter.factors.get(network.component, {}).items():
                    parts = mixture.setdefault(module, [])
                    if adapter.strength:
                        parts.append((down, up, scale * adapter.strength))
            merges = []
            for module in mixture.keys() | network.pristine.keys():
                weight = weight_of(network.module, module)
                if weight is None:
                    continue
                first = network.pristine.setdefault(module, weight.detach().clone())
                if mixture.get(module):
                    merges.append((weight, first, *_joined(mixture[module])))
                else:
                    weight.copy_(first)
            _merge(merges)
        self._changed()


class LoraVerbs:
    """diffusers' verbs for LoRAs, for a class that has `_adapters`."""

    _adapters: Adapters

    def load_lora_weights(
        self,
        path: str | Path,
        adapter_name: str | None = None,
        *,
        weight: float = 1.0,
        alpha: float | None = None,
    ) -> str:
        """Merge a LoRA, in kohya's, diffusers' or peft's dialect, beside those that are loaded; returns its name.

        Args:
            path: a .safetensors file or the folder of a peft adapter.
            adapter_name: to speak of it by; None is the file's name.
            weight: factor of its change.
            alpha: what it was trained with, for a file that does not say.

        Raises:
            ModelError: unsafe or broken, keys that match no module (they are listed), or of another architecture;
                nothing has changed then.
            ValueError: a name that is taken.
        """
        return self._adapters.load(path, name=adapter_name, strength=weight, alpha=alpha)

    def set_adapters(
        self, adapter_names: str | Sequence[str], adapter_weights: float | Sequence[float] | None = None
    ) -> None:
        """Merge exactly these LoRAs, each with its weight (1 by default); the others stay loaded but idle.

        Raises:
            ValueError: a name that is not loaded, or another number of weights.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        weights = 1.0 if adapter_weights is None else adapter_weights
        self._adapters.set(names, [weights] * len(names) if isinstance(weights, int | float) else list(weights))

    @property
    def loras(self) -> dict[str, float]:
        """The LoRAs that are loaded and how strongly each is merged; 0 is idle."""
        return self._adapters.strengths

    def get_active_adapters(self) -> list[str]:
        """The LoRAs that change pictures now."""
        return [name for name, weight in self._adapters.strengths.items() if weight]

    def delete_adapters(self, adapter_names: str | Sequence[str]) -> None:
        """Remove LoRAs; with the last one the first weights are back bit for bit.

        Raises:
            ValueError: a name that is not loaded.
        """
        self._adapters.delete([adapter_names] if isinstance(adapter_names, str) else list(adapter_names))

    def unload_lora_weights(self) -> None:
        """Remove all LoRAs."""
        self._adapters.clear()


def weight_of(network: nn.Module, module: str) -> Any:
    """The weight of a linear layer or convolution by its name; None when there is none.

    Text encoders are met with and without the leading "text_model." in files and in transformers' versions.
    """
    for name in (module, module.removeprefix("text_model."), f"text_model.{module}"):
        try:
            return getattr(network.get_submodule(name), "weight", None)
        except AttributeError:
            continue
    return None


def check_strength(strength: float) -> float:
    """`strength` as a number; raises ValueError for what is none or not finite."""
    if isinstance(strength, bool) or not isinstance(strength, int | float) or not abs(strength) < float("inf"):
        raise ValueError(f"a LoRA's weight is {strength!r}; it must be a finite number")
    return float(strength)


def _joined(parts: Sequence[Factors]) -> tuple[Tensor, Tensor]:
    """Several LoRAs of a weight as one, with their scales in it, so that their sum is rounded once."""
    down = torch.cat([down.float().flatten(1) for down, _, _ in parts])
    return down, torch.cat([scale * up.float().flatten(1) for _, up, scale in parts], 1)


def _merge(merges: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]]) -> None:
    """weight = first + up · down for every (weight, first, down, up), in place."""
    if not merges:
        return
    weights, firsts, downs, ups = (list(column) for column in zip(*merges, strict=True))
    downs = [down.view(len(down), *weight.shape[1:]) for down, weight in zip(downs, weights, strict=True)]
    ups = [up.view(*up.shape, *(1 for _ in weight.shape[2:])) for up, weight in zip(ups, weights, strict=True)]
    ops.lora_merge(weights, downs, ups, bases=firsts)
