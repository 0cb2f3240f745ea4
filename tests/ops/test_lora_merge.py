# SPDX-License-Identifier: Apache-2.0
"""``ops.lora_merge``: every backend against float64, memory formats, bases, what must not be touched, and refusals."""

from __future__ import annotations

import itertools
import math
import sys

import pytest
import torch
from torch import nn

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import BACKENDS, explain, record
from sdxl_fast.ops.lora_merge import _OP
from sdxl_fast.reference import lora_merge as reference
from sdxl_fast.testing.compare import Scale, assert_all, compare_all, error_scale
from sdxl_fast.testing.fence import fenced
from sdxl_fast.testing.op_suite import DTYPES, device_of, require

HAVE = [backend.name for backend in _OP.backends]
NATIVE = ["cpu", "eager"]
# Weights and ranks: whole tiles and vectors, a 3x3 and a 1x1 convolution, ragged ones, more ranks than are taken at a
# time, a row, a column, one element.
MODULES = [
    ((64, 128), 16), ((48, 16, 3, 3), 8), ((24, 40, 1, 1), 4), ((7, 33), 5), ((70, 260), 3), ((5, 3, 3, 3), 1),
    ((16, 40), 80), ((1, 9), 2), ((6, 1), 2), ((1, 1), 1),
]  # fmt: skip
# More elements than these and Triton's interpreter takes too long.
INTERPRETED = slice(2, 6)


def _modules(backend):
    slow = backend == "triton" and device_of(backend) == "cpu"
    return MODULES[INTERPRETED] if slow else MODULES


def _draw(modules, dtype, factor_dtype, seed=0, device="cpu"):
    """weights, downs, ups and scales; the factors of a convolution as diffusers and peft shape them."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    weights, downs, ups = [], [], []
    for shape, rank in modules:
        weights.append(normal(*shape).to(dtype).to(device))
        downs.append(normal(rank, *shape[1:]).to(factor_dtype).to(device))
        ups.append((normal(shape[0], rank, *[1] * (len(shape) - 2)) / math.sqrt(rank)).to(factor_dtype).to(device))
    return weights, downs, ups, [0.5 + 0.25 * i for i in range(len(modules))]


def _merged(backend, weights, downs, ups, scales, **rest):
    with use_backend(backend):
        assert ops.lora_merge(weights, downs, ups, scales=scales, **rest) is None
    return {str(i): w.detach().cpu() for i, w in enumerate(weights)}


def _in_float64(weights, downs, ups, scales):
    exact = [[t.to(torch.float64, copy=True) for t in tensors] for tensors in (weights, downs, ups)]
    return _merged("eager", *exact, scales)


def _check(got, modules, dtype, factor_dtype):
    """By the bound of `compare`, PyTorch's own error being the worst of several draws."""
    scales = {}
    for seed in range(5):
        drawn = _draw(modules, dtype, factor_dtype, seed)
        oracle = _in_float64(*drawn)
        baseline = _merged("eager", *drawn)
        if seed == 0:
            first = oracle, baseline
        for name in oracle:
            scales[name] = scales.get(name, Scale()) | error_scale(baseline[name], oracle[name])
    rows = {str(i): rank for i, (_, rank) in enumerate(modules)}
    assert_all(compare_all(got, *first, op="lora_merge", rows=rows, scales=scales))


KINDS = [*itertools.product(("fp32", "bf16", "fp16"), repeat=2), ("fp64", "fp64")]


@pytest.mark.parametrize("backend", HAVE)
@pytest.mark.parametrize(("dtype", "factors"), KINDS, ids=lambda name: name)
def test_matches_the_oracle(dtype, factors, backend):
    """Many modules in one call, factors of any dtype beside the weights'."""
    require(backend, "lora_merge")
    if dtype == "fp64" and backend not in NATIVE:
        pytest.skip("float64 is refused")
    modules = _modules(backend)
    kinds = DTYPES[dtype], DTYPES[factors]
    got = _merged(backend, *_draw(modules, *kinds, device=device_of(backend)))
    _check(got, modules, *kinds)


@pytest.mark.parametrize("backend", HAVE)
def test_takes_unaligned_memory(backend):
    """Weights that begin one element into their storage, as slices of a packed tensor may."""
    require(backend, "lora_merge")
    modules = [((16, 32), 16), ((8, 16, 3, 3), 16)]
    for dtype, factors in ((torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)):
        drawn = _draw(modules, dtype, factors, device=device_of(backend))
        expected = _merged(backend, [w.clone() for w in drawn[0]], *drawn[1:])
        shifted = [[torch.cat((t.new_zeros(1), t.flatten()))[1:].view(t.shape) for t in part] for part in drawn[:3]]
        assert all(t.data_ptr() % 16 for t in shifted[0])
        got = _merged(backend, *shifted, drawn[3])
        assert all(torch.equal(got[name], expected[name]) for name in got)


@pytest.mark.parametrize(("dtype", "factors"), KINDS, ids=lambda name: name)
def test_the_cpu_reads_nothing_past_its_arguments(dtype, factors):
    """Some columns fill whole vectors, and others none, of the strip that a product takes."""
    require("cpu", "lora_merge")
    *parts, scales = _draw([((7, cols), 5) for cols in (1, 15, 16, 17, 33, 48, 80)], DTYPES[dtype], DTYPES[factors])
    expected = _merged("cpu", [w.clone() for w in parts[0]], *parts[1:], scales)
    got = _merged("cpu", *([fenced(t) for t in part] for part in parts), scales)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


@pytest.mark.parametrize("backend", HAVE)
def test_memory_format_does_not_matter(backend):
    """channels_last weights are written where they are; the factors may be matrices or have the kernel's shape."""
    require(backend, "lora_merge")
    modules = [((8, 16, 3, 3), 4), ((6, 5, 3, 3), 3), ((8, 16, 1, 1), 2)]
    weights, downs, ups, scales = _draw(modules, torch.bfloat16, torch.float32, device=device_of(backend))
    expected = _merged(backend, [w.clone() for w in weights], downs, ups, scales)
    turned = [w.to(memory_format=torch.channels_last) for w in weights]
    forms = {
        "turned": (turned, downs, ups),
        "matrices": (weights, [d.flatten(1) for d in downs], [u.flatten(1) for u in ups]),
        "strided factors": (weights, [d.mT.contiguous().mT for d in downs], [u.mT.contiguous().mT for u in ups]),
        "turned, matrices": (turned, [d.flatten(1) for d in downs], ups),
    }
    for name, (first, *factors) in forms.items():
        copies = [w.clone() for w in first]
        before = [(w.data_ptr(), w.stride()) for w in copies]
        got = _merged(backend, copies, *factors, scales)
        assert before == [(w.data_ptr(), w.stride()) for w in copies]
        assert all(torch.equal(got[i], expected[i]) for i in got), name


@pytest.mark.parametrize("backend", HAVE)
def test_bases_are_read_and_weights_only_written(backend):
    """Swapping back and forth leaves no trace, whatever the weights held and however the bases lie in memory."""
    require(backend, "lora_merge")
    modules = [((24, 40), 4), ((5, 3, 3, 3), 2)]
    bases, downs, ups, scales = _draw(modules, torch.bfloat16, torch.bfloat16, device=device_of(backend))
    expected = _merged(backend, [b.clone() for b in bases], downs, ups, scales)
    kept = [b.clone() for b in bases]
    weights = [torch.full_like(b, float("nan")) for b in bases]
    for given in (bases, [bases[0], bases[1].to(memory_format=torch.channels_last)]):
        other = [-2 * d for d in downs]
        _merged(backend, weights, other, ups, scales, bases=given)
        got = _merged(backend, weights, downs, ups, scales, bases=given)
        assert all(torch.equal(got[name], expected[name]) for name in got)
    assert all(map(torch.equal, bases, kept))


@pytest.mark.parametrize("backend", HAVE)
def test_nothing_but_the_weights_is_touched(backend):
    """Neighbours of a slice in the same storage, the factors; twice the same gives twice the same."""
    require(backend, "lora_merge")
    packed = torch.randn(20, 33, device=device_of(backend)).bfloat16()
    before = packed.clone()
    _, (down,), (up,), _ = _draw([((7, 33), 3)], torch.bfloat16, torch.float32, device=device_of(backend))
    factors = down.clone(), up.clone()
    _merged(backend, [packed[5:12]], [down], [up], [1.0])
    assert torch.equal(packed[:5], before[:5]) and torch.equal(packed[12:], before[12:])
    assert not torch.equal(packed[5:12], before[5:12])
    assert torch.equal(down, factors[0]) and torch.equal(up, factors[1])
    again = before.clone()
    _merged(backend, [again[5:12]], [down], [up], [1.0])
    assert torch.equal(again, packed)


@pytest.mark.parametrize("backend", HAVE)
def test_without_rank_or_elements(backend):
    require(backend, "lora_merge")
    place = {"device": device_of(backend)}
    sizes = [((3, 0), 2), ((0, 5), 2), ((4, 6), 0), ((2, 3), 1)]
    weights = [torch.ones(shape, **place) for shape, _ in sizes]
    downs = [torch.ones(rank, shape[1], **place) for shape, rank in sizes]
    ups = [torch.ones(shape[0], rank, **place) for shape, rank in sizes]
    _merged(backend, weights, downs, ups, 2.0)
    assert weights[2].eq(1).all() and weights[3].eq(3).all()
    _merged(backend, weights[:2], downs[:2], ups[:2], 1.0)
    with use_backend(backend):
        ops.lora_merge([], [], [])


@pytest.mark.parametrize("backend", HAVE)
def test_many_modules_find_their_own_factors(backend):
    """More than a warp's look into the table, more than its square, sizes without tiles in between."""
    require(backend, "lora_merge")
    for count in (33, 70) if backend == "triton" else (33, 1100):
        weights = [torch.zeros(i % 3, 2, device=device_of(backend)) for i in range(count)]
        downs = [torch.full((1, 2), float(i), device=device_of(backend)) for i in range(count)]
        ups = [torch.ones(i % 3, 1, device=device_of(backend)) for i in range(count)]
        got = _merged(backend, weights, downs, ups, [1.0 + i % 2 for i in range(count)])
        assert all(got[str(i)].eq(i * (1 + i % 2)).all() for i in range(count))


@pytest.mark.parametrize("variant", reference.WRONG)
def test_wrong_variant_is_rejected(variant):
    wrong = reference.WRONG[variant].function
    modules = [((24, 40), 4), ((5, 6, 3, 3), 3), ((16, 40), 80)]
    for dtype in (torch.bfloat16, torch.float32):
        bases, downs, ups, scales = _draw(modules, dtype, dtype)
        weights = [b.clone() if variant != "base_ignored" else torch.zeros_like(b) for b in bases]
        wrong(weights, bases, downs, ups, scales)
        try:
            _check({str(i): w for i, w in enumerate(weights)}, modules, dtype, dtype)
        except AssertionError:
            return
    pytest.fail("accepted")


# ---- how it behaves in PyTorch ----


def test_parameters_keep_their_memory_and_autograd_notices():
    layer = nn.Linear(6, 4)
    x = torch.randn(2, 6, requires_grad=True)
    down, up = nn.Parameter(torch.randn(3, 6)), nn.Parameter(torch.randn(4, 3))
    address, expected = layer.weight.data_ptr(), (layer.weight + 0.5 * up @ down).detach()
    y = layer(x)
    with torch.no_grad():
        ops.lora_merge([layer.weight], [down], [up], scales=0.5)
    assert layer.weight.data_ptr() == address
    torch.testing.assert_close(layer.weight.detach(), expected)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_in_inference_mode():
    with torch.inference_mode():
        weight, down, up = torch.zeros(2, 3), torch.ones(1, 3), torch.ones(2, 1)
        ops.lora_merge([weight], [down], [up])
        assert weight.eq(1).all()


def test_autocast_does_not_reach_the_product():
    drawn = _draw([((24, 40), 8)], torch.float32, torch.float32)
    expected = _merged("eager", [w.clone() for w in drawn[0]], *drawn[1:])
    with torch.autocast("cpu", torch.bfloat16):
        got = _merged("eager", *drawn)
    assert torch.equal(got["0"], expected["0"])


def test_compiles_and_takes_subclasses():
    """Traced and on fake tensors the plain operations run."""
    weights, downs, ups, scales = _draw([((4, 6), 2), ((4, 3, 3, 3), 1)], torch.float32, torch.float32)

    def merge(weights, downs, ups):
        ops.lora_merge(weights, downs, ups, scales=scales)
        return [w + 1 for w in weights]

    torch.compiler.reset()
    expected = merge([w.clone() for w in weights], downs, ups)
    got = torch.compile(merge, backend="aot_eager", fullgraph=True)([w.clone() for w in weights], downs, ups)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        fake = [[mode.from_tensor(t) for t in tensors] for tensors in (weights, downs, ups)]
        ops.lora_merge(*fake)
    meta = [[t.to("meta") for t in tensors] for tensors in (weights, downs, ups)]
    ops.lora_merge(*meta)


def test_the_backend_is_chosen_named_and_counted():
    drawn = _draw([((4, 6), 2)], torch.float32, torch.float32)
    found = explain(ops.lora_merge, *drawn[:3], scales=2.0)
    assert found.backend in ("cpu", "eager") and set(found.reasons) == set(BACKENDS) - {found.backend}
    with record() as counts:
        ops.lora_merge(*drawn[:3])
    assert dict(counts) == {("lora_merge", found.backend): 1}
    assert explain("lora_merge", [], [], []).backend is not None


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_refuses_float64(backend):
    require(backend, "lora_merge")
    drawn = _draw([((4, 6), 2)], torch.float64, torch.float64, device=device_of(backend))
    with use_backend(backend), pytest.raises(ValueError, match=f"{backend}.*must be .*got float64"):
        ops.lora_merge(*drawn[:3])


# ---- refusals ----

W, D, U = torch.zeros(4, 6), torch.zeros(2, 6), torch.zeros(4, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((W, [D], [U]), "weights must be a list of tensors, got Tensor"),
        (([W], [D, D], [U]), "downs must be as many as weights, 1, got 2"),
        (([W], [D], [None]), r"ups\[0\] must be a tensor, got NoneType"),
        (([W], [D], [U], {"scales": [1.0, 2.0]}), r"scales must be a number or a list of 1 numbers, got \[1.0, 2.0\]"),
        (([W], [D], [U], {"scales": [float("nan")]}), r"scales\[0\] must be a finite number, got nan"),
        (([W], [D], [U], {"scales": True}), r"scales\[0\] must be a finite number, got True"),
        (([W], [D], [U], {"bases": []}), "bases must be as many as weights, 1, got 0"),
        (([W.int()], [D], [U]), r"weights\[0\] must be float32.*got int32; convert it"),
        (([W, W.half()], [D, D], [U, U]), r"weights\[1\] must have the dtype of weights\[0\], float32, got float16"),
        (([W], [D], [U], {"bases": [W.half()]}), r"bases\[0\] must have the dtype of weights\[0\]"),
        (([W], [D], [U.half()]), r"ups\[0\] must have the dtype of downs\[0\], float32, got float16"),
        (([W], [D.double()], [U.double()]), "must both be float64 or neither, got weights float32 and downs float64"),
        (([W], [D.to("meta")], [U]), r"downs\[0\] must be on the device of weights\[0\], cpu, got meta; move it"),
        (([W[0]], [D], [U]), r"weights\[0\] must have at least 2 dimensions \[out, in, ...\], got shape \[6\]"),
        (([W], [D], [U], {"bases": [W[:2]]}), r"bases\[0\] must have the shape of its weight \[4, 6\], got \[2, 6\]"),
        (([W], [D[:, :5]], [U]), r"downs\[0\] must have shape \[rank, 6\], got \[2, 5\]"),
        (([W], [D], [U[:, :1]]), r"ups\[0\] must have shape \[4, 2\] = \[out, rank\], got \[4, 1\]"),
        (([W.mT.contiguous().mT], [D], [U]), r"weights\[0\] must be contiguous or channels_last.*\[1, 4\]; merge into"),
        (([W, W], [D, D], [U, U]), r"weights\[0\] and weights\[1\] share memory"),
    ],
)  # fmt: skip
def test_bad_input_names_argument_value_and_remedy(arguments, message):
    *positional, keywords = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(ValueError, match=message):
        ops.lora_merge(*positional, **keywords)


def test_memory_that_is_written_may_not_be_read_elsewhere():
    packed = torch.zeros(8, 6)
    with pytest.raises(ValueError, match=r"weights\[0\] and weights\[1\] share memory"):
        ops.lora_merge([packed[:4], packed[3:7]], [D, D], [U, U])
    with pytest.raises(ValueError, match=r"bases\[1\] shares memory with weights\[0\].*bases\[1\].clone"):
        ops.lora_merge([packed[:4], W], [D, D], [U, U], bases=[packed[:4], packed[2:6]])
    with pytest.raises(ValueError, match=r"downs\[0\] shares memory with weights\[0\]"):
        ops.lora_merge([packed[:4]], [packed[2:4]], [U])
    ops.lora_merge([packed[:4], packed[4:]], [D, D], [U, U], bases=[packed[:4], W])


def test_graphs_are_not_recorded_through_it():
    weight = nn.Parameter(torch.zeros(4, 6))
    with pytest.raises(ValueError, match=r"weights\[0\] requires grad, .* call it under torch.no_grad"):
        ops.lora_merge([weight], [D], [U])
    with pytest.raises(ValueError, match=r"ups\[0\] requires grad"):
        ops.lora_merge([W], [D], [nn.Parameter(U)])


def test_is_not_captured(monkeypatch):
    """A graph would merge once more at every replay; on CUDA its table of addresses could not be pinned either."""
    weights, downs, ups, scales = _draw(MODULES[:1], torch.float32, torch.float32)
    before = weights[0].clone()
    monkeypatch.setitem(vars(sys.modules[type(_OP).__module__]), "_capturing", lambda lead: True)
    with pytest.raises(RuntimeError, match="a CUDA graph is being captured"):
        ops.lora_merge(weights, downs, ups, scales=scales)
    assert torch.equal(weights[0], before)
