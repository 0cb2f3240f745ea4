# SPDX-License-Identifier: Apache-2.0
"""``ops.disc_head``: the shared suite, every loss, the modules it stands for, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import BACKENDS, explain
from sdxl_fast.ops.disc_head import _OP
from sdxl_fast.reference import disc_head as reference
from sdxl_fast.testing.cases import Case, draw
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import device_of, require


class TestDiscHead(ContractSuite):
    op = _OP
    public = staticmethod(ops.disc_head)
    reference = reference
    outputs = ("logits", "losses")
    inputs = ("x", "weight", "bias", "projection", "offset")
    formats = ("contiguous", "channels_last", "strided")
    wrong = tuple(reference.WRONG)
    cases = (
        Case("one-position", (3, 24, 1, 1)),
        Case("positions", (2, 12, 3, 2), {"loss": "non_saturating_fake"}),
        Case("ragged-groups", (2, 21, 2, 3), {"num_groups": 3, "loss": "hinge_real"}),
        Case("float32-parameters", (4, 16, 2, 2), {"params": "float32", "loss": "hinge_fake"}),
        Case("student", (2, 16, 2, 1), {"loss": "hinge_student"}),
        Case("one-group", (2, 10, 3, 3), {"num_groups": 1}),
        Case("one-channel-groups", (2, 4, 3, 5), {"eps": 1e-2}),
        Case("empty-batch", (0, 8, 1, 1)),
        Case("offset", (3, 32, 2, 2), kind="offset"),
        Case("constant", (2, 8, 2, 2), kind="constant"),
    )
    sdxl = (Case("sdxl", (2, 1280, 1, 1), {"num_groups": 32}),)
    full_size = (
        Case("sdxl-batch", (32, 1280, 1, 1), {"num_groups": 32}),
        Case("sdxl-wide", (4, 1280, 1, 2), {"num_groups": 32}),
    )
    tiny = Case("tiny", (3, 4, 1, 2), {"num_groups": 2})

    def make(self, case, dtype, generator):
        channels = case.shape[1]
        like = torch.float32 if case.options.get("params") == "float32" and dtype != torch.float64 else dtype
        weight, bias, projection = 0.5 * torch.randn(3, channels, generator=generator)
        return {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "weight": (1 + weight).to(like),
            "bias": bias.to(like),
            "projection": projection.to(like),
            "offset": torch.full((1,), 0.375, dtype=like),
            "num_groups": case.options.get("num_groups", 4),
            "eps": case.options.get("eps", 1e-5),
            "loss": case.options.get("loss", "non_saturating_real"),
        }

    def rows(self, case):
        rows = case.shape[0] * case.shape[2] * case.shape[3]
        return {f"d{name}": rows for name in self.inputs[1:]}


def _arguments(device: str = "cpu") -> dict:
    torch.manual_seed(0)
    norm, last = torch.nn.GroupNorm(4, 16), torch.nn.Conv2d(16, 1, 1)
    torch.nn.init.normal_(norm.weight)
    return {"norm": norm.to(device), "last": last.to(device), "x": torch.randn(3, 16, 2, 2, device=device)}


@pytest.mark.parametrize("loss", reference.LOSSES)
@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_modules_and_the_loss_it_stands_for(backend, loss):
    """Results and gradients of the norm, SiLU, 1x1 convolution, mean and the textbook's loss."""
    require(backend, "disc_head")
    made = _arguments(device_of(backend))
    norm, last, x = made["norm"], made["last"], made["x"].requires_grad_()
    logits = last(F.silu(norm(x))).flatten(1).mean(1)
    textbook = {
        "non_saturating_real": lambda logit: -torch.log(torch.sigmoid(logit)),
        "non_saturating_fake": lambda logit: -torch.log(1 - torch.sigmoid(logit)),
        "hinge_real": lambda logit: (1 - logit).clamp(min=0),
        "hinge_fake": lambda logit: (1 + logit).clamp(min=0),
        "hinge_student": lambda logit: -logit,
    }
    losses = textbook[loss](logits)
    leaves = [x, *norm.parameters(), *last.parameters()]
    expected = torch.autograd.grad(losses.mean() + logits.square().sum(), leaves)
    with use_backend(backend):
        got = ops.disc_head(
            *(x, norm.weight, norm.bias, last.weight.flatten(), last.bias), num_groups=4, eps=norm.eps, loss=loss
        )
    torch.testing.assert_close(got, (logits, losses))
    torch.testing.assert_close(torch.autograd.grad(got[1].mean() + got[0].square().sum(), leaves), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("logit", "expected"), [(0.0, math.log(2)), (60.0, 60.0), (-18.0, 1.522998e-08)])
def test_the_loss_neither_overflows_nor_loses_the_small(backend, logit, expected):
    """softplus far out on either side: of a norm whose weight is 0 and a bias of 0, the offset is the logit."""
    require(backend, "disc_head")
    zeros = torch.zeros(4, device=device_of(backend))
    with use_backend(backend):
        logits, losses = ops.disc_head(
            *(torch.randn(1, 4, 1, 1, device=zeros.device), zeros, zeros, zeros, zeros[:1] + logit),
            num_groups=1,
            loss="non_saturating_fake",
        )
    assert logits.item() == logit
    assert losses.item() == pytest.approx(expected, rel=1e-5)


X, P, ONE = torch.zeros(2, 8, 1, 1), torch.zeros(8), torch.zeros(1)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((X[0], P, P, P, ONE), {}, r"x must have 4 dimensions \[N,C,H,W\]"),
        ((X.long(), P, P, P, ONE), {}, r"x must be float32.*got int64"),
        ((X, P[:4], P, P, ONE), {}, r"weight must have shape \[C\]"),
        ((X, P, P, P[:4], ONE), {}, r"projection must have shape \[C\]"),
        ((X, P, P, P, P), {}, r"offset must have shape \[1\] = \[1\], got \[8\]"),
        ((X, P, None, P, ONE), {}, r"bias must be a tensor, got NoneType"),
        ((X, P, P.double(), P, ONE), {}, r"bias must have the dtype of x"),
        ((X[:, :, :0], P, P, P, ONE), {}, r"x must have at least 1 rows"),
        ((X, P, P, P, ONE), {"num_groups": 3}, r"num_groups must be positive and divide dimension 1 of x"),
        ((X, P, P, P, ONE), {"loss": "hinge"}, r"loss must be 'non_saturating_real'.*got 'hinge'"),
        ((X, P, P, P, ONE), {"eps": -1.0}, r"eps must be a finite number >= 0"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.disc_head(*args, **{"num_groups": 4, **options})


def test_a_cpu_takes_the_native_norm_and_not_the_reference():
    assert explain(ops.disc_head, X, P, P, P, ONE, num_groups=4).backend == "library"
