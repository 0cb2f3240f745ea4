# SPDX-License-Identifier: Apache-2.0
"""The second half of the op suite: what an op promises beside its numbers (autograd, tracing, determinism)."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdxl_fast.dispatch import explain, use_backend
from sdxl_fast.testing.op_suite import OpSuite, Tensors, Values, device_of, require


def _first(result: Any) -> torch.Tensor:
    return result if isinstance(result, torch.Tensor) else result[0]


def _same(a: Tensors, b: Tensors) -> None:
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), f"{name} differs: {(tensor.double() - b[name].double()).abs().max()}"


class ContractSuite(OpSuite):
    """Base of an op's tests: :class:`OpSuite` and the contract."""

    def leaves(self, values: Values) -> dict[str, torch.Tensor]:
        """Returns the differentiable arguments that are given."""
        return {n: values[n] for n in self.inputs if values[n] is not None}

    def library_arguments(self, values: Values) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Returns the arguments of the library forward and of the library backward."""
        bound = self.op.info.bind(**values)
        args = self.op.prepare(tuple(bound[p] for p in self.op.parameters))
        found = self.reference.fwd(*args)
        listed = (found,) if isinstance(found, torch.Tensor) else found
        needs = [p in self.inputs and bound[p] is not None for p in self.op.parameters]
        scalars = tuple(None if isinstance(a, torch.Tensor) else a for a in args)
        dy = self.raw_incoming(listed, listed[0].dtype)
        return args, self.op.bwd_arguments(dy, self.op.saved(args, listed), scalars, needs)

    def test_forced_backend_runs(self, backend: str) -> None:
        """``use_backend`` decides what runs, and ``explain`` says so."""
        values = self.ready(backend)
        bound = self.op.info.bind(**values)
        with use_backend(backend):
            assert self.op.plan(tuple(bound[p] for p in self.op.parameters)).backend == backend
            assert explain(self.op.name, **values).backend == backend

    def test_refuses_float64(self, gpu: str) -> None:
        """A dtype a backend lacks is refused with the reason, never converted."""
        require(gpu, self.op.name)
        values = self.place(self.expected(self.tiny, torch.float64).values, gpu)
        with use_backend(gpu), pytest.raises(ValueError, match=f"{gpu}.*must be .*got float64"):
            self.public(**values)

    def test_run_to_run_equality(self, backend: str) -> None:
        """The same call gives the same bits, forward and backward."""
        wanted = 1_000 if backend == "triton" and device_of(backend) == "cpu" else 50_000
        case = min((*self.cases, *self.sdxl), key=lambda c: abs(c.numel - wanted))
        values = self.ready(backend, case)
        with use_backend(backend):
            first = self.differentiate(self.public, values, torch.float32)
            for _ in range(3):
                _same(first, self.differentiate(self.public, values, torch.float32))

    def test_needs_input_grad(self, backend: str) -> None:
        """Any subset of the inputs may ask for gradients, and gets the ones that all of them get."""
        values = self.ready(backend)
        names = list(self.leaves(values))
        with use_backend(backend):
            full = self.differentiate(self.public, values, torch.float32)
            for asked in itertools.product((False, True), repeat=len(names)):
                fresh = {n: values[n].detach().requires_grad_(a) for n, a in zip(names, asked, strict=True)}
                roots = self.roots(self.public(**{**values, **fresh}))
                assert all(y.requires_grad == any(asked) for y in roots)
                if not any(asked):
                    continue
                torch.autograd.backward(roots, self.incoming_all(roots, torch.float32))
                for name, tensor in fresh.items():
                    assert (tensor.grad is not None) == tensor.requires_grad
                    if tensor.grad is not None:
                        assert torch.equal(tensor.grad, full[f"d{name}"]), f"d{name} depends on what else was asked"

    def test_backward_twice(self, backend: str) -> None:
        """A retained graph gives the same gradients again: nothing saved, and no incoming gradient, is written to."""
        values = self.ready(backend)
        leaves = {n: t.detach().requires_grad_() for n, t in self.leaves(values).items()}
        with use_backend(backend):
            roots = self.roots(self.public(**{**values, **leaves}))
        dy = self.incoming_all(roots, torch.float32)
        kept = [t.clone() for t in dy]
        first = torch.autograd.grad(roots, list(leaves.values()), dy, retain_graph=True)
        second = torch.autograd.grad(roots, list(leaves.values()), dy)
        assert all(torch.equal(a, b) for a, b in zip(dy, kept, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    def test_incoming_gradient_of_any_stride(self, backend: str) -> None:
        """The expanded gradient of a sum, and one with gaps, count as what they hold."""
        values = self.ready(backend)
        with use_backend(backend):
            for make in (lambda y: torch.ones_like(y), lambda y: self.incoming(y, torch.float32)):
                leaves = {n: t.detach().requires_grad_() for n, t in self.leaves(values).items()}
                y = _first(self.public(**{**values, **leaves}))
                dense = make(y.detach())
                gaps = torch.stack((dense, torch.zeros_like(dense)), -1)[..., 0]
                expected = torch.autograd.grad(y, list(leaves.values()), dense, retain_graph=True)
                found = torch.autograd.grad(y, list(leaves.values()), gaps, retain_graph=True)
                assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
                if bool((dense == 1).all()):
                    found = torch.autograd.grad(y.sum(), list(leaves.values()))
                    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))

    def test_opcheck(self, backend: str) -> None:
        """The library ops have right schemas, fakes and autograd, traced with static and dynamic shapes."""
        values = self.ready(backend)
        leaves = {n: t.detach().requires_grad_() for n, t in self.leaves(values).items()}
        args, _ = self.library_arguments({**values, **leaves})
        args = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, torch.Tensor) else a for a in args)
        _, bwd_args = self.library_arguments(values)
        with use_backend(backend):
            torch.library.opcheck(getattr(torch.ops.sdxl_fast, f"{self.op.name}_fwd").default, args)
            torch.library.opcheck(getattr(torch.ops.sdxl_fast, f"{self.op.name}_bwd").default, bwd_args)

    @pytest.mark.parametrize("dynamic", [False, True])
    def test_compiles_whole(self, backend: str, dynamic: bool) -> None:
        """``torch.compile(fullgraph=True)`` traces forward and backward; the numbers are those of the eager call."""
        values = self.ready(backend)
        torch.compiler.reset()
        compiled = torch.compile(self.public, fullgraph=True, backend="aot_eager", dynamic=dynamic)
        with use_backend(backend):
            eager = self.differentiate(self.public, values, torch.float32)
            _same(eager, self.differentiate(compiled, values, torch.float32))

    def test_fake_tensors(self) -> None:
        """Under FakeTensorMode a call gives shapes, dtypes and strides, and touches no memory."""
        values = self.expected(self.tiny, torch.float32).values
        real = self.public(**values)
        with FakeTensorMode() as mode:
            fake_values = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in values.items()}
            fake = self.public(**fake_values)
        for got, expected in zip(
            (fake,) if isinstance(fake, torch.Tensor) else fake,
            (real,) if isinstance(real, torch.Tensor) else real,
            strict=True,
        ):
            assert (got.shape, got.dtype, got.stride()) == (expected.shape, expected.dtype, expected.stride())

    def test_meta_tensors(self) -> None:
        """On the meta device a call gives shapes, for tracing a model without memory."""
        values = {
            k: v.to("meta") if isinstance(v, torch.Tensor) else v
            for k, v in self.expected(self.tiny, torch.float32).values.items()
        }
        assert _first(self.public(**values)).device.type == "meta"

    def test_dependent_inputs_are_not_counted_twice(self) -> None:
        """Second order with every input computed from one tensor equals what the reference gives."""
        values = self.expected(self.tiny, torch.float64).values
        sources = self.leaves(values)

        def penalty(call: Any) -> torch.Tensor:
            root = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
            tied = {n: t.detach() * (1 + root) for n, t in sources.items()}
            roots = self.roots(call(**{**values, **tied}))
            weighted = zip(roots, self.incoming_all(roots, torch.float64), strict=True)
            total = torch.stack([(y * dy).sum() for y, dy in weighted]).sum()
            (first,) = torch.autograd.grad(total, root, create_graph=True)
            return torch.autograd.grad(first**2, root)[0] if first.requires_grad else torch.zeros(())

        torch.testing.assert_close(penalty(self.public), penalty(self.raw(self.reference.fwd)))
