# SPDX-License-Identifier: Apache-2.0
"""What the claims measure, and the rule that turns numbers into sentences."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.append(str(Path(__file__).parent.parent.parent))  # benchmarks/ is not installed

from benchmarks.claims import rules
from benchmarks.claims.claims import Claim, Comparison
from benchmarks.claims.measures import flow_distances, grain, grains, without_blocks
from benchmarks.claims.rules import compare, judge

SHARP = Comparison("a@4", "b@4", "sharpness")
BLOCKS = 20
NOISE = torch.randn(BLOCKS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def _rows(*values: float, metric: str = "sharpness", noise: float = 0.0) -> dict[int, dict[str, Any]]:
    """Rows of several seeds that all answer the same prompts; `noise` is what the prompts add to each block."""
    found = {}
    for seed, value in enumerate(values):
        replicates = without_blocks(value + noise * NOISE, BLOCKS)
        found[seed] = {metric: value, "replicates": {metric: replicates.tolist()}}
    return found


def _claim(*comparisons: Comparison, seeds: tuple[int, ...] = (0,)) -> Claim:
    return Claim("toy", "A beats B", "L §0", comparisons, seeds)


def test_what_prompts_do_to_both_sides_cancels() -> None:
    """Equal noise on both sides is no error; noise on one is the standard error of the mean over the blocks."""
    same = compare(SHARP, {"a@4": _rows(1.0, noise=0.5), "b@4": _rows(0.99, noise=0.5)})
    assert same is not None and same.error == pytest.approx(0.0, abs=1e-9) and same.sign == 1
    own = compare(SHARP, {"a@4": _rows(1.0, noise=0.5), "b@4": _rows(0.99)})
    assert own is not None and own.sign == 0
    assert own.error == pytest.approx(0.5 * float(NOISE.std()) / BLOCKS**0.5)
    assert own.error == pytest.approx(rules.measuring_error("sharpness", [(_rows(1.0, noise=0.5)[0], _rows(0.99)[0])]))


def test_a_difference_counts_beyond_twice_its_error() -> None:
    def sign(a: float, b: float) -> int:
        # the blocks' deviation makes the error 0.05
        outcome = compare(SHARP, {"a@4": _rows(a, noise=0.05 * BLOCKS**0.5 / float(NOISE.std())), "b@4": _rows(b)})
        assert outcome is not None and outcome.error == pytest.approx(0.05)
        return outcome.sign

    assert sign(1.0, 0.89) == 1
    assert sign(1.0, 0.91) == 0
    assert sign(0.89, 1.0) == -1


def test_seeds_that_disagree_widen_the_error_of_all() -> None:
    steady = {"a@4": _rows(1.0, 1.01, 0.99), "b@4": _rows(0.9, 0.9, 0.9)}
    shaky = {"a@4": _rows(1.4, 0.7, 0.9), "b@4": _rows(0.9, 0.9, 0.9)}
    outcomes = [compare(SHARP, rows) for rows in (steady, shaky)]
    assert all(found is not None and found.gain == pytest.approx(0.1) and found.seeds == 3 for found in outcomes)
    assert [found and found.sign for found in outcomes] == [1, 0]
    spread = ((0.4**2 + 0.3**2 + 0.1**2) / 4) ** 0.5  # two of three are free, on both sides
    assert rules.spread("sharpness", shaky) == pytest.approx(spread)
    assert outcomes[1] is not None and outcomes[1].error == pytest.approx(spread * (1.0 + 0.81) ** 0.5 / 3**0.5)
    single = compare(Comparison("c@1", "d@1", "sharpness"), shaky | {"c@1": _rows(0.5), "d@1": _rows(0.4)})
    assert single is not None and single.sign == 0
    assert single.error == pytest.approx(spread * (0.25 + 0.16) ** 0.5), "of one seed it is what others' seeds show"
    assert rules.spread("sharpness", {"a@4": _rows(1.0)}) == rules.spread("grain", shaky) == 0.0


def test_of_some_metrics_less_is_better() -> None:
    rows = {"a@4": _rows(0.01, metric="kid_excess"), "b@4": _rows(0.03, metric="kid_excess")}
    found = compare(Comparison("a@4", "b@4", "kid_excess"), rows)
    assert found is not None and found.sign == 1 and found.gain == pytest.approx(0.02)


@pytest.mark.parametrize(
    ("a", "strict", "word", "why"),
    [
        (1.0, True, "reproduces", "better"),
        (0.52, True, "does not reproduce", "no difference that counts"),
        (0.52, False, "reproduces", "no difference that counts"),
        (0.3, True, "does not reproduce", "worse"),
        (0.3, False, "does not reproduce", "worse"),
    ],
)
def test_the_sentence_follows_from_the_numbers(a: float, strict: bool, word: str, why: str) -> None:
    claim = _claim(replace(SHARP, strict=strict))
    verdict = judge(claim, {"a@4": _rows(a, noise=0.1), "b@4": _rows(0.5)})
    assert verdict.word == word
    assert verdict.sentence.startswith(f"**{word.capitalize()}** (1 seed): A beats B (L §0). sharpness {a:.2f} against")
    assert verdict.sentence.endswith(f"(a@4, b@4): {why}.")


def test_one_comparison_that_fails_is_enough() -> None:
    claim = _claim(SHARP, Comparison("a@4", "c@4", "sharpness"))
    rows = {"a@4": _rows(1.0), "b@4": _rows(0.5), "c@4": _rows(1.5)}
    assert judge(claim, rows).word == "does not reproduce"
    assert judge(claim, rows | {"c@4": _rows(0.5)}).word == "reproduces"


def test_pictures_that_show_nothing_decide_nothing() -> None:
    def rows(sharpness: float, top5: float) -> dict[int, dict[str, Any]]:
        return {seed: {**row, "top5": top5} for seed, row in _rows(sharpness).items()}

    blank = judge(_claim(SHARP), {"a@4": rows(1.0, 0.01), "b@4": rows(0.5, 0.0)})
    assert blank.word == "not decided" and blank.found == ("neither shows what was asked",)
    assert judge(_claim(SHARP), {"a@4": rows(1.0, 0.6), "b@4": rows(0.5, 0.0)}).word == "reproduces"


def test_what_was_not_run_is_said_to_be() -> None:
    claim = _claim(SHARP, seeds=(0, 1, 2))
    verdict = judge(claim, {"a@4": _rows(1.0)})
    assert (verdict.word, verdict.sentence) == ("not run", "**Not run**: A beats B (L §0). Missing: b@4.")
    assert judge(claim, {"a@4": _rows(1.0), "b@4": {1: _rows(0.5)[0]}}).word == "not run"
    unmeasured = {"a@4": _rows(1.0), "b@4": {0: {"sharpness": None}}}
    assert judge(claim, unmeasured).word == "not run"
    partial = judge(claim, {"a@4": _rows(1.0, 1.0), "b@4": _rows(0.5, 0.5, 0.5)})
    assert partial.sentence.startswith("**Reproduces** (2 seeds of 3)")


# ---- what is measured ----


def test_grain_is_noise_on_plain_ground_and_not_edges() -> None:
    plain = torch.full((2, 3, 64, 64), 0.5)
    plain[:, :, 20:40, 20:40] = 0.9
    noise = 0.02 * torch.randn((2, 1, 64, 64), generator=torch.Generator().manual_seed(0))
    assert float(grain(grains(plain)).max()) == pytest.approx(0.0, abs=1e-3)
    # the Laplacian of noise of deviation s has √20 · s; the quietest quarter of tiles has a little less
    assert 0.75 * 20**0.5 * 0.02 * 255 < float(grain(grains(plain + noise).mean())) < 20**0.5 * 0.02 * 255


def test_without_blocks() -> None:
    values = torch.tensor([1.0, 2.0, 6.0, 7.0, 9.0])  # blocks [1, 2, 6] and [7, 9]
    assert without_blocks(values, 2).tolist() == [8.0, 3.0]


def test_flow_distance() -> None:
    a, b = torch.zeros(2, 3, 4, 4), torch.zeros(2, 3, 4, 4)
    b[0] = 0.5
    assert flow_distances(a, b).tolist() == [0.5, 0.0]
