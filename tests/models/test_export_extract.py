"""A LoRA out of two UNets: the best of its rank, and an honest account of what it leaves out."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from sdxl_fast.cli_export import residual_lines
from sdxl_fast.errors import ModelError
from sdxl_fast.models.config import TOY, build_unet
from sdxl_fast.models.extract import Residual, extract_lora, factors
from sdxl_fast.models.lora import Lora, merge_lora, target_modules
from sdxl_fast.models.weights import Lazy
from sdxl_fast.testing.toy import random_lora


def _lazy(unet: Any) -> dict[str, Lazy]:
    return {name: Lazy.of(tensor) for name, tensor in unet.state_dict().items()}


@pytest.fixture(scope="module")
def base() -> Any:
    torch.manual_seed(0)
    return build_unet(TOY).requires_grad_(False)


@pytest.fixture(scope="module")
def student(base: Any) -> Any:
    """The base with a LoRA of rank 3 merged."""
    torch.manual_seed(1)
    pairs = random_lora(base, rank=3)
    merged = copy.deepcopy(base)
    merge_lora(merged, Lora(pairs, dict.fromkeys(pairs, 1.0), {}))
    return merged


@pytest.mark.parametrize("shape", [(40, 40), (24, 90), (90, 24)])
@pytest.mark.parametrize("rank", [1, 5, 24])
def test_no_matrix_of_the_rank_is_closer(shape: tuple[int, int], rank: int) -> None:
    """Against the tail of the full singular value decomposition, whose norm is the least there can be."""
    matrix = torch.randn(shape)
    down, up = factors(matrix, rank)
    assert (down.shape, up.shape) == ((rank, shape[1]), (shape[0], rank))
    least = torch.linalg.svdvals(matrix.double())[rank:].square().sum().sqrt()
    left = (matrix.double() - up.double() @ down.double()).norm()
    assert float(left) == pytest.approx(float(least), rel=1e-5, abs=1e-5 * float(matrix.norm()))
    # the halves share the singular values evenly
    torch.testing.assert_close(down.norm(dim=1), up.norm(dim=0))


def test_what_has_a_lower_rank_is_found_whole() -> None:
    matrix = torch.randn(30, 4) @ torch.randn(4, 50)
    down, up = factors(matrix, 9)
    torch.testing.assert_close(up @ down, matrix)
    assert torch.isfinite(down).all() and torch.isfinite(up).all()
    assert not any(half.any() for half in factors(torch.zeros(6, 5), 2))


def test_a_merged_lora_is_found_again(base: Any, student: Any) -> None:
    lora, residual = extract_lora(_lazy(student), _lazy(base), rank=3, dtype=torch.float32)
    assert {name.removeprefix("unet.") for name in lora.pairs} == set(target_modules(base))
    for name, pair in lora.pairs.items():
        weight = f"{name.removeprefix('unet.')}.weight"
        wanted = student.state_dict()[weight] - base.state_dict()[weight]
        assert (pair.delta().reshape(wanted.shape) - wanted).norm() < 1e-5 * wanted.norm(), name
        assert pair.alpha == pair.rank == 3
        assert pair.up.shape[2:] == (1,) * (wanted.ndim - 2)
        assert pair.down.shape[1:] == wanted.shape[1:]
    assert residual.fraction < 1e-5
    assert residual.outside == {}


def test_what_is_left_out_is_counted(base: Any, student: Any) -> None:
    changed = copy.deepcopy(student)
    changed.conv_out.bias += 3.0
    changed.conv_in.weight += 0.01
    lora, residual = extract_lora(_lazy(changed), _lazy(base), rank=1)
    assert residual.outside.keys() == {"conv_out.bias", "conv_in.weight"}
    assert residual.outside["conv_out.bias"] == pytest.approx(3.0 * 2.0)  # four channels
    merged = copy.deepcopy(base)
    pairs = {name.removeprefix("unet."): (p.down.read(), p.up.read()) for name, p in lora.pairs.items()}
    merge_lora(merged, Lora(pairs, dict.fromkeys(pairs, 1.0), {}))
    left = whole = 0.0
    for name, tensor in changed.state_dict().items():
        left += float((tensor - merged.state_dict()[name]).double().square().sum())
        whole += float((tensor - base.state_dict()[name]).double().square().sum())
    assert residual.total == pytest.approx(whole**0.5, rel=1e-5)
    assert residual.fraction == pytest.approx((left / whole) ** 0.5, rel=1e-3)
    lines = residual_lines(residual, 1)
    worst = max(residual.modules, key=lambda name: residual.modules[name])
    assert f"{residual.fraction:.2%}" in lines[0]
    assert f"most in {worst}" in lines[1]
    assert "2 parameters that such a LoRA does not reach" in lines[2]


def test_equal_unets_differ_by_nothing(base: Any) -> None:
    lora, residual = extract_lora(_lazy(base), _lazy(base), rank=2)
    assert residual == Residual(0.0, 0.0, 0.0, dict.fromkeys(residual.modules, 0.0), {})
    assert residual.fraction == 0.0
    assert not any(pair.delta().any() for pair in lora.pairs.values())


def test_ranks_and_shapes_are_checked(base: Any) -> None:
    for rank, allowed in ((0, "1 to 32"), (33, "1 to 32")):
        with pytest.raises(ValueError, match=f"rank is {rank}; allowed: {allowed}, the smaller side of"):
            extract_lora(_lazy(base), _lazy(base), rank=rank)
    other = _lazy(base)
    del other["conv_in.bias"]
    with pytest.raises(ModelError, match=r"1 missing: conv_in\.bias"):
        extract_lora(other, _lazy(base), rank=2)
    other["conv_in.bias"] = Lazy.of(torch.zeros(7))
    with pytest.raises(ModelError, match=r"conv_in\.bias \(7,\) for \(32,\)"):
        extract_lora(other, _lazy(base), rank=2)
