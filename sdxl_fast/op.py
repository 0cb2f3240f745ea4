# SPDX-License-Identifier: Apache-2.0
"""The glue between a public op function and the raw functions of its backends.

In eager mode a call goes public function -> :meth:`FusedOp.__call__` -> ``autograd.Function`` -> backend -> launch,
past PyTorch's dispatcher. Host time on top of the backend's own call, tiny CPU tensors, torch 2.13: 3 to 8 us without
gradients and 9 to 16 with, against 14 and 40 through a library op. A backend that is composed of functions which
PyTorch differentiates is called without the ``autograd.Function``.
While a graph is being traced, and for tensor subclasses and dispatch modes (fake tensors, FLOP counters), the same
call goes through the ``torch.library`` ops ``sdxl_fast::<op>_fwd`` and ``_bwd``, which have fakes, so that
``torch.compile(fullgraph=True)`` and ``torch.export`` work; their bodies come back to the backends chosen here.

Under ``create_graph=True`` the backward differentiates the reference instead of calling the fused kernel, so second
derivatives exist for every op. (Compiled code has none: torch.compile does not support double backward.)
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch

from sdxl_fast import dispatch
from sdxl_fast.constraints import Rule, first_problem
from sdxl_fast.dispatch import Backend, Kernels, OpInfo

Args = tuple[Any, ...]
MaybeTensor = torch.Tensor | None
# The gradient of the one output that has one, or a tuple with one entry (None where nothing flows back) for each.
Incoming = Any

# Arguments of just these types go straight to a backend; anything else is a tensor subclass or a mistake.
_DIRECT = frozenset((torch.Tensor, torch.nn.Parameter, type(None), int, float, str))
# Plans kept per op. A model has a few hundred distinct calls; a stream of ever new shapes must not grow without bound.
_MAX_PLANS = 4096


def dense(x: torch.Tensor) -> torch.Tensor:
    """Returns x [N,C,H,W] itself if it is contiguous or channels_last, else a copy: channels_last if C is innermost."""
    if x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last):
        return x
    inner = x.stride(1) == 1 and x.shape[1] > 1
    return x.contiguous(memory_format=torch.channels_last if inner else torch.contiguous_format)


def laid_out_like(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Returns t with the strides of the dense tensor x of the same shape, copied if it has others."""
    return t if t.stride() == x.stride() else torch.empty_like(x, dtype=t.dtype).copy_(t)


def reference_gradients(
    forward: Callable[..., torch.Tensor], inputs: Sequence[MaybeTensor], dy: torch.Tensor, needs: Sequence[bool]
) -> tuple[MaybeTensor, ...]:
    """Gradients of ``forward(*inputs)`` that can themselves be differentiated, one per input, None where not needed.

    The inputs enter as views: if one of them was computed from another, differentiating with respect to the tensors
    themselves would count that path here and once more in the caller's graph.
    """
    with torch.enable_grad():
        views = [None if t is None else t.view_as(t) for t in inputs]
        wanted = [v for v, need in zip(views, needs, strict=True) if need and v is not None]
        found = iter(torch.autograd.grad(forward(*views), wanted, dy, create_graph=True))
    return tuple(next(found) if need and v is not None else None for v, need in zip(views, needs, strict=True))


class FusedOp:
    """One op. A subclass states the raw signature, the rules and the backends, and shapes the backward.

    The raw ``fwd`` takes the arguments named in ``parameters``, in that order, and returns a tensor or a tuple whose
    first entries carry gradients, at most ``differentiable`` of them. Each subclass has one instance; calling it runs
    the op.
    """

    name: ClassVar[str]
    parameters: ClassVar[tuple[str, ...]]
    fwd_schema: ClassVar[str]
    bwd_schema: ClassVar[str] = ""
    rules: ClassVar[tuple[Rule, ...]]
    backends: ClassVar[tuple[Backend, ...]]
    differentiable: ClassVar[int] = 1  # 0: an op without a derivative, whose outputs are no floats

    def __init__(self, public: Callable[..., Any]) -> None:
        """Registers the op under its name; ``public`` is the function users call."""
        self._plans: dict[Any, Kernels] = {}
        signature = inspect.signature(public)

        def bind(*args: Any, **kwargs: Any) -> dict[str, Any]:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                raise ValueError(f"{self.name}: {error}") from None
            bound.apply_defaults()
            return dict(bound.arguments)

        self.info = OpInfo(self.name, self.parameters[0], self.rules, self.backends, bind, self._plans.clear)
        dispatch.register(self.info)
        _define_library_ops(self)

    def flowing(self, outputs: Sequence[Any]) -> int:
        """Returns how many of these outputs, the first ones, carry gradients."""
        return self.differentiable

    # ---- what a subclass provides; in `scalars` the tensors of `args` are None ----

    def prepare(self, args: Args) -> Args:
        """Makes dense what the backends want dense; differentiable and traceable."""
        raise NotImplementedError

    def saved(self, args: Args, outputs: Sequence[torch.Tensor]) -> tuple[MaybeTensor, ...]:
        """Returns the tensors the backward needs."""
        raise NotImplementedError

    def bwd_arguments(self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]) -> Args:
        """Returns the arguments of the raw ``bwd``."""
        raise NotImplementedError

    def place_gradients(self, found: Any) -> tuple[MaybeTensor, ...]:
        """Returns what the raw ``bwd`` returned as one gradient per parameter."""
        raise NotImplementedError

    def second_order(
        self, dy: Incoming, saved: Sequence[MaybeTensor], scalars: Args, needs: Sequence[bool]
    ) -> tuple[MaybeTensor, ...]:
        """Returns one differentiable gradient per parameter, by the reference."""
        raise NotImplementedError

    def forward_arguments(self, bwd_args: Args) -> Args:
        """Returns forward arguments that stand for a ``bwd`` call in checks and in the choice of the backend."""
        raise NotImplementedError

    def fake_fwd(self, args: Args) -> Any:
        """Returns empty outputs of the library forward."""
        raise NotImplementedError

    def fake_bwd(self, bwd_args: Args) -> Any:
        """Returns empty outputs of the library backward; a gradient that is not needed has no elements."""
        raise NotImplementedError

    def check_values(self, args: Args) -> None:
        """Checks what depends on the contents of tensors; runs on every call."""

    def library_outputs(self, args: Args, outputs: Any) -> Any:
        """Returns the outputs as a library op must: never an input itself."""
        return outputs

    # ---- running ----

    def __call__(self, *args: Any) -> Any:
        """Runs the op on the raw arguments and returns what the raw forward returns."""
        # A dispatch mode sees the call only if it passes through the dispatcher.
        if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
            return self._through_library(args)
        for arg in args:
            if type(arg) not in _DIRECT:
                return self._through_library(args)
        kernels = self.plan(args)
        counts = dispatch.recorder()
        if counts is not None:
            counts[self.name, kernels.backend] += 1
        args = self.prepare(args)
        self.check_values(args)
        if kernels.composed:
            return kernels.fwd(*args)
        if self.differentiable and torch.is_grad_enabled():
            for arg in args:
                if isinstance(arg, torch.Tensor) and arg.requires_grad:
                    return _Fused.apply(self, kernels, *args)
        return (kernels.alone or kernels.fwd)(*args)

    def plan(self, args: Args) -> Kernels:
        """Checks the arguments and chooses the backend, once per signature.

        Raises:
            ValueError: when a rule of the op is broken.
            UnsupportedError: when no backend, or not the forced one, can run the call.
        """
        # What rules may look at: dtype, device, shape, requires_grad of tensors, and the scalars with their types.
        signature: list[Any] = [dispatch.forced_backend(), torch.is_grad_enabled()]
        for a in args:
            signature += (a.dtype, a.device, a.shape, a.requires_grad) if isinstance(a, torch.Tensor) else (type(a), a)
        found = self._plans.get(key := tuple(signature))
        if found is None:
            values = dict(zip(self.parameters, args, strict=True))
            self.check(values)
            found = dispatch.select(self.info, values)
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
            self._plans[key] = found
        return found

    def check(self, values: dict[str, Any]) -> None:
        """Raises ValueError when a rule of the op is broken."""
        problem = first_problem(self.rules, values)
        if problem is not None:
            raise ValueError(f"{self.name}: {problem}")

    def gradients(
        self,
        dy: Incoming,
        saved: Sequence[MaybeTensor],
        scalars: Args,
        needs: Sequence[bool],
        bwd: Callable[..., Any],
    ) -> tuple[MaybeTensor, ...]:
        """Returns one gradient per parameter: by ``bwd``, or by the reference when a graph of it is wanted."""
        if torch.is_grad_enabled():  # in a backward, true under create_graph only
            return self.second_order(dy, saved, scalars, needs)
        return self.place_gradients(bwd(*self.bwd_arguments(dy, saved, scalars, needs)))

    def incoming(self, grads: Sequence[MaybeTensor]) -> Incoming:
        """Returns the outputs' gradients as the methods above take them, also of outputs left out; None for no flow."""
        if self.differentiable == 1:
            return grads[0]
        flowing = grads[: self.flowing(grads)]
        if all(g is None for g in flowing):
            return None
        return (*flowing, *(None,) * (self.differentiable - len(flowing)))

    def _through_library(self, args: Args) -> Any:
        if not torch.compiler.is_compiling():
            # The schema would reject a wrong type in its own words; the rules say what is allowed.
            self.check(dict(zip(self.parameters, args, strict=True)))
        return getattr(torch.ops.sdxl_fast, f"{self.name}_fwd")(*self.prepare(args))


def _scalars(args: Args) -> Args:
    return tuple(None if isinstance(a, torch.Tensor) else a for a in args)


class _Fused(torch.autograd.Function):
    """The one autograd.Function of the package; the op it serves is its first argument."""

    @staticmethod
    def forward(ctx: Any, op: FusedOp, kernels: Kernels, *args: Any) -> Any:
        outputs = kernels.fwd(*args)
        listed = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
        ctx.save_for_backward(*op.saved(args, listed))
        ctx.op, ctx.kernels, ctx.scalars = op, kernels, _scalars(args)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*listed[op.flowing(listed) :])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        dy = ctx.op.incoming(grads)
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = ctx.needs_input_grad[2:]
        return (None, None, *ctx.op.gradients(dy, ctx.saved_tensors, ctx.scalars, needs, ctx.kernels.bwd))


def _define_library_ops(op: FusedOp) -> None:
    """Registers ``sdxl_fast::<op>_fwd`` and, unless the op has no derivative, its gradient ``_bwd``; with fakes."""
    fwd_name = f"sdxl_fast::{op.name}_fwd"
    torch.library.define(fwd_name, op.fwd_schema)

    def fwd(*args: Any) -> Any:
        kernels = op.plan(args)
        counts = dispatch.recorder()
        if counts is not None:
            counts[op.name, kernels.backend] += 1
        args = op.prepare(args)
        op.check_values(args)
        return op.library_outputs(args, kernels.fwd(*args))

    def fake_fwd(*args: Any) -> Any:
        op.check(dict(zip(op.parameters, args, strict=True)))
        return op.fake_fwd(op.prepare(args))

    torch.library.impl(fwd_name, "CompositeExplicitAutograd")(fwd)
    torch.library.register_fake(fwd_name)(fake_fwd)
    if op.differentiable:
        _define_library_gradient(op, fwd_name)


def _define_library_gradient(op: FusedOp, fwd_name: str) -> None:
    bwd_name = f"sdxl_fast::{op.name}_bwd"
    torch.library.define(bwd_name, op.bwd_schema)

    def bwd(*args: Any) -> Any:
        # Below autograd grad mode may be on, but nothing here is recorded: the raw functions are closed formulas.
        found = op.plan(op.forward_arguments(args)).bwd(*args)
        if isinstance(found, torch.Tensor):
            return found
        return tuple(args[0].new_empty(0) if t is None else t for t in found)

    def setup_context(ctx: Any, inputs: Args, output: Any) -> None:
        listed = (output,) if isinstance(output, torch.Tensor) else output
        ctx.save_for_backward(*op.saved(inputs, listed))
        ctx.scalars = _scalars(inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*listed[op.flowing(listed) :])

    def backward(ctx: Any, *grads: Any) -> Any:
        dy = op.incoming(grads)
        if dy is None:
            return (None,) * len(op.parameters)
        library_bwd = getattr(torch.ops.sdxl_fast, f"{op.name}_bwd")
        found = op.gradients(dy, ctx.saved_tensors, ctx.scalars, ctx.needs_input_grad, library_bwd)
        return tuple(t if need else None for t, need in zip(found, ctx.needs_input_grad, strict=True))

    torch.library.impl(bwd_name, "CompositeExplicitAutograd")(bwd)
    torch.library.register_fake(bwd_name)(lambda *args: op.fake_bwd(args))
    torch.library.register_autograd(fwd_name, backward, setup_context=setup_context)
