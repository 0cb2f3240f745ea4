# SPDX-License-Identifier: Apache-2.0
"""``ops.ddim_move``: the shared suite, the textbook formula, the levels at the ends, the noise of the second result."""

from __future__ import annotations

import itertools

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.diffusion import prediction, schedule
from sdxl_fast.dispatch import BACKENDS
from sdxl_fast.ops.ddim_move import _OP
from sdxl_fast.reference import ddim_move as reference
from sdxl_fast.testing.cases import Case, draw, sdxl_cases, shrunk
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import FORMATS, device_of, require

TABLE = schedule.alphas_cumprod()
KINDS = reference.PREDICTION_TYPES
SEEDS = torch.tensor([3, -1, 2**40 + 5, 0, 2**63 - 1])
# Each sample takes another road: to the clean latent, down a stride, nowhere, up again, from the clean latent.
NOW = torch.tensor([999, 499, 250, 10, -1])
THEN = torch.tensor([-1, 249, 250, 749, 999])
AGAIN = torch.tensor([749, 10, 999, 0, 499])


class TestDdimMove(ContractSuite):
    op = _OP
    public = staticmethod(ops.ddim_move)
    reference = reference
    outputs = ("x_next", "x_renoised")
    inputs = ("x_t", "model_output")
    wrong = tuple(reference.WRONG)
    cases = (
        *(Case(f"ragged-{kind}", (5, 5, 7, 3), {"kind": kind, "stream": 3}) for kind in KINDS),
        *(Case(f"plain-{kind}", (5, 3, 5, 3), {"kind": kind, "plain": True}) for kind in KINDS),
        Case("autocast", (5, 4, 4, 6), {"kind": "epsilon", "autocast": True}),
        Case("autocast-plain", (5, 4, 4, 6), {"kind": "v_prediction", "autocast": True, "plain": True}),
        Case("one-element", (1, 1, 1, 1), {"kind": "sample"}),
        Case("empty-batch", (0, 4, 4, 4), {"kind": "epsilon"}),
        Case("empty-map", (2, 4, 0, 4), {"kind": "epsilon"}),
        Case("high-stream", (2, 4, 3, 3), {"kind": "v_prediction", "stream": 2**62 + 7}),
    )
    sdxl = shrunk(sdxl_cases("forward_diffusion", batch=2), longest=16)
    full_size = sdxl_cases("forward_diffusion", batch=2)
    tiny = Case("tiny", (3, 3, 2, 3), {"kind": "v_prediction", "stream": 1})

    def make(self, case, dtype, generator):
        n, plain = case.shape[0], case.options.get("plain", False)
        narrow = torch.bfloat16 if case.options.get("autocast") and dtype == torch.float32 else dtype
        return {
            "x_t": draw(case.shape, case.kind, generator).to(dtype),
            "model_output": draw(case.shape, "normal", generator).to(narrow),
            "alphas_cumprod": TABLE.double() if dtype == torch.float64 else TABLE,
            "timesteps": NOW[:n],
            "next_timesteps": THEN[:n],
            "prediction_type": case.options.get("kind", "epsilon"),
            "renoise_timesteps": None if plain else AGAIN[:n],
            "seeds": None if plain else SEEDS[:n] + generator.initial_seed(),
            "stream": case.options.get("stream", 0),
        }


def _place(backend, *tensors, layout="contiguous"):
    return [FORMATS[layout](t.to(device_of(backend))) if t.ndim == 4 else t.to(device_of(backend)) for t in tensors]


def _move(backend, x_t, output, now, then, kind, table=TABLE, **rest):
    x_t, output, now, then, table = _place(backend, x_t, output, now, then, table)
    rest = {k: v.to(x_t.device) if isinstance(v, torch.Tensor) else v for k, v in rest.items()}
    levels = {"alphas_cumprod": table, "timesteps": now, "next_timesteps": then, "prediction_type": kind}
    with use_backend(backend):
        return ops.ddim_move(x_t, output, **levels, **rest)


# ---- the step ----


@pytest.mark.parametrize("backend", ["eager", "cpu"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_the_textbook_step(kind, backend):
    """Against x0 and epsilon as `diffusion.prediction` converts them, in float64."""
    require(backend, "ddim_move")
    levels = torch.tensor([-1, 0, 1, 250, 998, 999])
    now, then = (t.flatten() for t in torch.meshgrid(levels, levels, indexing="ij"))
    x_t, output = torch.randn(2, len(now), 2, 3, 3, dtype=torch.float64)
    table = TABLE.double()
    x0 = prediction.to_x0(output, x_t, now, table, kind)
    epsilon = prediction.to_epsilon(output, x_t, now, table, kind)
    alpha, sigma = schedule.alpha_sigma(table, then, 4)
    expected = torch.where((now == then)[:, None, None, None], x_t, alpha * x0 + sigma * epsilon)
    torch.testing.assert_close(_move(backend, x_t, output, now, then, kind, table), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_are_rounded_once(kind, backend):
    """To the last bit: their error is shared by a whole sample, no mean makes it smaller."""
    require(backend, "ddim_move")
    generator = torch.Generator().manual_seed(0)
    now, then = (torch.randperm(1001, generator=generator) - 1 for _ in range(2))
    if backend == "triton" and device_of(backend) == "cpu":
        now, then = now[:40], then[:40]
    one, zero = torch.ones(len(now), 1, 1, 1), torch.zeros(len(now), 1, 1, 1)
    found = [_move(backend, *inputs, now, then, kind).flatten().cpu() for inputs in ((one, zero), (zero, one))]
    exact = reference.coefficients(TABLE.double(), now, then, kind, torch.float64)
    for got, expected in zip(found, exact, strict=True):
        assert torch.equal(got, expected.float())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_to_where_it_stands_is_the_identity(kind, backend):
    """Bit for bit, whatever the model said, and no gradient reaches the model."""
    require(backend, "ddim_move")
    t = torch.tensor([999, 500, 0, -1])
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        (x_t,) = _place(backend, torch.randn(4, 3, 3, 5).to(dtype))
        (output,) = _place(backend, torch.full_like(x_t, float("inf")))
        x_t.requires_grad_(), output.requires_grad_()
        moved = _move(backend, x_t, output, t, t, kind)
        assert torch.equal(moved, x_t)
        dy = torch.randn_like(moved)
        dx, doutput = torch.autograd.grad(moved, (x_t, output), dy)
        assert torch.equal(dx, dy) and not doutput.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_sample_prediction_at_the_clean_latent_ignores_what_it_has_no_noise_of(backend):
    """epsilon is 0/0 there and counts as 0, so x_next is the predicted x0 scaled; x_t may hold anything."""
    require(backend, "ddim_move")
    x_t, output = torch.full((1, 2, 3, 3), float("nan")), torch.randn(1, 2, 3, 3)
    moved = _move(backend, x_t, output, torch.tensor([-1]), torch.tensor([499]), "sample").cpu()
    torch.testing.assert_close(moved, TABLE[499].sqrt() * output)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", KINDS)
def test_one_step_from_the_last_level_finds_the_clean_latent(kind, backend):
    """A perfect model's output leads back to the x0 that was noised."""
    require(backend, "ddim_move")
    x0, noise = torch.randn(2, 2, 4, 5, 5)
    now, clean = torch.tensor([999, 499]), torch.tensor([-1, -1])
    x_t, _ = ops.forward_diffusion(x0, alphas_cumprod=TABLE, timesteps=now, noise=noise)
    output = prediction.target(x0, noise, now, TABLE, kind)
    # At the last level x_t holds x0 times 0.068: float32's rounding is magnified by its inverse.
    torch.testing.assert_close(_move(backend, x_t, output, now, clean, kind).cpu(), x0, rtol=1e-5, atol=1e-5)


# ---- the noised copy ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_renoised_is_forward_diffusion_of_the_move(layout, backend):
    """The same noise bit for bit, and x_next the same as without noise."""
    require(backend, "ddim_move")
    for dtype, shape in itertools.product((torch.float32, torch.bfloat16), ((5, 4, 8, 8), (5, 3, 5, 7))):
        x_t, output = (FORMATS[layout](t) for t in _place(backend, *torch.randn(2, *shape).to(dtype)))
        noising = {"seeds": SEEDS, "stream": 2**33 + 5}
        x_next, renoised = _move(backend, x_t, output, NOW, THEN, "epsilon", renoise_timesteps=AGAIN, **noising)
        assert torch.equal(x_next, _move(backend, x_t, output, NOW, THEN, "epsilon"))
        table, again, seeds = _place(backend, TABLE, AGAIN, SEEDS)
        with use_backend(backend):
            expected, noise = ops.forward_diffusion(
                x_next, alphas_cumprod=table, timesteps=again, seeds=seeds, stream=2**33 + 5
            )
        # The multiply-adds may be fused in one kernel and not in the other: one rounding of the dtype.
        torch.testing.assert_close(renoised, expected, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)
        # Between levels of which one is all noise (ab = 0), the copy is the noise itself.
        zero = {"table": torch.tensor([1.0, 0.0]), "renoise_timesteps": torch.ones(5, dtype=torch.int64)}
        stay = torch.zeros(5, dtype=torch.int64)
        _, pure = _move(backend, torch.zeros_like(x_t), output, stay, stay, "sample", **zero, **noising)
        assert torch.equal(pure, noise)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("root", [0, 1])
def test_either_result_alone_has_gradients(root, backend):
    """Backward through one of the two results equals that of the composition."""
    require(backend, "ddim_move")
    x_t, output = _place(backend, *torch.randn(2, 5, 4, 3, 5))
    leaves = [x_t.requires_grad_(), output.requires_grad_()]
    found = _move(backend, *leaves, NOW, THEN, "v_prediction", renoise_timesteps=AGAIN, seeds=SEEDS)
    dy = torch.randn_like(x_t)
    got = torch.autograd.grad(found[root], leaves, dy)
    table, again, seeds = _place(backend, TABLE, AGAIN, SEEDS)
    with use_backend("eager"):
        x_next = _move("eager", *leaves, NOW, THEN, "v_prediction") if not x_t.is_cuda else found[0]
        noised, _ = ops.forward_diffusion(x_next, alphas_cumprod=table, timesteps=again, seeds=seeds)
    expected = torch.autograd.grad((x_next, noised)[root], leaves, dy)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_order_through_the_noised_copy_alone(backend):
    require(backend, "ddim_move")
    (x_t,) = _place(backend, torch.randn(3, 2, 3, 3).requires_grad_())
    _, renoised = _move(
        backend, x_t, x_t**2, NOW[:3], THEN[:3], "epsilon", renoise_timesteps=AGAIN[:3], seeds=SEEDS[:3]
    )
    (first,) = torch.autograd.grad(renoised.sum(), x_t, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x_t)
    _, b = reference.coefficients(TABLE, NOW[:3], THEN[:3], "epsilon", torch.float32)
    signal = TABLE[AGAIN[:3]].sqrt()
    expected = (2 * b * signal)[:, None, None, None].expand(x_t.shape)
    torch.testing.assert_close(second.cpu(), expected, rtol=1e-5, atol=1e-6)


def test_autocast_gradient_has_the_dtype_of_the_output():
    output = torch.randn(2, 4, 3, 3).bfloat16().requires_grad_()
    moved = _move("eager", torch.randn(2, 4, 3, 3), output, NOW[:2], THEN[:2], "epsilon")
    assert moved.dtype == torch.float32
    moved.sum().backward()
    assert output.grad.dtype == torch.bfloat16


# ---- refusals ----


def _arguments(**changes):
    good = {
        "x_t": torch.zeros(2, 4, 3, 3),
        "model_output": torch.zeros(2, 4, 3, 3),
        "alphas_cumprod": TABLE,
        "timesteps": torch.tensor([0, 1]),
        "next_timesteps": torch.tensor([-1, 0]),
        "prediction_type": "epsilon",
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_t": torch.zeros(2, 4, 3)}, r"x_t must have 4 dimensions"),
        ({"model_output": torch.zeros(2, 4, 3, 4)}, r"model_output must have the shape of x_t"),
        (
            {"model_output": torch.zeros(2, 4, 3, 3).double()},
            r"model_output must have the dtype of x_t.*to\(x_t\.dtype\)",
        ),
        ({"x_t": torch.zeros(2, 4, 3, 3).half()}, r"model_output must have the dtype of x_t"),
        ({"model_output": torch.zeros(2, 4, 3, 3).long()}, r"model_output must be float32.*got int64"),
        ({"model_output": torch.zeros(2, 4, 3, 3).to("meta")}, r"model_output must be on the device of x_t"),
        ({"prediction_type": "v"}, r"prediction_type must be 'epsilon', 'sample' or 'v_prediction', got 'v'"),
        ({"timesteps": torch.tensor([0, 1000])}, r"timesteps must be >= -1 and < 1000.*got 0 to 1000"),
        ({"next_timesteps": torch.tensor([0, -2])}, r"next_timesteps must be >= -1 and < 1000.*got -2 to 0"),
        ({"next_timesteps": torch.tensor([0])}, r"next_timesteps must have shape \[N\] of x_t = \[2\], got \[1\]"),
        ({"timesteps": torch.tensor([0, 1], dtype=torch.int32)}, r"timesteps must be int64, got int32"),
        ({"seeds": torch.tensor([0, 1])}, r"renoise_timesteps and seeds must both be given"),
        ({"renoise_timesteps": torch.tensor([0, 1])}, r"renoise_timesteps and seeds must both be given"),
        (
            {"renoise_timesteps": torch.tensor([0, -1]), "seeds": torch.tensor([0, 1])},
            r"renoise_timesteps must be >= 0 and < 1000.*got -1 to 0",
        ),
        ({"stream": -1}, r"stream must be an int >= 0.*got -1"),
        ({"alphas_cumprod": TABLE.clone().requires_grad_()}, r"no gradient is defined for alphas_cumprod"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.ddim_move(**_arguments(**changes))
