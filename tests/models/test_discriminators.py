"""The discriminators' heads run on the fused operations and are what their papers draw."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sdxl_fast import dispatch
from sdxl_fast.models.discriminators import DiscriminatorHead, TokenHead
from sdxl_fast.train import losses


@pytest.mark.parametrize("size", [(4, 4), (4, 8)], ids=["square", "wide"])
def test_the_head_is_its_layers_one_after_the_other(size: tuple[int, int]) -> None:
    """Logits and losses, gradients of every parameter, and R1's; a wide map is judged in two places."""
    torch.manual_seed(0)
    head = DiscriminatorHead(6, 8, 4, num_groups=2).double()
    features = torch.randn(3, 6, *size, dtype=torch.float64, requires_grad=True)
    with dispatch.record() as counts:
        logits, loss = head(features, "non_saturating_fake")
    assert {op for op, _ in counts} == {"group_norm_silu", "disc_head"}
    x = features
    for convolution, norm in head.blocks:  # type: ignore[misc]
        x = F.silu(F.group_norm(convolution(x), norm.num_groups, norm.weight, norm.bias, norm.eps))
    plain = head.projection(x).flatten(1).mean(1)
    torch.testing.assert_close((logits, loss), (plain, F.softplus(plain)))
    leaves = [features, *head.parameters()]
    pairs = [
        (loss.mean(), F.softplus(plain).mean()),
        (losses.gradient_penalty(logits, features), losses.gradient_penalty(plain, features)),
    ]
    for got, expected in pairs:
        mine, its = (
            torch.autograd.grad(total, leaves, retain_graph=True, materialize_grads=True) for total in (got, expected)
        )
        torch.testing.assert_close(mine, its)


@pytest.mark.parametrize("loss", ["real", "fake"])
def test_the_loss_of_a_verdict_is_the_papers(loss: str) -> None:
    torch.manual_seed(0)
    logits, each = DiscriminatorHead(4, 4, 2, num_groups=1)(torch.randn(5, 4, 2, 2), f"non_saturating_{loss}")
    expected = losses.non_saturating_generator(logits if loss == "real" else -logits)
    torch.testing.assert_close(each.mean(), expected)


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
def test_a_token_head_is_its_layers_one_after_the_other(autocast: bool) -> None:
    """The convolution to 64 channels and its product with the mapped condition, folded into one direction."""
    torch.manual_seed(0)
    head = TokenHead(16, 5).eval()
    tokens, condition = torch.randn(2, 16, 9), torch.randn(2, 5)
    with torch.no_grad():
        x = head.lift(tokens)
        x = (x + head.residual(x)) / math.sqrt(2.0)
        plain = (head.projection(x) * head.condition(condition)[:, :, None]).sum(1) / math.sqrt(head.PROJECTION)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), dispatch.record() as counts:
            logits = head(tokens, condition)
    assert ("token_head", "cpu") in counts
    assert logits.dtype == torch.float32
    bound = {"rtol": 2.0**-5, "atol": 2.0**-5} if autocast else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(logits, plain, **bound)
