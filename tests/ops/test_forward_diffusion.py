# SPDX-License-Identifier: Apache-2.0
"""``ops.forward_diffusion``: the shared suite, the generator's known answers, and the statistics of the noise."""

from __future__ import annotations

import math

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.dispatch import BACKENDS
from sdxl_fast.ops.forward_diffusion import _OP
from sdxl_fast.reference import forward_diffusion as reference
from sdxl_fast.testing.cases import Case, draw, sdxl_cases, shrunk
from sdxl_fast.testing.contract_suite import ContractSuite
from sdxl_fast.testing.op_suite import FORMATS, device_of, require

TOTAL = 1000
ALPHAS_CUMPROD = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, TOTAL, dtype=torch.float64) ** 2, 0).float()
SEEDS = torch.tensor([0, 1, -1, 2**40 + 5, 2**63 - 1])


class TestForwardDiffusion(ContractSuite):
    op = _OP
    public = staticmethod(ops.forward_diffusion)
    reference = reference
    outputs = ("x_t", "noise")
    inputs = ("x0",)
    wrong = tuple(reference.WRONG)
    cases = (
        Case("ragged", (3, 5, 7, 3), {"stream": 3}),
        Case("one-element", (1, 1, 1, 1)),
        Case("one-channel", (2, 1, 5, 6)),
        Case("empty-batch", (0, 4, 4, 4)),
        Case("empty-map", (2, 4, 0, 4)),
        Case("given-noise", (3, 4, 5, 3), {"given": True}),
        Case("never-pure", (3, 4, 5, 3), {"pure_noise_at": None}),
        Case("high-stream", (2, 4, 3, 3), {"stream": 2**62 + 7}),
        Case("five-samples", (5, 4, 8, 8)),
    )
    sdxl = shrunk(sdxl_cases("forward_diffusion", batch=2), longest=16)
    full_size = sdxl_cases("forward_diffusion", batch=2)
    tiny = Case("tiny", (2, 3, 2, 3), {"stream": 1})

    def make(self, case, dtype, generator):
        n = case.shape[0]
        given = case.options.get("given", False)
        alphas = ALPHAS_CUMPROD.double() if dtype == torch.float64 else ALPHAS_CUMPROD
        return {
            "x0": draw(case.shape, case.kind, generator).to(dtype),
            "alphas_cumprod": alphas,
            "timesteps": torch.tensor([999, 0, 500, 250, 10])[:n],
            "seeds": None if given else SEEDS[:n] + generator.initial_seed(),
            "stream": case.options.get("stream", 0),
            "noise": draw(case.shape, "normal", generator).to(dtype) if given else None,
            "pure_noise_at": case.options.get("pure_noise_at", 999),
        }

    def check_layout(self, values, got, layout):
        given = values["noise"] is not None  # and comes back as it is
        super().check_layout(values, {**got, "noise": got["x_t"]} if given else got, layout)


# ---- the generator ----


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Philox4x32-10 published with Random123 (Salmon et al. 2011)
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_known_answers(counter, key, expected):
    found = reference.philox([torch.tensor(c) for c in counter], [torch.tensor(k) for k in key])
    assert tuple(int(word) for word in found) == expected


def test_normals_follow_their_definition():
    """The normal of each lane, recomputed in Python from the raw words."""
    x0 = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    noise = reference.draw(x0, torch.tensor([7]), 5).flatten()
    words = reference.words(torch.tensor([7]), 5, 8)[0].flatten().tolist()
    for pair in range(4):
        a, b = words[2 * pair : 2 * pair + 2]
        u1 = torch.tensor(float(a)).float().mul(2.0**-32).add(2.0**-33).item()
        u2 = torch.tensor(float(b)).float().mul(2.0**-32).item()
        radius = math.sqrt(-2 * math.log(u1))
        assert noise[2 * pair].item() == pytest.approx(radius * math.cos(2 * math.pi * u2), rel=1e-12, abs=1e-12)
        assert noise[2 * pair + 1].item() == pytest.approx(radius * math.sin(2 * math.pi * u2), rel=1e-12, abs=1e-12)


def _draw(backend, shape, seeds, stream=0, dtype=torch.float32, layout="contiguous"):
    x0 = FORMATS[layout](torch.zeros(shape, dtype=dtype, device=device_of(backend)))
    device = x0.device
    with use_backend(backend):
        _, noise = ops.forward_diffusion(
            x0,
            alphas_cumprod=ALPHAS_CUMPROD.to(device),
            timesteps=torch.zeros(shape[0], dtype=torch.int64, device=device),
            seeds=torch.as_tensor(seeds, device=device),
            stream=stream,
        )
    return noise.cpu()


def _recovered_angle_and_radius(noise):
    pairs = noise.double().flatten().unflatten(0, (-1, 2))
    return torch.atan2(pairs[:, 1], pairs[:, 0]) / (2 * math.pi) % 1, torch.exp(-(pairs**2).sum(1) / 2)


@pytest.mark.parametrize("backend", BACKENDS)
def test_integer_stream_is_that_of_the_reference(backend):
    """Both uniforms of every pair, recovered from the normals, are those of the reference's words.

    Inverting Box-Muller in float64 loses the rounding of the float32 normals, so the words are compared as uniforms;
    a wrong key, counter, round or lane would put them anywhere in [0, 1).
    """
    require(backend, "forward_diffusion")
    seeds, count = SEEDS[3:], 4 * 9 * 8
    for stream in (0, 1, 2**33 + 1):
        noise = _draw(backend, (2, 4, 9, 8), seeds, stream)
        words = reference.words(seeds, stream, count).double() * 2.0**-32
        u2, u1 = _recovered_angle_and_radius(noise)
        wrapped = (u2 - words[..., 1::2].flatten() + 0.5) % 1 - 0.5
        # Six float32 ulps of the normals on the angle, and of the exponent on the radius.
        assert wrapped.abs().max() < 6 * torch.finfo(torch.float32).eps
        assert (u1 - words[..., 0::2].flatten()).abs().max() < 6 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("backend", BACKENDS)
def test_noise_ignores_batch_memory_format_and_position(backend):
    """Bitwise: a sample's noise is the same alone, in any batch, at any place in it and in either memory format."""
    require(backend, "forward_diffusion")
    for dtype in (torch.float32, torch.bfloat16):
        batch = _draw(backend, (5, 4, 7, 9), SEEDS, 2, dtype)
        last = _draw(backend, (5, 4, 7, 9), SEEDS, 2, dtype, "channels_last")
        assert torch.equal(batch, last)
        for i in range(5):
            assert torch.equal(batch[i : i + 1], _draw(backend, (1, 4, 7, 9), SEEDS[i : i + 1], 2, dtype))
        assert torch.equal(batch.flip(0), _draw(backend, (5, 4, 7, 9), SEEDS.flip(0), 2, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
def test_compiled_noise_is_the_eager_noise(backend):
    require(backend, "forward_diffusion")
    torch.compiler.reset()
    compiled = torch.compile(_draw, backend="aot_eager")
    assert torch.equal(compiled(backend, (2, 4, 4, 4), SEEDS[:2]), _draw(backend, (2, 4, 4, 4), SEEDS[:2]))


# ---- statistics: the thresholds hold with probability 1 - 1e-6 for true normals, and the draws are fixed ----


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_noise_is_normal(backend):
    """Kolmogorov-Smirnov distance and the first four moments of 262,144 draws."""
    require(backend, "forward_diffusion")
    noise = _draw(backend, (4, 4, 128, 128), SEEDS[:4]).double().flatten().sort().values
    n = noise.numel()
    cdf = torch.special.ndtr(noise)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    distance = torch.maximum((cdf - steps[:-1]).max(), (steps[1:] - cdf).max()).item()
    # P(sqrt(n) D > d) = 2 exp(-2 d^2) for large n, so 1e-6 is d = 2.69.
    assert math.sqrt(n) * distance < 2.69
    for power, mean, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        z = ((noise**power).mean().item() - mean) / math.sqrt(variance / n)
        assert abs(z) < 4.9, f"moment {power} is {z:.1f} standard errors off"
    # The tails: beyond 4 sigma are 6.33e-5 of the draws, Poisson with mean 16.6.
    assert 2 <= int((noise.abs() > 4).sum()) <= 41


@pytest.mark.parametrize("backend", ["eager", "cpu"])
def test_seeds_streams_and_neighbours_are_uncorrelated(backend):
    """Correlation of 65,536 pairs: neighbouring seeds, streams, high halves, and lags within one draw."""
    require(backend, "forward_diffusion")
    shape = (1, 4, 128, 128)
    base = _draw(backend, shape, [1234]).flatten().double()
    others = {
        "next seed": _draw(backend, shape, [1235]),
        "high half of the seed": _draw(backend, shape, [1234 + 2**32]),
        "next stream": _draw(backend, shape, [1234], stream=1),
        "high half of the stream": _draw(backend, shape, [1234], stream=2**32),
        "seed and stream swapped": _draw(backend, shape, [0], stream=1234),
        **{f"lag {lag}": base.roll(lag) for lag in (1, 2, 3, 4, 128, 16384)},
    }
    for name, other in others.items():
        other = other.flatten().double()
        assert not torch.equal(base, other), name
        for power in (1, 2):  # the squares would show a shared radius
            a, b = base**power - (base**power).mean(), other**power - (other**power).mean()
            z = (a @ b / (a.norm() * b.norm())).item() * math.sqrt(base.numel())
            assert abs(z) < 4.9, f"{name}: correlation of power {power} is {z:.1f} standard errors"


# ---- the process ----


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pure_noise_is_exact(backend, dtype):
    """At ``pure_noise_at`` x_t is the noise bit for bit, whatever x0 holds, and no gradient reaches x0."""
    require(backend, "forward_diffusion")
    device = device_of(backend)
    x0 = torch.full((2, 4, 3, 3), float("inf"), dtype=dtype, device=device)
    x0[1] = 1
    x0.requires_grad_()
    common = {"alphas_cumprod": ALPHAS_CUMPROD.to(device), "timesteps": torch.tensor([999, 998], device=device)}
    given = torch.randn(2, 4, 3, 3).to(device, dtype)
    for draw_arguments in ({"seeds": SEEDS[:2].to(device)}, {"noise": given}):
        with use_backend(backend):
            x_t, noise = ops.forward_diffusion(x0, **common, **draw_arguments, pure_noise_at=999)
        assert torch.equal(x_t[0], noise[0]) and not torch.equal(x_t[1], noise[1])
        (dx0,) = torch.autograd.grad(x_t, x0, torch.ones_like(x_t))
        assert bool((dx0[0] == 0).all()) and bool((dx0[1] != 0).all())


def test_given_noise_is_returned_as_it_is():
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    arguments = {"alphas_cumprod": ALPHAS_CUMPROD, "timesteps": torch.tensor([0, 5])}
    assert ops.forward_diffusion(x0, noise=noise, **arguments)[1] is noise


def test_zero_and_full_noise_levels():
    """ab = 1 gives x0 and ab = 0 gives the noise."""
    x0, noise = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    x_t, _ = ops.forward_diffusion(
        x0, alphas_cumprod=torch.tensor([1.0, 0.0]), timesteps=torch.tensor([0, 1]), noise=noise
    )
    assert torch.equal(x_t[0], x0[0]) and torch.equal(x_t[1], noise[1])


def _arguments(**changes):
    good = {
        "x0": torch.zeros(2, 4, 3, 3),
        "alphas_cumprod": ALPHAS_CUMPROD,
        "timesteps": torch.tensor([0, 1]),
        "seeds": torch.tensor([0, 1]),
    }
    return {**good, **changes}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x0": torch.zeros(2, 4, 3)}, r"x0 must have 4 dimensions"),
        ({"x0": torch.zeros(2, 4, 3, 3).long()}, r"x0 must be float32.*got int64"),
        ({"timesteps": torch.tensor([0, 1000])}, r"timesteps must be >= 0 and < 1000.*got 0 to 1000"),
        ({"timesteps": torch.tensor([-1, 3])}, r"timesteps must be >= 0 and < 1000.*got -1 to 3"),
        ({"timesteps": torch.tensor([0.0, 1.0])}, r"timesteps must be int64, got float32"),
        ({"timesteps": torch.tensor([0, 1], dtype=torch.int32)}, r"timesteps must be int64, got int32"),
        ({"timesteps": torch.tensor([1])}, r"timesteps must have shape \[N\] of x0 = \[2\], got \[1\]"),
        ({"timesteps": 3}, r"timesteps must be a tensor, got int"),
        ({"seeds": torch.tensor([0, 1], dtype=torch.int32)}, r"seeds must be int64, got int32"),
        ({"seeds": torch.tensor([0, 1, 2])}, r"seeds must have shape \[N\] of x0 = \[2\], got \[3\]"),
        ({"seeds": [0, 1]}, r"seeds must be a tensor or None, got list"),
        ({"seeds": None}, r"exactly one of seeds and noise must be given, got neither"),
        ({"noise": torch.zeros(2, 4, 3, 3)}, r"exactly one of seeds and noise must be given, got both"),
        ({"seeds": None, "noise": torch.zeros(2, 4, 3, 4)}, r"noise must have the shape of x0"),
        ({"seeds": None, "noise": torch.zeros(2, 4, 3, 3).half()}, r"noise must have the dtype of x0"),
        (
            {"seeds": None, "noise": torch.zeros(2, 4, 3, 3, requires_grad=True)},
            r"no gradient is defined for noise.*noise\.detach\(\)",
        ),
        ({"stream": -1}, r"stream must be an int >= 0.*got -1"),
        ({"stream": 2**63}, r"stream must be an int >= 0 and < 9223372036854775808"),
        ({"stream": 1.0}, r"stream must be an int.*got 1\.0"),
        ({"pure_noise_at": -1}, r"pure_noise_at must be an int >= 0 or None, got -1"),
        ({"alphas_cumprod": ALPHAS_CUMPROD.half()}, r"alphas_cumprod must be float32 or float64, got float16"),
        ({"alphas_cumprod": ALPHAS_CUMPROD[None]}, r"alphas_cumprod must have 1 dimension \[T\]"),
        ({"alphas_cumprod": ALPHAS_CUMPROD.to("meta")}, r"alphas_cumprod must be on the device of x0"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(changes, message):
    with pytest.raises(ValueError, match=message):
        ops.forward_diffusion(**_arguments(**changes))
