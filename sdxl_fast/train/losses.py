"""Losses as pure functions on tensors; logits and errors are taken in float32, float64 stays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


Distance = Literal["mse", "l1", "huber"]
HUBER_C = 1e-3  # of latent consistency models' trainers


def distance(prediction: Tensor, target: Tensor, kind: Distance = "mse", weight: Tensor | float = 1.0) -> Tensor:
    """Mean distance of two tensors, scalar: squared (SDXL-Lightning eq. 16), absolute, or pseudo-Huber, c = 1e-3.

    `weight` multiplies each element's distance before the mean; it must broadcast to them.
    """
    error = _wide(prediction) - _wide(target)
    if kind == "mse":
        return (weight * error.square()).mean()
    if kind == "l1":
        return (weight * error.abs()).mean()
    return (weight * ((error.square() + HUBER_C**2).sqrt() - HUBER_C)).mean()


def non_saturating_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """-log D(real) - log(1 - D(fake)) with D = sigmoid(logit), averaged over samples (SDXL-Lightning eq. 19).

    Written with softplus, which neither overflows nor loses the small probabilities. 2 ln 2 = 1.386 at chance.
    """
    return F.softplus(-_wide(real_logits)).mean() + F.softplus(_wide(fake_logits)).mean()


def non_saturating_generator(fake_logits: Tensor) -> Tensor:
    """-log D(fake), averaged over samples (SDXL-Lightning eq. 20)."""
    return F.softplus(-_wide(fake_logits)).mean()


def hinge_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """max(0, 1 - real) + max(0, 1 + fake), averaged (ADD eq. 3 without its penalty). 2 at chance."""
    return F.relu(1.0 - _wide(real_logits)).mean() + F.relu(1.0 + _wide(fake_logits)).mean()


def hinge_generator(fake_logits: Tensor) -> Tensor:
    """-fake, averaged (ADD eq. 2)."""
    return -_wide(fake_logits).mean()


def r1_penalty(logits: Sequence[Tensor], inputs: Sequence[Tensor]) -> Tensor:
    """Squared norm of each head's gradient by its own input, averaged over samples, summed over heads (ADD §3.2).

    A head's output is the sum of its tokens' logits, as R1 differentiates a discriminator of many outputs; the paper
    leaves the reduction open. Of their mean the penalty would be L_k² times smaller, and with the published weight of
    1e-5 nothing.

    Args:
        logits: [N, L_k] per head, computed from `inputs`.
        inputs: [N, C_k, L_k] per head, requiring gradients.

    Returns:
        scalar; its own gradient reaches the heads' weights.
    """
    scores = torch.stack([_wide(logit).sum() for logit in logits]).sum()
    gradients = torch.autograd.grad(scores, list(inputs), create_graph=True)
    return torch.stack([_wide(g).square().sum((1, 2)).mean() for g in gradients]).sum()


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """Squared norm of each logit's gradient by its own input, averaged over samples; R1 when the inputs are real.

    Args:
        logits: [N], each a function of its own sample alone.
        inputs: [N, ...], requiring gradients.
    """
    (gradient,) = torch.autograd.grad(_wide(logits).sum(), inputs, create_graph=True)
    return _wide(gradient).square().flatten(1).sum(1).mean()


def accuracy(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Share of samples that the discriminator judges rightly; 0.5 is chance, 1.0 leaves the student no gradient.

    float64, which tells shares of any number of samples apart: those of parts of a batch average to that of the batch.
    """
    return ((real_logits > 0).double().mean() + (fake_logits <= 0).double().mean()) / 2


def distillation_weight(alpha: Tensor, sigma: Tensor, kind: str) -> Tensor:
    """c(t) of ADD eq. 4 from sqrt(ᾱ) and sqrt(1 - ᾱ), any shape.

    exponential: α. sds and nfsd: α / (2σ) · w(t), with which the squared distance has the gradient of score
    distillation (ADD App. A); w(t) = σ² as in DreamFusion (Poole et al. 2022).
    """
    if kind == "exponential":
        return alpha
    if kind in ("sds", "nfsd"):
        return alpha * sigma / 2.0
    raise ValueError(f"distillation is {kind!r}; allowed: exponential, sds, nfsd")
