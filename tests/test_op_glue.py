# SPDX-License-Identifier: Apache-2.0
"""The way from a public op to its backend: eager bypass, tracing, second order, caching of choices."""

from __future__ import annotations

import inspect
import shutil
import traceback

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from sdxl_fast import op as glue
from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import Kernels, explain
from sdxl_fast.ops.conv2d import _OP as CONV2D
from sdxl_fast.ops.ddim_move import _OP as DDIM_MOVE
from sdxl_fast.ops.forward_diffusion import _OP as FORWARD_DIFFUSION
from sdxl_fast.ops.geglu import _OP as GEGLU
from sdxl_fast.ops.group_norm_silu import _OP as GROUP_NORM_SILU
from sdxl_fast.ops.layer_norm import _OP as LAYER_NORM
from sdxl_fast.ops.linear import _OP as LINEAR
from sdxl_fast.ops.linear_geglu import _OP as LINEAR_GEGLU
from sdxl_fast.ops.to_uint8 import _OP as TO_UINT8
from sdxl_fast.ops.upsample_conv2d import _OP as UPSAMPLE_CONV2D
from sdxl_fast.reference import geglu as reference


class Spy:
    """Backend functions of geglu that count their calls and note how deep in the stack they ran."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.stack: list[str] = []

    def kernels(self) -> Kernels:
        return Kernels("spy", self.fwd, self.bwd)

    def fwd(self, x, approximate, scale_y):
        self.calls.append("fwd")
        self.stack = [frame.name for frame in traceback.extract_stack()]
        return reference.fwd(x.detach(), approximate)

    def bwd(self, dy, x, approximate):
        self.calls.append("bwd")
        return reference.bwd(dy, x, approximate)


@pytest.fixture
def spy(monkeypatch):
    spy = Spy()
    monkeypatch.setattr(GEGLU, "plan", lambda args: spy.kernels())
    return spy


class Seen(TorchDispatchMode):
    """Notes every operator that passes the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def _leaf(*shape):
    return torch.randn(*shape, requires_grad=True)


def test_eager_call_goes_past_the_dispatcher(spy, monkeypatch):
    """And in at most five calls: public function, op, autograd.Function, backend, launch (which the spy stands for)."""
    monkeypatch.setattr(GEGLU, "_through_library", lambda args: pytest.fail("went through torch.library"))
    y = ops.geglu(_leaf(3, 8))
    y.sum().backward()
    assert spy.calls == ["fwd", "bwd"]
    own = spy.stack[spy.stack.index("geglu") :]
    assert own == ["geglu", "__call__", "apply", "forward", "fwd"] or own == ["geglu", "__call__", "forward", "fwd"]


def test_modes_and_fakes_see_the_library_op():
    with Seen() as seen:
        ops.geglu(torch.randn(3, 8))
    assert "sdxl_fast.geglu_fwd.default" in seen.names


def test_library_op_backward_is_the_library_op():
    x = _leaf(3, 8)
    with Seen() as seen:
        ops.geglu(x).sum().backward()
    assert "sdxl_fast.geglu_bwd.default" in seen.names
    expected = torch.autograd.grad(ops.geglu(y := x.detach().requires_grad_()).sum(), y)[0]
    assert torch.equal(x.grad, expected)


def test_create_graph_uses_the_reference_and_plain_backward_does_not(spy):
    x = _leaf(3, 8)
    torch.autograd.grad(ops.geglu(x).sum(), x)
    assert spy.calls == ["fwd", "bwd"]
    spy.calls.clear()
    (first,) = torch.autograd.grad(ops.geglu(x).sum(), x, create_graph=True)
    assert spy.calls == ["fwd"] and first.requires_grad
    first.square().sum().backward()
    assert spy.calls == ["fwd"], "the second backward belongs to the reference"
    assert x.grad is not None


def test_unneeded_gradients_are_not_computed():
    x, weight, bias = torch.randn(2, 4, 3, 3), _leaf(4), _leaf(4)
    needs = []
    with use_backend("cpu"):
        inner = GROUP_NORM_SILU.plan((x, weight, bias, None, 2, 1e-5, "silu", None, None))

    def bwd(*args):
        needs.append(args[-1])
        return inner.bwd(*args)

    outputs = glue._Fused.apply(
        GROUP_NORM_SILU, Kernels("spy", inner.fwd, bwd), x, weight, bias.detach(), None, 2, 1e-5, "silu"
    )
    outputs[0].sum().backward()
    assert needs == [(False, True, False, False)]
    assert weight.grad is not None


def test_statistics_carry_no_gradient():
    with use_backend("cpu"):
        found = GROUP_NORM_SILU(_leaf(2, 4, 3, 3), None, None, None, 2, 1e-5, "silu", None, None)
    assert [t.requires_grad for t in found] == [True, False, False]


def test_a_composed_backend_is_differentiated_by_pytorch():
    """Once and twice; it is there for small CPU tensors whose gradients are recorded."""
    x, weight = _leaf(2, 8, 4, 4), _leaf(8)
    bias, dy = torch.randn(8), torch.randn(2, 8, 4, 4)

    def derivatives():
        y = ops.group_norm_silu(x, weight, bias, num_groups=2)
        first = torch.autograd.grad(y, (x, weight), dy, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum() + first[1].sum(), (x, weight))
        return y, *first, *second

    assert explain(ops.group_norm_silu, x, weight, bias, num_groups=2).backend == "library"
    composed = derivatives()
    assert "Fused" not in type(composed[0].grad_fn).__name__
    with use_backend("cpu"):
        fused = derivatives()
    assert "Fused" in type(fused[0].grad_fn).__name__
    for got, expected in zip(composed, fused, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found = explain(ops.group_norm_silu, x, weight, bias, num_groups=2)
    assert found.backend == "cpu" and "no gradients are recorded" in found.reasons["library"]


def test_no_graph_without_need():
    x = _leaf(3, 8)
    with torch.no_grad():
        assert not ops.geglu(x).requires_grad
    with torch.inference_mode():
        assert ops.geglu(x).is_inference()
    assert not ops.geglu(x.detach()).requires_grad
    assert ops.geglu(torch.nn.Parameter(torch.randn(3, 8))).requires_grad


def test_choice_is_cached_per_signature_and_bounded(monkeypatch):
    calls = []
    check = GEGLU.check
    monkeypatch.setattr(GEGLU, "check", lambda values: (calls.append(1), check(values)))
    monkeypatch.setattr(glue, "_MAX_PLANS", 3)
    GEGLU.info.forget()
    for _ in range(3):
        ops.geglu(torch.randn(5, 8))
    assert len(calls) == 1
    with use_backend("eager"):
        ops.geglu(torch.randn(5, 8))
    ops.geglu(torch.randn(5, 8), approximate="tanh")
    ops.geglu(torch.randn(5, 8).double())
    assert len(calls) == 4
    for width in range(2, 40, 2):
        ops.geglu(torch.randn(1, width))
        assert len(GEGLU._plans) <= 3
    GEGLU.info.forget()


def test_cached_choice_does_not_let_equal_values_of_other_types_in():
    """4 == 4.0 == True hash alike; the second and third are mistakes."""
    x = torch.randn(2, 8, 2, 2)
    ops.group_norm_silu(x, None, None, num_groups=1)
    for wrong in (1.0, True):
        with pytest.raises(ValueError, match="num_groups must be an int"):
            ops.group_norm_silu(x, None, None, num_groups=wrong)


def test_gradient_rule_holds_after_a_cached_call():
    arguments = {"alphas_cumprod": torch.linspace(1, 0, 5), "timesteps": torch.tensor([1])}
    x0, noise = torch.randn(1, 2, 2, 2), torch.randn(1, 2, 2, 2)
    ops.forward_diffusion(x0, noise=noise, **arguments)
    with pytest.raises(ValueError, match="no gradient is defined for noise"):
        ops.forward_diffusion(x0, noise=noise.requires_grad_(), **arguments)
    with torch.no_grad():
        ops.forward_diffusion(x0, noise=noise, **arguments)


@pytest.mark.parametrize(
    "op",
    [
        GEGLU,
        GROUP_NORM_SILU,
        FORWARD_DIFFUSION,
        DDIM_MOVE,
        LAYER_NORM,
        TO_UINT8,
        UPSAMPLE_CONV2D,
        LINEAR,
        LINEAR_GEGLU,
        CONV2D,
    ],
    ids=lambda op: op.name,
)
def test_raw_signature_public_signature_and_schema_agree(op):
    public = inspect.signature(getattr(ops, op.name)).parameters
    assert set(op.parameters) == set(public)
    schema = getattr(torch.ops.sdxl_fast, f"{op.name}_fwd").default._schema
    assert [argument.name for argument in schema.arguments] == list(op.parameters)
    assert next(iter(public)) == op.parameters[0] == op.info.lead


# ---- tracing ----


def _block(x, weight, bias, projected):
    y = ops.group_norm_silu(x, weight, bias, num_groups=2)
    return y.mean((2, 3)) @ ops.geglu(projected).T


def _block_arguments():
    return _leaf(2, 4, 3, 3), _leaf(4), _leaf(4), _leaf(6, 8)


@pytest.mark.slow  # Inductor starts a C++ compiler, a minute of one busy core
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor_compiles_forward_and_backward():
    arguments = _block_arguments()
    torch.compiler.reset()
    compiled = torch.compile(_block, fullgraph=True)
    expected = torch.autograd.grad(_block(*arguments).sum(), arguments)
    found = torch.autograd.grad(compiled(*arguments).sum(), arguments)
    torch.testing.assert_close(found, expected)


def test_compiled_call_obeys_use_backend_around_it(monkeypatch):
    torch.compiler.reset()
    compiled = torch.compile(ops.geglu, fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 8)
    names = []
    plan = GEGLU.plan
    monkeypatch.setattr(GEGLU, "plan", lambda args: (found := plan(args), names.append(found.backend))[0])
    compiled(x)
    with use_backend("eager"):
        compiled(x)
    assert names == [plan((x, "none", None)).backend, "eager"]


def test_compiled_channels_last_and_strided_inputs_keep_the_eager_layout():
    torch.compiler.reset()
    norm = torch.compile(
        lambda x: ops.group_norm_silu(x, None, None, num_groups=2), fullgraph=True, backend="aot_eager"
    )
    for x in (
        torch.randn(2, 4, 3, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(2, 4, 3, 10)[..., ::2],
        torch.randn(2, 8, 3, 5).contiguous(memory_format=torch.channels_last)[:, :4],
    ):
        eager, traced = ops.group_norm_silu(x, None, None, num_groups=2), norm(x)
        assert torch.equal(eager, traced) and eager.stride() == traced.stride()


def test_bad_input_is_named_in_compiled_code_too():
    torch.compiler.reset()
    compiled = torch.compile(ops.geglu, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="last dimension of x must be even"):
        compiled(torch.randn(3, 5))


def test_timesteps_are_checked_in_compiled_code():
    torch.compiler.reset()
    compiled = torch.compile(ops.forward_diffusion, fullgraph=True, backend="aot_eager")
    arguments = {"alphas_cumprod": torch.linspace(1, 0, 5), "seeds": torch.tensor([1])}
    x0 = torch.randn(1, 2, 2, 2)
    compiled(x0, timesteps=torch.tensor([4]), **arguments)
    with pytest.raises(ValueError, match="timesteps must be >= 0 and < 5"):
        compiled(x0, timesteps=torch.tensor([5]), **arguments)


def test_exports():
    class Block(torch.nn.Module):
        def forward(self, x, weight, bias, projected):
            return _block(x, weight, bias, projected)

    arguments = tuple(t.detach() for t in _block_arguments())
    program = torch.export.export(Block(), arguments)
    names = {str(node.target) for node in program.graph.nodes}
    assert {"sdxl_fast.group_norm_silu_fwd.default", "sdxl_fast.geglu_fwd.default"} <= names
    torch.testing.assert_close(program.module()(*arguments), _block(*arguments))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    arguments = _block_arguments()
    expected = torch.autograd.grad(_block(*arguments).sum(), arguments)
    checkpoint(_block, *arguments, use_reentrant=use_reentrant).sum().backward()
    for leaf, gradient in zip(arguments, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


def test_saved_tensors_can_be_offloaded():
    """Saved through autograd, so hooks such as offloading to the CPU see them."""
    x = _leaf(3, 8)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (packed.append(t), t)[1], lambda t: t):
        y = ops.geglu(x)
    y.sum().backward()
    assert len(packed) == 1 and packed[0].shape == (3, 8)


def test_reference_gradients_of_tied_inputs_are_not_counted_twice():
    """d/dr of r * f(r) by parts, the two inputs computed from one another."""
    x = torch.tensor(3.0, requires_grad=True)
    y = x * 2
    found = glue.reference_gradients(lambda a, b: a * b, (x, y), torch.tensor(1.0), (True, True))
    assert [t.item() for t in found] == [6.0, 3.0]
    assert all(t.requires_grad for t in found)
    partial = glue.reference_gradients(lambda a, b, c: a * b, (x, y, None), torch.tensor(1.0), (False, True, True))
    assert partial[0] is None and partial[1].item() == 3.0 and partial[2] is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_norms_without_a_backward_give_the_same_and_keep_no_statistics(dtype):
    x, w, b = torch.randn(3, 16, 5, 7).to(dtype), torch.randn(16).to(dtype), torch.randn(16).to(dtype)
    rows, shift = x.permute(0, 2, 3, 1).contiguous(), torch.randn(3, 16).to(dtype)
    calls = {
        GROUP_NORM_SILU: (x, w, b, shift, 4, 1e-5, "silu", None, None),
        LAYER_NORM: (rows, w, b, rows.flip(0), 1e-5, None),
    }
    for op, args in calls.items():
        kernels = op.plan(args)
        whole, alone = kernels.fwd(*args), (kernels.alone or kernels.fwd)(*args)
        assert len(alone) == op.flowing(whole) == len(whole) - 2
        assert all(torch.equal(y, again) for y, again in zip(whole, alone, strict=False))
