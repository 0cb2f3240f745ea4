# SPDX-License-Identifier: Apache-2.0
"""``ops.token_head``: the shared suite, the modules it stands for, and refusals."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import BACKENDS, explain
from sdxl_fast.ops.token_head import _OP
from sdxl_fast.reference import token_head as reference
from sdxl_fast.testing.cases import Case, draw
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import device_of, require


class TestTokenHead(ContractSuite):
    op = _OP
    public = staticmethod(ops.token_head)
    reference = reference
    outputs = ("logits",)
    inputs = ("hidden", "residual", "weight", "bias", "direction", "offset")
    formats = ("contiguous", "strided")
    wrong = tuple(reference.WRONG)
    cases = (
        Case("groups-of-eight", (2, 24, 10)),
        Case("ragged", (3, 21, 7), {"num_groups": 3}),
        Case("one-token", (2, 16, 1)),
        Case("one-group", (2, 5, 9), {"num_groups": 1}),
        Case("float32-parameters", (2, 16, 12), {"params": "float32"}),
        Case("tokens", (1, 8, 300), {"num_groups": 1, "eps": 1e-2}),
        Case("empty-batch", (0, 8, 4)),
        Case("offset", (2, 16, 17), kind="offset"),
        Case("constant", (2, 8, 6), {"num_groups": 1}, kind="constant"),
    )
    sdxl = (Case("vit-s", (1, 384, 65), {"num_groups": 48}),)
    full_size = (
        Case("vit-s-8", (8, 384, 257), {"num_groups": 48}),
        Case("vit-l", (2, 1024, 1370), {"num_groups": 128}),
    )
    tiny = Case("tiny", (2, 4, 3), {"num_groups": 2})

    def make(self, case, dtype, generator):
        n, channels, _ = case.shape
        like = torch.float32 if case.options.get("params") == "float32" and dtype != torch.float64 else dtype
        weight, bias = 0.5 * torch.randn(2, channels, generator=generator)
        return {
            "hidden": draw(case.shape, case.kind, generator).to(dtype),
            "residual": torch.randn(case.shape, generator=generator).to(dtype),
            "weight": (1 + weight).to(like),
            # Away from zero, where the derivative of the activation jumps and a rounding would decide which it is.
            "bias": (bias + 0.25 * bias.sign()).to(like),
            "direction": torch.randn(n, channels, generator=generator).to(like),
            "offset": torch.randn(n, generator=generator).to(like),
            "num_groups": case.options.get("num_groups", channels // 8),
            "eps": case.options.get("eps", 1e-5),
        }

    def rows(self, case):
        n, _, length = case.shape
        return {"dweight": n * length, "dbias": n * length, "ddirection": length, "doffset": length}


@pytest.mark.parametrize("backend", BACKENDS)
def test_is_the_head_it_stands_for(backend):
    """Norm, leaky ReLU, sum, the convolution to 64 channels and its product with the mapped condition."""
    require(backend, "token_head")
    torch.manual_seed(0)
    device = device_of(backend)
    norm = torch.nn.GroupNorm(3, 24).to(device)
    projection, condition = torch.nn.Conv1d(24, 64, 1).to(device), torch.nn.Linear(5, 64).to(device)
    torch.nn.init.normal_(norm.bias)
    hidden, residual = torch.randn(2, 2, 24, 11, device=device).unbind()
    mapped = condition(torch.randn(2, 5, device=device))
    leaves = [hidden.requires_grad_(), residual.requires_grad_(), *norm.parameters(), *projection.parameters()]
    expected = (projection(residual + F.leaky_relu(norm(hidden), 0.2)) * mapped[:, :, None]).sum(1)
    with use_backend(backend):
        got = ops.token_head(
            *(hidden, residual, norm.weight, norm.bias),
            direction=mapped @ projection.weight.squeeze(2),
            offset=mapped @ projection.bias,
            num_groups=3,
            eps=norm.eps,
        )
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got.sin().sum(), leaves, retain_graph=True),
        torch.autograd.grad(expected.sin().sum(), leaves),
        rtol=1e-3,
        atol=1e-4,
    )


H, W, D, B = torch.zeros(2, 8, 3), torch.zeros(8), torch.zeros(2, 8), torch.zeros(2)


@pytest.mark.parametrize(
    ("args", "options", "message"),
    [
        ((H[0], H, W, W, D, B), {}, r"hidden must have 3 dimensions \[N,C,L\]"),
        ((H.long(), H, W, W, D, B), {}, r"hidden must be float32.*got int64"),
        ((H, H[..., :2], W, W, D, B), {}, r"residual must have the shape of hidden"),
        ((H, H.half(), W, W, D, B), {}, r"residual must have the dtype of hidden"),
        ((H, H, W[:4], W, D, B), {}, r"weight must have shape \[C\]"),
        ((H, H, W, W, D[:1], B), {}, r"direction must have shape \[N,C\]"),
        ((H, H, W, W, D, W), {}, r"offset must have shape \[N\]"),
        ((H[..., :0], H[..., :0], W, W, D, B), {}, r"hidden must have at least 1 tokens"),
        ((H, H, W, W, D, B), {"num_groups": 3}, r"num_groups must be positive and divide dimension 1 of hidden"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(args, options, message):
    with pytest.raises(ValueError, match=message):
        ops.token_head(*args, **{"num_groups": 4, **options})


def test_a_cpu_takes_the_native_kernel():
    assert explain(ops.token_head, H, H, W, W, D, B, num_groups=4).backend == "cpu"
