"""Sampling walks to the clean latent; noise belongs to its seed."""

import torch

from sdxl_fast.diffusion import sampling, schedule


def test_an_exact_network_is_sampled_exactly_in_any_number_of_steps() -> None:
    x0 = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    table = schedule.alphas_cumprod().double()

    def exact_noise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = schedule.alpha_sigma(table, t, 4)
        return (x_t - alpha * x0) / sigma

    for steps in (1, 2, 8):
        start = torch.randn_like(x0)
        grid = schedule.trailing_timesteps(steps)
        got = sampling.sample(exact_noise, start, grid, prediction_type="epsilon", alphas_cumprod=table)
        torch.testing.assert_close(got, x0)


def test_pure_noise_depends_on_the_seed_alone() -> None:
    seeds = torch.tensor([5, 6, 7])
    together = sampling.pure_noise((4, 8, 8), seeds)
    alone = sampling.pure_noise((4, 8, 8), seeds[1:2])
    assert torch.equal(together[1:2], alone)
    assert not torch.equal(alone, sampling.pure_noise((4, 8, 8), seeds[1:2], stream=sampling.STREAM_RENOISE))
    assert abs(sampling.pure_noise((4, 64, 64), seeds).std().item() - 1.0) < 0.02


def test_guidance_is_linear_and_scale_one_asks_once() -> None:
    calls = []

    def network(x: torch.Tensor, t: torch.Tensor, condition: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(len(x))
        return condition["value"].expand_as(x)

    with_text, without = {"value": torch.full((2, 1), 3.0)}, {"value": torch.ones(2, 1)}
    x, t = torch.zeros(2, 1), torch.zeros(2, dtype=torch.int64)
    assert sampling.guided(network, with_text, without, 4.0)(x, t).tolist() == [[9.0], [9.0]]
    assert sampling.guided(network, with_text, without, 1.0)(x, t).tolist() == [[3.0], [3.0]]
    assert calls == [4, 2]
