# SPDX-License-Identifier: Apache-2.0
"""The tests every op must pass, as a base class: subclass it in ``tests/ops/test_X.py`` and name the op's cases.

A backend that cannot run here skips with the registry's own reason. Outputs are allocated full of NaN throughout
(PyTorch's deterministic fill), so an element that no kernel wrote cannot pass for a zero.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch

from sdxl_fast.dispatch import available_backends, explain, use_backend
from sdxl_fast.op import FusedOp
from sdxl_fast.testing.cases import Case
from sdxl_fast.testing.compare import Comparison, Scale, assert_all, compare_all, error_scale
from sdxl_fast.testing.fence import fenced

Tensors = dict[str, torch.Tensor]
Values = dict[str, Any]

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
# Backends that run on a GPU only and lack float64.
GPU_ONLY = ("triton", "cuda")
# Elements of the lead tensor beyond which Triton's interpreter takes longer than a test should.
INTERPRETED_ELEMENTS = 6_000
# Below this size PyTorch's own error is the worst of several draws: a lucky rounding of one statistic would decide.
POOLED_BELOW = 10_000
_POOLED_DRAWS = 6


class Expected(NamedTuple):
    """What a case should give: the float64 oracle, PyTorch in the dtype, and how large PyTorch's error gets."""

    values: Values
    oracle: Tensors
    baseline: Tensors
    scales: dict[str, Scale]


def device_of(backend: str) -> str:
    """Returns the device type a backend is tested on: the GPU where it has one, else the CPU."""
    return "cpu" if backend == "cpu" or not torch.cuda.is_available() else "cuda"


def refusal(backend: str, op: str, values: Values | None = None) -> str | None:
    """Why ``backend`` cannot run (this call of) ``op`` here, or None if it can."""
    reason = available_backends()[op][backend]
    if reason is not None or values is None:
        return reason
    with use_backend(backend):
        found = explain(op, **values)
    return None if found.backend else found.reasons[backend]


def require(backend: str, op: str, values: Values | None = None) -> None:
    """Skips the running test, with the registry's reason, when ``backend`` cannot run (this call of) ``op`` here."""
    reason = refusal(backend, op, values)
    if reason is not None:
        pytest.skip(f"backend {backend}: {reason}")


def runnable(op: str, values: Values) -> list[str]:
    """The backends of ``op`` that can run this call here; eager always can."""
    found = [backend for backend in available_backends()[op] if refusal(backend, op, values) is None]
    assert "eager" in found
    return found


def _strided(t: torch.Tensor) -> torch.Tensor:
    """Returns t as a view with gaps in its last dimension and an odd storage offset."""
    wide = t.new_zeros((*t.shape[:-1], 2 * t.shape[-1] + 1))
    return wide[..., 1::2].copy_(t)


def _nhwc_slice(t: torch.Tensor) -> torch.Tensor:
    """Returns t as the first half of the channels of a channels_last tensor."""
    return torch.cat((t, t), 1).contiguous(memory_format=torch.channels_last)[:, : t.shape[1]]


FORMATS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": torch.Tensor.contiguous,
    "channels_last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "strided": _strided,
    "nhwc_slice": _nhwc_slice,
}


def _cpu(tensors: Tensors) -> Tensors:
    return {name: t.detach().cpu() for name, t in tensors.items()}


class OpSuite:
    """Base of the op tests. A subclass sets the class variables and writes ``make``."""

    op: ClassVar[FusedOp]
    public: ClassVar[Any]  # staticmethod(the public function)
    reference: ClassVar[ModuleType]
    outputs: ClassVar[tuple[str, ...]]
    inputs: ClassVar[tuple[str, ...]]  # the differentiable ones
    formats: ClassVar[tuple[str, ...]] = tuple(FORMATS)
    cases: ClassVar[tuple[Case, ...]]  # run in every dtype and format
    sdxl: ClassVar[tuple[Case, ...]]  # SDXL's own, cut to a size for a CPU: float32 and bfloat16
    full_size: ClassVar[tuple[Case, ...]]
    tiny: ClassVar[Case]  # a dozen elements, for what takes many evaluations
    wrong: ClassVar[tuple[str, ...]]  # names in reference.WRONG

    _expected: ClassVar[dict[Any, Expected]]

    def make(self, case: Case, dtype: torch.dtype, generator: torch.Generator) -> Values:
        """Returns the public function's arguments, contiguous and on the CPU."""
        raise NotImplementedError

    def rows(self, case: Case) -> dict[str, int]:
        """Returns over how many rows a tensor sums, for those that do."""
        return {}

    def __init_subclass__(cls) -> None:
        cls._expected = {}

    # ---- parametrisation ----

    @classmethod
    def pytest_generate_tests(cls, metafunc: pytest.Metafunc) -> None:
        """Gives every test the arguments it names, of the backends the op has; interpreted ones get small cases only.

        ``exact`` stands for a backend with float64, ``gpu`` for one without.
        """
        names = metafunc.fixturenames
        backends = cls.backends()
        if "full" in names:
            rows = list(itertools.product(cls.full_size, ("fp32", "bf16"), backends))
            metafunc.parametrize("full,dtype,backend", rows, ids=str)
        elif "case" in names:
            metafunc.parametrize("case,dtype,layout,backend", list(cls._matrix()), ids=str)
        elif "backend" in names:
            metafunc.parametrize("backend", backends)
        elif "exact" in names:
            metafunc.parametrize("exact", [b for b in backends if b not in GPU_ONLY])
        elif "gpu" in names:
            metafunc.parametrize("gpu", [b for b in backends if b in GPU_ONLY])
        if "variant" in names:
            metafunc.parametrize("variant", cls.wrong)

    @classmethod
    def backends(cls) -> list[str]:
        """Returns the names of the backends the op has."""
        return [backend.name for backend in cls.op.backends]

    @classmethod
    def _matrix(cls) -> Iterator[tuple[Case, str, str, str]]:
        for case, backend in itertools.product((*cls.cases, *cls.sdxl), cls.backends()):
            dtypes = DTYPES if case in cls.cases else ("fp32", "bf16")
            layouts = cls.formats if case in cls.cases else tuple(f for f in cls.formats if f != "nhwc_slice")
            slow = backend == "triton" and device_of(backend) == "cpu"
            if slow and case.numel > INTERPRETED_ELEMENTS:
                continue
            for dtype, layout in itertools.product(dtypes, layouts):
                if dtype == "fp64" and backend in GPU_ONLY:
                    continue  # they do not have it, and say so in test_refuses_float64
                if slow and layout not in ("contiguous", "channels_last"):
                    continue  # made dense before the backend sees them
                yield case, dtype, layout, backend

    @pytest.fixture(autouse=True)
    def _poison(self) -> Iterator[None]:
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=torch.cuda.is_available())
        yield
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])

    # ---- running ----

    def incoming(self, y: torch.Tensor, dtype: torch.dtype, index: int = 0) -> torch.Tensor:
        """Returns a gradient for output ``index`` that depends on its shape alone, rounded to ``dtype``."""
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(7 + index)).to(dtype)
        return fenced(torch.empty_like(y).copy_(dy))

    def roots(self, result: Any) -> list[torch.Tensor]:
        """Returns the outputs that carry gradients."""
        listed = [result] if isinstance(result, torch.Tensor) else list(result)
        return listed[: min(len(self.outputs), self.op.differentiable)]

    def incoming_all(self, roots: Sequence[torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        """Returns a gradient for each of the outputs ``roots``."""
        return [self.incoming(y.detach(), dtype, index) for index, y in enumerate(roots)]

    def named(self, result: Any) -> Tensors:
        """Returns outputs by name; an op may leave out the last ones, and then its reference does too."""
        return dict(zip(self.outputs, [result] if isinstance(result, torch.Tensor) else result, strict=False))

    def differentiate(self, call: Callable[..., Any], values: Values, dtype: torch.dtype) -> Tensors:
        """Returns the outputs of ``call(**values)`` and the gradients flowing back from them, named ``d<input>``."""
        leaves = {n: values[n].detach().requires_grad_() for n in self.inputs if values[n] is not None}
        result = call(**{**values, **leaves})
        roots = self.roots(result)
        found = torch.autograd.grad(roots, list(leaves.values()), self.incoming_all(roots, dtype))
        return {k: v.detach() for k, v in self.named(result).items()} | {
            f"d{n}": g for n, g in zip(leaves, found, strict=True)
        }

    def raw(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a raw forward as a function of the public arguments, without the glue."""

        def call(**values: Any) -> Any:
            bound = self.op.info.bind(**values)
            found = function(*self.op.prepare(tuple(bound[p] for p in self.op.parameters)))
            return found if isinstance(found, torch.Tensor) else found[: len(self.outputs)]

        return call

    def raw_incoming(self, listed: Sequence[torch.Tensor], dtype: torch.dtype) -> Any:
        """Returns the gradients of the outputs ``listed`` as the methods of the op take them."""
        return self.op.incoming(self.incoming_all(listed, dtype))

    def expected(self, case: Case, dtype: torch.dtype) -> Expected:
        """Returns arguments and expectation of a case, computed once."""
        key = (case.name, case.kind, dtype)
        if key not in self._expected:
            drawn = [self._expect(case, dtype, seed) for seed in range(1 + _POOLED_DRAWS * (case.numel < POOLED_BELOW))]
            values, oracle, baseline = drawn[0]
            scales = {name: Scale() for name in oracle}
            for _, exact, rounded in drawn:
                scales = {n: scales[n] | error_scale(rounded[n], exact[n]) for n in scales}
            if "channels_last" in self.formats:
                # PyTorch adds up in another order there, and less exactly.
                other = {
                    k: FORMATS["channels_last"](v) if isinstance(v, torch.Tensor) and v.ndim == 4 else v
                    for k, v in values.items()
                }
                rounded = self.differentiate(self.raw(self.reference.fwd), other, dtype)
                scales = {n: scales[n] | error_scale(rounded[n], oracle[n]) for n in scales}
            if dtype == torch.float64:
                # The oracle is no more exact than what is tested: both err as float32 does, in smaller units. Sixteen
                # of them, because a backend may sum float32 in float64 but has nothing better to sum float64 in.
                units = 16 * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
                scales = {n: scale * units for n, scale in self.expected(case, torch.float32).scales.items()}
            self._expected[key] = Expected(values, oracle, baseline, scales)
        return self._expected[key]

    def _expect(self, case: Case, dtype: torch.dtype, seed: int) -> tuple[Values, Tensors, Tensors]:
        values = self.make(case, dtype, torch.Generator().manual_seed(seed))
        exact = {
            k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()
        }
        call = self.raw(self.reference.fwd)
        return values, self.differentiate(call, exact, dtype), self.differentiate(call, values, dtype)

    def compare(self, case: Case, dtype: torch.dtype, got: Tensors) -> list[Comparison]:
        """Compares outputs and gradients of a case with what they should be."""
        _, oracle, baseline, scales = self.expected(case, dtype)
        return compare_all(
            _cpu(got),
            oracle,
            baseline,
            op=self.op.name,
            gradients=[f"d{n}" for n in self.inputs],
            rows=self.rows(case),
            scales=scales,
        )

    def place(self, values: Values, backend: str, layout: str = "contiguous") -> Values:
        """Returns copies on the backend's device; those with the lead tensor's shape get the memory format.

        The C++ backend gets them fenced: nobody would see it read past them otherwise.
        """
        shape = values[self.op.parameters[0]].shape
        placed = dict(values)
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                value = value.detach().to(device_of(backend), copy=True)
                value = FORMATS[layout](value) if value.shape == shape and value.ndim > 1 else value
                placed[name] = fenced(value) if backend == "cpu" else value
        return placed

    def ready(self, backend: str, case: Case | None = None, dtype: torch.dtype = torch.float32) -> Values:
        """Returns arguments on the backend's device, or skips."""
        values = self.place(self.expected(case or self.tiny, dtype).values, backend)
        require(backend, self.op.name, values)
        return values

    # ---- tests: numbers ----

    def test_matches_oracle(self, case: Case, dtype: str, layout: str, backend: str) -> None:
        """Outputs and gradients are right, the inputs untouched, the memory format kept."""
        self._check_against_oracle(case, DTYPES[dtype], layout, backend)

    @pytest.mark.large
    def test_full_size_matches_oracle(self, full: Case, dtype: str, backend: str) -> None:
        """The same on the maps of a 1024 px image."""
        self._check_against_oracle(full, DTYPES[dtype], self.formats[min(1, len(self.formats) - 1)], backend)
        self._expected.clear()  # gigabytes

    def _check_against_oracle(self, case: Case, dtype: torch.dtype, layout: str, backend: str) -> None:
        require(backend, self.op.name)
        values = self.place(self.expected(case, dtype).values, backend, layout)
        require(backend, self.op.name, values)
        before = {k: v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
        with use_backend(backend):
            with torch.no_grad():
                plain = self.public(**values)
            got = self.differentiate(self.public, values, dtype)
        assert_all(self.compare(case, dtype, got))
        for name, tensor in self.named(plain).items():
            assert torch.equal(tensor, got[name]), f"{name} differs between grad and no_grad"
        for name, tensor in before.items():
            assert torch.equal(values[name], tensor), f"{name} was written to"
        self.check_layout(values, got, layout)

    def check_layout(self, values: Values, got: Tensors, layout: str) -> None:
        """Asserts that outputs of the lead tensor's shape have its memory format."""
        wanted = torch.contiguous_format if layout in ("contiguous", "strided") else torch.channels_last
        shape = values[self.op.parameters[0]].shape
        for name in self.outputs:
            if name in got and got[name].shape == shape and got[name].ndim == 4 and got[name].numel():
                assert got[name].is_contiguous(memory_format=wanted), f"{name} is not {wanted}"

    def test_second_order(self, backend: str) -> None:
        """A penalty on the gradient (as R1 is) has the gradient that differentiating the reference gives."""
        for dtype in (torch.float32, torch.bfloat16):
            values = self.ready(backend, dtype=dtype)

            def penalty(call: Callable[..., Any], arguments: Values, dtype: torch.dtype = dtype) -> Tensors:
                leaves = {n: arguments[n].detach().requires_grad_() for n in self.inputs if arguments[n] is not None}
                roots = self.roots(call(**{**arguments, **leaves}))
                dy = [t.requires_grad_() for t in self.incoming_all(roots, dtype)]
                first = torch.autograd.grad(roots, list(leaves.values()), dy, create_graph=True)
                sources = [*leaves.values(), *dy]
                names = [*leaves, *(f"y{index}" for index in range(len(dy)))]
                total = torch.stack([(g.double() ** 2).sum() for g in first]).sum()
                second = torch.autograd.grad(total, sources, allow_unused=True)
                return {
                    f"dd{n}": torch.zeros_like(s) if g is None else g
                    for n, s, g in zip(names, sources, second, strict=True)
                }

            exact = {
                k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in values.items()
            }
            reference = self.raw(self.reference.fwd)
            with use_backend(backend):
                got = penalty(self.public, values)
            oracle, baseline = _cpu(penalty(reference, exact)), _cpu(penalty(reference, values))
            assert_all(compare_all(_cpu(got), oracle, baseline, op=self.op.name, gradients=list(oracle)))

    def test_gradcheck(self, exact: str) -> None:
        """Analytic derivatives equal numerical ones in float64, first and second."""
        values = self.ready(exact, dtype=torch.float64)
        names = [n for n in self.inputs if values[n] is not None]
        leaves = [values[n].requires_grad_() for n in names]

        def call(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            with use_backend(exact):
                return tuple(self.roots(self.public(**{**values, **dict(zip(names, tensors, strict=True))})))

        assert torch.autograd.gradcheck(call, leaves)
        assert torch.autograd.gradgradcheck(call, leaves)

    def test_wrong_variant_is_rejected(self, variant: str) -> None:
        """The comparison itself works: a deliberately wrong op does not pass every case."""
        wrong = self.reference.WRONG[variant]
        for case, dtype in itertools.product(self.cases, (torch.float32, torch.bfloat16)):
            if case.numel == 0:
                continue
            values = self.expected(case, dtype).values
            bound = self.op.info.bind(**values)
            args = self.op.prepare(tuple(bound[p] for p in self.op.parameters))
            forward = wrong.function if wrong.of == "fwd" else self.reference.fwd
            backward = wrong.function if wrong.of == "bwd" else self.reference.bwd
            found = forward(*args)
            listed = (found,) if isinstance(found, torch.Tensor) else found
            needs = [p in self.inputs for p in self.op.parameters]
            scalars = tuple(None if isinstance(a, torch.Tensor) else a for a in args)
            dy = self.raw_incoming(listed, dtype)
            raw = backward(*self.op.bwd_arguments(dy, self.op.saved(args, listed), scalars, needs))
            gradients = dict(zip(self.op.parameters, self.op.place_gradients(raw), strict=True))
            got = dict(zip(self.outputs, listed, strict=False))
            got |= {f"d{n}": g for n, g in gradients.items() if g is not None}
            if not all(outcome.passed for outcome in self.compare(case, dtype, got)):
                return
        pytest.fail(f"the comparison accepts {self.op.name} {wrong.of} {variant!r} on every case")
