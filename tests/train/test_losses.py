"""Losses against numbers worked out by hand."""

import math

import pytest
import torch

from sdxl_fast.train import losses

REAL, FAKE = torch.tensor([2.0, -1.0]), torch.tensor([-3.0, 0.5])


def test_non_saturating_losses_are_the_papers_logarithms() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    d = sum(-math.log(sigmoid(r)) for r in (2.0, -1.0)) / 2 + sum(-math.log(1 - sigmoid(f)) for f in (-3.0, 0.5)) / 2
    assert losses.non_saturating_discriminator(REAL, FAKE).item() == pytest.approx(d, rel=1e-6)
    g = sum(-math.log(sigmoid(f)) for f in (-3.0, 0.5)) / 2
    assert losses.non_saturating_generator(FAKE).item() == pytest.approx(g, rel=1e-6)


def test_chance_is_two_ln_two_and_nothing_overflows() -> None:
    zero = torch.zeros(3)
    assert losses.non_saturating_discriminator(zero, zero).item() == pytest.approx(2 * math.log(2))
    huge = torch.tensor([500.0]).bfloat16()
    assert losses.non_saturating_discriminator(-huge, huge).item() == pytest.approx(1000.0)
    assert losses.non_saturating_generator(huge).item() == 0.0


def test_the_students_gradient_does_not_vanish_when_the_discriminator_is_sure() -> None:
    logits = torch.tensor([-20.0], requires_grad=True)
    losses.non_saturating_generator(logits).backward()
    assert logits.grad is not None and logits.grad.item() == pytest.approx(-1.0, abs=1e-6)


def test_hinge() -> None:
    assert losses.hinge_discriminator(REAL, FAKE).item() == pytest.approx((0 + 2.0) / 2 + (0 + 1.5) / 2)
    assert losses.hinge_generator(FAKE).item() == pytest.approx(1.25)


def test_accuracy_counts_both_kinds() -> None:
    assert losses.accuracy(REAL, FAKE).item() == 0.5
    assert losses.accuracy(torch.ones(4), -torch.ones(4)).item() == 1.0


def test_accuracy_of_a_batch_is_the_mean_of_its_halves() -> None:
    """As distributed processes average it: rounded to float32 it would differ in the eighth digit."""
    real, fake = (torch.randn(4, 341, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    halves = [losses.accuracy(*pair).item() for pair in zip(real.chunk(2), fake.chunk(2), strict=True)]
    assert losses.accuracy(real, fake).item() == pytest.approx(sum(halves) / 2, rel=1e-15)


def test_distances() -> None:
    prediction, target = torch.tensor([1.0, -3.0]), torch.tensor([0.0, 0.0])
    assert losses.distance(prediction, target).item() == pytest.approx(5.0)
    assert losses.distance(prediction, target, "l1").item() == pytest.approx(2.0)
    huber = losses.distance(prediction, target, "huber").item()
    assert huber == pytest.approx((math.hypot(1, 1e-3) + math.hypot(3, 1e-3)) / 2 - 1e-3, rel=1e-6)
    assert losses.distance(torch.ones(4, dtype=torch.bfloat16), torch.zeros(4)).dtype == torch.float32


def test_gradient_penalty_is_the_squared_norm_per_sample() -> None:
    inputs = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    scale = torch.tensor(2.0, requires_grad=True)
    penalty = losses.gradient_penalty(scale * inputs.square().sum(1), inputs)  # gradients 2·2·x
    assert penalty.item() == pytest.approx((16 * 5 + 16 * 25) / 2)
    penalty.backward()
    assert scale.grad is not None and scale.grad.item() == pytest.approx(penalty.item())  # quadratic in the scale: 2p/s
