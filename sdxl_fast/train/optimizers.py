"""AdamW in the forms that recipes ask for, and what moves a network: gradients, clipping, the schedule of the rate."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..random import derive_seed
from . import distributed
from .distributed import local
from .settings import OptimizerConfig

CHUNK = 1 << 25
"""Elements that are moved together: 128 MiB of each temporary."""


def learning_rate(config: OptimizerConfig, images: int, total: int) -> float:
    """The rate for the batch beginning after `images` of `total` images."""
    warm = min(1.0, (images + 1) / config.warmup) if config.warmup else 1.0
    left = min(1.0, (total - images) / config.decay) if config.decay else 1.0
    return config.lr * warm * max(left, config.final)


def round_stochastically(x: Tensor, draw: torch.Generator) -> Tensor:
    """float32 to bfloat16, up or down with the odds that keep the expectation: steps below half an ulp add up.

    Gupta et al. 2015. `draw` is a generator on the tensor's device.
    """
    below = torch.randint(1 << 16, x.shape, dtype=torch.int32, generator=draw, device=x.device)
    return ((x.view(torch.int32) + below) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


class LeanAdamW(torch.optim.Optimizer):
    """AdamW that stores what its settings need: no first moment where betas[0] is 0, as in adversarial stages.

    Weights in float32 or float64 move as by `torch.optim.AdamW`. Weights in bfloat16 are moved in float32 and rounded
    stochastically, and so is their second moment; the draws follow from the step alone. 8 bytes of weights and moments
    per float32 parameter and 4 per bfloat16 one, where AdamW has 12.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], **settings: Any) -> None:
        super().__init__(parameters, settings)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients at hand."""
        index = 0
        for group in self.param_groups:
            alike: defaultdict[Any, list[tuple[int, nn.Parameter]]] = defaultdict(list)
            for parameter in group["params"]:
                index += 1
                if parameter.grad is not None:
                    count = self._count(parameter, group)
                    alike[parameter.device, parameter.dtype, count].append((index, parameter))
            for (_, _, count), found in alike.items():
                for some in _chunks(found):
                    self._move(some, group, count)

    def _count(self, parameter: nn.Parameter, group: dict[str, Any]) -> int:
        """Which step of this parameter it is; its state is made ahead of the first."""
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
            if group["betas"][0]:
                state["exp_avg"] = torch.zeros_like(parameter)
        state["step"] += 1
        return int(state["step"].item())

    def _move(self, some: list[tuple[int, nn.Parameter]], group: dict[str, Any], count: int) -> None:
        """Moves parameters of one device and dtype, a kernel for all of them at once where torch has that."""
        beta1, beta2 = group["betas"]
        weights = [local(p) for _, p in some]
        wide = torch.float64 if weights[0].dtype == torch.float64 else torch.float32
        states = [self.state[p] for _, p in some]
        moved, gradients = ([x.to(wide) for x in xs] for xs in (weights, [local(p.grad) for _, p in some]))  # type: ignore[arg-type]
        squares = [local(state["exp_avg_sq"]).to(wide) for state in states]
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, value=1 - beta2)
        directions = gradients
        if beta1:
            directions = [local(state["exp_avg"]).to(wide) for state in states]
            torch._foreach_lerp_(directions, gradients, 1 - beta1)
        denominators = torch._foreach_sqrt(squares)
        torch._foreach_div_(denominators, math.sqrt(1 - beta2**count))
        torch._foreach_add_(denominators, group["eps"])
        torch._foreach_mul_(moved, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_addcdiv_(moved, directions, denominators, value=-group["lr"] / (1 - beta1**count))
        if weights[0].dtype != torch.bfloat16:
            return  # written in place
        for (index, parameter), state, *rounded in zip(some, states, moved, squares, directions, strict=True):
            rank = distributed.rank() if isinstance(parameter, DTensor) else 0
            draw = torch.Generator(parameter.device).manual_seed(derive_seed(count, index, rank, "rounding"))
            kept = [parameter, state["exp_avg_sq"], *([state["exp_avg"]] if beta1 else [])]
            for target, value in zip(kept, rounded, strict=False):
                local(target).copy_(round_stochastically(value, draw))


def _chunks(found: list[tuple[int, nn.Parameter]]) -> Iterator[list[tuple[int, nn.Parameter]]]:
    """Parts of a list of at most `CHUNK` elements, or one parameter, which bounds what a step holds beside weights."""
    part: list[tuple[int, nn.Parameter]] = []
    size = 0
    for each in found:
        count = local(each[1]).numel()
        if part and size + count > CHUNK:
            yield part
            part, size = [], 0
        part.append(each)
        size += count
    if part:
        yield part


def make_optimizer(config: OptimizerConfig, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW over the parameters; fused where torch has it for their device, lean, or in 8 bits by bitsandbytes.

    Raises:
        ValueError: 8 bits are asked for and bitsandbytes is not installed.
    """
    settings: dict[str, Any] = {
        **{"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    }
    if config.kind == "adamw":
        return torch.optim.AdamW(parameters, fused=True, **settings)
    if config.kind == "adamw_lean":
        return LeanAdamW(parameters, **settings)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        raise ValueError("optimizer.kind is adamw8bit, which needs: pip install bitsandbytes") from None
    optimizer: torch.optim.Optimizer = AdamW8bit(parameters, **settings)
    return optimizer


def bytes_per_parameter(config: OptimizerConfig, weight: int) -> int:
    """What an optimiser of this kind keeps beside each parameter of `weight` bytes."""
    if config.kind == "adamw8bit":
        return 2
    moments = 1 if config.kind == "adamw_lean" and config.betas[0] == 0 else 2
    return moments * weight


class Update:
    """What moves one network: its optimiser with the schedule of its rate, over gradients of several micro-batches.

    Args:
        config: rates and clipping.
        parameters: those that train.
        total: length of the training in images, where the schedule ends.
    """

    def __init__(self, config: OptimizerConfig, parameters: Iterable[nn.Parameter], total: int) -> None:
        self.config, self.parameters, self.total = config, list(parameters), total
        self.optimizer = make_optimizer(config, self.parameters)
        self.moved_after: int | None = None
        """The images after which it last moved the weights."""

    def step(self, images: int) -> float:
        """Gathers the gradients of all processes, clips, moves the weights; returns the norm before clipping.

        Raises:
            FloatingPointError: a gradient is not finite; nothing was updated.
        """
        distributed.average_gradients(self.parameters)
        clipped = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        norm = distributed.whole(clipped).item()
        if not math.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm} after {images} images")
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.config, images, self.total)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.moved_after = images
        return norm
