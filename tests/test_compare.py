# SPDX-License-Identifier: Apache-2.0
"""The comparison itself: lets honest rounding pass, and catches each kind of wrong."""

from __future__ import annotations

import pytest
import torch

from sdxl_fast.testing.compare import SMALL, Scale, assert_all, compare, compare_all, error_scale

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _pair(dtype: torch.dtype, shape=(64, 256), seed=0):
    """A float64 oracle and its rounding, which is the best any kernel can do."""
    oracle = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return oracle, oracle.to(dtype)


def _text(outcome):
    return "\n".join(outcome.problems)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gradient", [False, True])
def test_honest_rounding_passes(dtype, gradient):
    oracle, rounded = _pair(dtype)
    outcome = compare(rounded, oracle, rounded, gradient=gradient)
    assert outcome.passed and outcome.ratio < 1
    # One rounding more, as between two kernels that PyTorch runs apart.
    again = (rounded.double() * (1 + torch.finfo(dtype).eps / 4)).to(dtype)
    assert compare(again, oracle, rounded, gradient=gradient).passed


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_single_wrong_element_is_found(dtype):
    oracle, rounded = _pair(dtype)
    wrong = rounded.clone()
    wrong[17, 33] += 0.1
    outcome = compare(wrong, oracle, rounded, op="toy", tensor="y")
    assert not outcome.passed and outcome.worst_index == (17, 33) and outcome.ratio > 1
    assert "exceeds the bound" in str(outcome) and "toy y" in str(outcome) and "(17, 33)" in str(outcome)


def test_integers_are_right_or_wrong():
    """The oracle in float64 may lie on the other side of a tie; the reference in the tested dtype decides."""
    reference = torch.arange(12, dtype=torch.uint8).view(3, 4)
    assert compare(reference.clone(), reference + 1, reference).passed
    wrong = reference.clone()
    wrong[1, 2] += 1
    assert "1 differ, 7 at (1, 2) for 6" in _text(compare(wrong, reference, reference))
    assert "dtype" in _text(compare(reference.int(), reference, reference))


@pytest.mark.parametrize("dtype", DTYPES)
def test_small_elements_have_small_bounds(dtype):
    """An error that would be invisible on the largest element is seen on a column of zeros."""
    oracle, _ = _pair(dtype)
    oracle[:, 0] = 0
    oracle[0, 1] = 1e3
    baseline = oracle.to(dtype).double()
    baseline[0, 1] = oracle[0, 1]
    wrong = baseline.to(dtype).clone()
    wrong[:, 0] = 20 * torch.finfo(dtype).eps
    assert not compare(wrong, oracle, baseline.to(dtype)).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_truncation_is_seen_as_bias(dtype):
    """Cutting the mantissa off instead of rounding stays within the element bound; its direction gives it away."""
    oracle, rounded = _pair(dtype)
    spacing = rounded.double().abs().log2().floor().exp2() * torch.finfo(dtype).eps
    truncated = (oracle.sign() * ((oracle.abs() / spacing).floor() * spacing)).to(dtype)
    outcome = compare(truncated, oracle, rounded, gradient=True)
    assert outcome.ratio < 1, "the element bound alone would not do"
    assert "bias" in _text(outcome) and "smaller magnitudes" in _text(outcome)


def test_low_precision_everywhere_is_seen_in_the_norms():
    oracle, rounded = _pair(torch.float32)
    one_large = rounded.clone()
    one_large[0, 0] += 1e-3  # an outlier in the baseline loosens the element bound
    coarse = oracle.to(torch.bfloat16).float()
    outcome = compare(coarse, oracle, one_large)
    assert "rms" in _text(outcome)


def test_scaled_gradient_fails_the_relative_norm_and_turned_one_the_cosine():
    oracle, rounded = _pair(torch.float32)
    assert "relative L2" in _text(compare(rounded * 1.01, oracle, rounded, gradient=True))
    turned = rounded + 0.01 * rounded.roll(1, 0)
    assert "cosine" in _text(compare(turned, oracle, rounded, gradient=True))
    assert not compare(-rounded, oracle, rounded, gradient=True).passed
    assert not compare(torch.zeros_like(rounded), oracle, rounded, gradient=True).passed


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_fail_where_the_oracle_is_finite(poison):
    oracle, rounded = _pair(torch.float32)
    wrong = rounded.clone()
    wrong[3, 5] = poison
    outcome = compare(wrong, oracle, rounded)
    assert not outcome.passed and "(3, 5)" in _text(outcome)


def test_overflow_of_the_dtype_is_the_right_answer_and_must_be_there():
    oracle, _ = _pair(torch.float16)
    oracle[0, 0], oracle[0, 1], oracle[0, 2] = 1e6, -1e6, float("nan")
    rounded = oracle.half()
    assert compare(rounded, oracle, rounded).passed
    for index in ((0, 0), (0, 1), (0, 2)):
        wrong = rounded.clone()
        wrong[index] = 65504.0
        assert not compare(wrong, oracle, rounded).passed
    flipped = rounded.clone()
    flipped[0, 0] = -float("inf")
    assert not compare(flipped, oracle, rounded).passed


def test_shape_and_dtype_are_part_of_the_result():
    oracle, rounded = _pair(torch.float32)
    assert "shape" in _text(compare(rounded[:1], oracle, rounded))
    assert "dtype" in _text(compare(rounded.half(), oracle, rounded))


def test_missing_tensor_is_a_problem():
    oracle, rounded = _pair(torch.float32)
    outcomes = compare_all({}, {"dx": oracle}, {"dx": rounded}, op="toy", gradients=["dx"])
    with pytest.raises(AssertionError, match=r"toy dx.*\n  missing"):
        assert_all(outcomes)
    assert_all(compare_all({"dx": rounded}, {"dx": oracle}, {"dx": rounded}, op="toy", gradients=["dx"]))


def test_rows_widen_the_floor_by_their_square_root():
    """A sum of a million rows walks a thousand roundings far; a sum of one does not."""
    oracle, rounded = _pair(torch.float32)
    walked = rounded + 300 * torch.finfo(torch.float32).eps * rounded.std()
    assert not compare(walked, oracle, rounded, rows=1).passed
    assert compare(walked, oracle, rounded, rows=10**6, scale=Scale()).ratio < 1


def test_pooled_scale_widens_a_lucky_baseline():
    oracle = torch.tensor([1.0], dtype=torch.float64)
    exact, off = oracle.float(), oracle.float() * (1 + 1e-6)
    assert not compare(off, oracle, exact).passed
    other = error_scale(torch.tensor([1.0 + 1e-6]), oracle)
    assert compare(off, oracle, exact, scale=other).passed
    assert (other | Scale()) == other and (other * 2).largest == 2 * other.largest


def test_empty_and_zero_tensors_pass_and_are_checked():
    empty = torch.empty(0, 3)
    assert compare(empty, empty.double(), empty).passed
    zero = torch.zeros(SMALL)
    assert compare(zero, zero.double(), zero, gradient=True).passed
    assert not compare(zero + 1e-3, zero.double(), zero, gradient=True).passed
