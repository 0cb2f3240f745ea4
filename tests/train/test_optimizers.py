"""The lean AdamW takes torch's steps, and moves bfloat16 weights by less than they can hold."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdxl_fast.random import derive_seed
from sdxl_fast.train import checkpoint, optimizers
from sdxl_fast.train.config import load_recipe
from sdxl_fast.train.optimizers import LeanAdamW, bytes_per_parameter, make_optimizer, round_stochastically
from sdxl_fast.train.settings import OptimizerConfig


def _trained(kind: Any, dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 5), nn.SiLU(), nn.Linear(5, 1)).to(dtype)
    optimizer = make_optimizer(OptimizerConfig(kind=kind, **settings), list(module.parameters()))
    for _ in range(5):
        module(torch.randn(7, 3).to(dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module, optimizer


@pytest.mark.parametrize("betas", [(0.0, 0.99), (0.9, 0.999)])
def test_the_steps_are_those_of_adamw(betas: tuple[float, float]) -> None:
    settings = {"lr": 1e-2, "betas": betas, "weight_decay": 0.1}
    plain, _ = _trained("adamw", torch.float64, **settings)
    lean, optimizer = _trained("adamw_lean", torch.float64, **settings)
    for a, b in zip(plain.parameters(), lean.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    state = next(iter(optimizer.state.values()))
    assert ("exp_avg" in state) is (betas[0] > 0)
    assert bytes_per_parameter(OptimizerConfig(kind="adamw_lean", lr=1, betas=betas), 4) == (8 if betas[0] else 4)


def _one_by_one(parameters: list[nn.Parameter], states: list[Any], settings: dict[str, Any], count: int) -> None:
    """The step in plain words, a parameter at a time."""
    (beta1, beta2), lr = settings["betas"], settings["lr"]
    for index, (parameter, state) in enumerate(zip(parameters, states, strict=True), start=1):
        if parameter.grad is None:
            continue
        wide = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        weight, gradient = parameter.detach().to(wide), parameter.grad.to(wide)
        square = state.setdefault("square", torch.zeros_like(parameter)).to(wide).mul(beta2)
        square = square.addcmul_(gradient, gradient, value=1 - beta2)
        direction = gradient
        if beta1:
            direction = state.setdefault("mean", torch.zeros_like(parameter)).to(wide).lerp(gradient, 1 - beta1)
        denominator = (square.sqrt() / math.sqrt(1 - beta2**count)).add_(settings["eps"])
        weight = weight.mul(1 - lr * settings["weight_decay"])
        weight = weight.addcdiv_(direction, denominator, value=-lr / (1 - beta1**count))
        found = {"weight": weight, "square": square, "mean": direction}
        if parameter.dtype == torch.bfloat16:
            draw = torch.Generator().manual_seed(derive_seed(count, index, 0, "rounding"))
            found = {name: round_stochastically(value, draw) for name, value in found.items()}
        parameter.data.copy_(found.pop("weight"))
        state.update(found)


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_many_weights_move_at_once_as_one_by_one(
    dtype: torch.dtype, beta1: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bitwise, whatever is moved together; one parameter has no gradient, one lies channels last."""
    monkeypatch.setattr(optimizers, "CHUNK", 50)
    torch.manual_seed(0)
    shapes = [(3,), (8, 4), (2, 3, 3, 3), (5,), (7, 7), ()]
    settings = {"lr": 1e-2, "betas": (beta1, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    mine = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    mine[2].data = mine[2].data.contiguous(memory_format=torch.channels_last)
    plain, states = [nn.Parameter(p.detach().clone()) for p in mine], [{} for _ in mine]
    optimizer = LeanAdamW(mine, **settings)
    for count in range(1, 4):
        for index, (a, b) in enumerate(zip(mine, plain, strict=True)):
            a.grad = b.grad = None if index == 3 else torch.randn(a.shape).to(dtype)
        optimizer.step()
        _one_by_one(plain, states, settings, count)
        assert all(torch.equal(a, b) for a, b in zip(mine, plain, strict=True))


def test_moments_in_8_bits_take_nearly_the_same_steps_and_resume(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="extra `train` is missing")

    def trained(kind: Any, steps: int, start: Path | None = None) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        module = nn.Linear(96, 64)  # of 4,096 elements and more bitsandbytes keeps moments in 8 bits
        optimizer = make_optimizer(OptimizerConfig(kind=kind, lr=1e-2, betas=(0.0, 0.99)), list(module.parameters()))
        if start is not None:
            checkpoint.load(start, {"module": module, "optimizer": optimizer})
        for step in range(steps):
            x = torch.randn(32, 96, generator=torch.Generator().manual_seed(step))
            module(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return module, optimizer

    start = trained("adamw", 0)[0].weight
    plain, (module, optimizer) = trained("adamw", 20)[0], trained("adamw8bit", 20)
    assert next(iter(optimizer.state.values()))["state2"].dtype == torch.uint8
    assert (module.weight - plain.weight).norm() < 0.1 * (plain.weight - start).norm()
    saved = checkpoint.save(tmp_path, {"module": module, "optimizer": optimizer}, {"images": 20})
    one, two = trained("adamw8bit", 5, saved)[0], trained("adamw8bit", 5, saved)[0]
    assert torch.equal(one.weight, two.weight)
    moments = trained("adamw8bit", 0, saved)[1].state.values()
    for ours, its in zip(moments, optimizer.state.values(), strict=True):
        assert torch.equal(ours["state2"], its["state2"])


def test_rounding_keeps_the_expectation() -> None:
    draw = torch.Generator().manual_seed(0)
    value = 1.0 + 2**-10  # an eighth of the way from 1 to the next bfloat16
    rounded = round_stochastically(torch.full((20_000,), value), draw).float()
    assert set(rounded.tolist()) == {1.0, 1.0 + 2**-7}
    assert rounded.mean().item() == pytest.approx(value, abs=2**-7 * 3 * (0.125 * 0.875 / 20_000) ** 0.5)
    exact = torch.tensor([0.0, -1.5, 3.0])
    assert torch.equal(round_stochastically(exact, draw).float(), exact)


def test_small_steps_add_up_in_bfloat16() -> None:
    weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
    optimizer = LeanAdamW([weight], lr=1e-4, betas=(0.0, 0.99), eps=1e-8, weight_decay=0.0)
    for _ in range(50):
        weight.grad = torch.full_like(weight, 0.5)
        optimizer.step()
    # each step is lr exactly, a 40th of an ulp; rounding to nearest would leave 1.0
    assert weight.float().mean().item() == pytest.approx(1.0 - 50 * 1e-4, abs=2e-4)
    assert optimizer.state[weight]["exp_avg_sq"].dtype == torch.bfloat16


def test_a_resumed_optimizer_takes_the_same_steps(tmp_path: Path) -> None:
    settings = {"lr": 1e-3, "betas": (0.0, 0.99)}
    module, optimizer = _trained("adamw_lean", torch.bfloat16, **settings)
    path = checkpoint.save(tmp_path, {"module": module, "optimizer": optimizer}, {"images": 5})
    other, its = _trained("adamw_lean", torch.bfloat16, **settings)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    checkpoint.load(path, {"module": other, "optimizer": its})
    for network, moves in ((module, optimizer), (other, its)):
        x = torch.randn(7, 3, generator=torch.Generator().manual_seed(1)).bfloat16()
        network(x).square().mean().backward()
        moves.step()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


def test_an_average_of_bfloat16_weights_moves() -> None:
    module = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.zeros_(module.weight)
    average = checkpoint.Average(module, half_life=1000.0, ramp=1e9)
    nn.init.ones_(module.weight)
    for step in range(100):
        average.update(module, step + 1, 1)
    assert average.values["weight"].item() == pytest.approx(1 - 0.5**0.1, rel=1e-3)


def test_bfloat16_weights_ask_for_the_optimizer_that_can_move_them(lightning_recipe: Path) -> None:
    with pytest.raises(ValueError, match=r"set optimizer\.kind to adamw_lean"):
        load_recipe(lightning_recipe, ["precision=bf16", "trained=bf16"])
    with pytest.raises(ValueError, match="set precision to bf16"):
        load_recipe(lightning_recipe, ["frozen=bf16"])
    lean = [f"{name}.kind=adamw_lean" for name in ("optimizer", "adversarial_optimizer", "discriminator_optimizer")]
    assert load_recipe(lightning_recipe, ["precision=bf16", "trained=bf16", *lean])
