# SPDX-License-Identifier: Apache-2.0
"""The tests that the attention ops share, beside those of every op."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sdxl_fast.dispatch import use_backend
from sdxl_fast.op import reference_gradients
from sdxl_fast.testing.cases import Case
from sdxl_fast.testing.compare import assert_all, compare_all
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import Values, device_of, require


class AttentionSuite(ContractSuite):
    """Base of the attention ops' tests; a case's shape is q's, its options ``keys``, ``scale`` and ``sharpness``.

    ``sharpness`` multiplies q: from about 2 a few keys get most of the weight. (Much more, and every backward that
    makes the probabilities from the log-sum-exp errs by the rounding of that large number.)
    """

    outputs = ("out",)
    inputs = ("q", "k", "v")
    formats = ("contiguous", "strided")

    def make(self, case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
        keys = case.options.get("keys", case.shape[1])
        shape = (case.shape[0], keys, *case.shape[2:])
        q, k, v = (torch.randn(s, generator=generator) for s in (case.shape, shape, shape))
        return {
            "q": (q * case.options.get("sharpness", 1.0)).to(dtype),
            "k": k.to(dtype),
            "v": v.to(dtype),
            "scale": case.options.get("scale"),
        }

    def packed(self, case: Case, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Returns a packed projection [N,S,3*channels] and its three views in the op's layout."""
        n, s, *channels = case.shape
        torch.manual_seed(3)
        whole = torch.randn(n, s, 3, *channels).to(dtype).to(device)
        return whole, whole.unbind(2)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_views_of_a_packed_projection(self, dtype: torch.dtype, backend: str) -> None:
        """Read in place, of whatever token stride: the bits are those of contiguous copies, gradients too."""
        case = next(c for c in self.cases if c.name == "packed")
        whole, views = self.packed(case, dtype, device_of(backend))
        require(backend, self.op.name, dict(zip("qkv", views, strict=True)))
        whole.requires_grad_()
        dy = torch.randn_like(views[0])

        def run(copy: bool) -> tuple[torch.Tensor, torch.Tensor]:
            parts = [t.contiguous() if copy else t for t in whole.unbind(2)]
            with use_backend(backend):
                out = self.public(*parts)
            (gradient,) = torch.autograd.grad(out, whole, dy)
            return out, gradient

        for got, expected in zip(run(copy=False), run(copy=True), strict=True):
            assert torch.equal(got, expected)
            assert got.is_contiguous()
        assert all(a is b for a, b in zip(views, self.op.prepare((*views, None)), strict=False)), "copied first"

    def test_expanded_batch(self, backend: str) -> None:
        """Keys and values shared by a batch may be expanded: stride 0 is a stride."""
        values = self.ready(backend, next(c for c in self.cases if c.name == "packed"))
        q = torch.cat((values["q"], values["q"] * 0.5))
        k, v = (values[n][:1].expand(len(q), *values[n].shape[1:]) for n in "kv")
        with use_backend(backend):
            assert torch.equal(self.public(q, k, v), self.public(q, k.contiguous(), v.contiguous()))

    def test_a_single_key_gets_all_the_weight(self, backend: str) -> None:
        """Then out is v and dv is dout; dq and dk are zero but for the rounding of what cancels."""
        values = self.ready(backend, next(c for c in self.cases if c.name == "packed"))
        q, k, v = (values[n][:, :1].detach().requires_grad_() for n in "qkv")
        with use_backend(backend):
            out = self.public(q, k, v)
        dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
        torch.testing.assert_close((out, dv), (v, torch.ones_like(v)), rtol=1e-6, atol=0.0)
        assert max(dq.abs().max(), dk.abs().max()) < 1e-5

    def test_large_scores_do_not_overflow(self, backend: str) -> None:
        """Scores of some hundreds, whose exponential is no float: the key with the largest gets all the weight."""
        values = self.ready(backend, next(c for c in self.cases if c.name == "packed"))
        q, k, v = (values[n] for n in "qkv")
        with use_backend(backend):
            out = self.public(300 * q, k, v)
        heads_first = [t.reshape(*t.shape[:2], -1, t.shape[-1]).transpose(1, 2) for t in (q, k, v)]
        best = (heads_first[0] @ heads_first[1].transpose(-1, -2)).topk(2).values.diff(dim=-1)
        clear = (best < -0.5)[..., 0].transpose(1, 2).reshape(out.shape[:-1])
        expected = self.reference.fwd(300 * q, k, v, None)[0]
        assert bool(torch.isfinite(out).all()) and bool(clear.any())
        torch.testing.assert_close(out[clear], expected[clear], rtol=1e-3, atol=1e-3)

    def test_log_sum_exp(self, backend: str) -> None:
        """What the forward saves is the log-sum-exp of the scaled scores, from which any backward can start."""
        values = self.ready(backend, next(c for c in self.cases if c.name == "packed"))
        args = self.op.prepare((*(values[n] for n in "qkv"), 0.3))
        with use_backend(backend):
            _, lse = self.op.plan(args).fwd(*args)
        exact = self.reference.fwd(*(t.double().cpu() for t in args[:3]), 0.3)[1]
        rounded = self.reference.fwd(*(t.cpu() for t in args[:3]), 0.3)[1]
        assert lse.dtype == torch.float32
        assert_all(compare_all({"lse": lse.cpu()}, {"lse": exact}, {"lse": rounded}, op=self.op.name))

    def test_closed_form_is_the_derivative_in_blocks_too(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The reference's backward equals autograd through its forward, also where both take the queries in blocks."""
        from sdxl_fast.reference import _attention

        case = next(c for c in self.cases if c.name == "packed")
        values = self.expected(case, torch.float64).values
        tensors = [values[n].detach().requires_grad_() for n in "qkv"]
        dy = self.incoming(tensors[0], torch.float64)
        whole = self.reference.fwd(*tensors, None)
        monkeypatch.setattr(_attention, "BLOCK_SCORES", tensors[0].shape[0] * tensors[1].shape[1] * 3)
        out, lse = self.reference.fwd(*tensors, None)
        torch.testing.assert_close((out, lse), whole)
        with torch.no_grad():
            found = self.reference.bwd(dy, *tensors, out, lse, None, (True, True, True))

        def forward(*args: Any) -> torch.Tensor:
            result: torch.Tensor = self.reference.fwd(*args)[0]
            return result

        torch.testing.assert_close(found, reference_gradients(forward, tensors, dy, (True, True, True)))

    def test_stock_attention(self, backend: str) -> None:
        """It is what PyTorch calls scaled dot product attention."""
        values = self.ready(backend, next(c for c in self.cases if c.name == "packed"))
        tensors = [values[n] if values[n].ndim == 4 else values[n].unsqueeze(2) for n in "qkv"]
        stock = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in tensors)).transpose(1, 2)
        with use_backend(backend):
            out = self.public(*(values[n] for n in "qkv"))
        torch.testing.assert_close(out.reshape(stock.shape), stock, rtol=1e-4, atol=1e-5)
