"""`fuse(ops=...)` swaps what was asked for, `training=False` takes the modules made for inference; it says so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sdxl_fast import dispatch
from sdxl_fast.models.config import TOY, build_unet, build_vae
from sdxl_fast.nn import (
    GEGLU,
    OPERATIONS,
    PreparedUpsample2D,
    ProjectedGEGLU,
    Upsample2D,
    fuse,
    restore,
)
from sdxl_fast.testing.compare import assert_all, compare


def _arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8).to(dtype),
        "timestep": torch.tensor([999, 249]),
        "encoder_hidden_states": torch.randn(2, 7, 64).to(dtype),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32).to(dtype), "time_ids": torch.full((2, 6), 32.0)},
        "return_dict": False,
    }


def _ran(unet: nn.Module) -> tuple[set[str], torch.Tensor]:
    """Names of the operations that a forward ran, and its result."""
    with torch.no_grad(), dispatch.record() as counts:
        y = unet(**_arguments())[0]
    return {op for op, _ in counts}, y


def _results(unet: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    y = unet(**_arguments(dtype))[0]
    y.square().mean().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def stock() -> nn.Module:
    torch.manual_seed(0)
    unet: nn.Module = build_unet(TOY)
    return unet


@pytest.fixture
def unet(stock: nn.Module) -> nn.Module:
    return copy.deepcopy(stock)


OF_THE_UNET = sorted(set(OPERATIONS) - {"vae_attention"})


@pytest.mark.parametrize("operation", OF_THE_UNET)
def test_one_operation_alone(stock: nn.Module, unet: nn.Module, operation: str) -> None:
    report = fuse(unet, ops=(operation,))
    ran, y = _ran(unet)
    assert ran == {operation}
    torch.testing.assert_close(y, _ran(stock)[1], rtol=1e-4, atol=1e-5)
    assert report.replaced
    reasons = " ".join(report.kept.values())
    others = set(OF_THE_UNET) - {operation, "linear_geglu", "geglu"}
    assert all(f"{other} was not asked for" in reasons for other in others)


def test_none_of_them_changes_nothing(stock: nn.Module, unet: nn.Module) -> None:
    assert not fuse(unet, ops=()).replaced
    assert [type(part) for part in unet.modules()] == [type(part) for part in stock.modules()]


def test_more_may_be_asked_for_later(unet: nn.Module) -> None:
    fuse(unet, ops=["geglu"])
    report = fuse(unet, ops=["geglu", "group_norm_silu"])
    assert not any("GEGLU" in what for what in report.replaced.values())
    assert _ran(unet)[0] == {"geglu", "group_norm_silu"}
    restore(unet)
    assert not _ran(unet)[0]


def test_the_vaes_attention_by_itself() -> None:
    torch.manual_seed(0)
    vae = build_vae(TOY)
    assert set(fuse(vae, ops=["vae_attention"]).replaced.values()) == {"Attention: vae_attention"}


@pytest.mark.parametrize(
    ("ops", "message"),
    [
        (["group_norm"], "did you mean 'group_norm_silu'"),
        (["linear"], "no module can be swapped for; allowed: group_norm_silu, layer_norm"),
        ("geglu", r"ops=\('geglu',\)"),
    ],
)
def test_other_names_are_refused(unet: nn.Module, ops: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fuse(unet, ops=ops)


def test_the_report_counts_and_groups(unet: nn.Module) -> None:
    text = str(fuse(unet, ops=["geglu"]))
    assert "GEGLU: geglu" in text
    assert "left alone, layer_norm was not asked for" in text
    assert str(fuse(nn.Linear(2, 2))) == "nothing was fused"


def test_for_inference_and_back(stock: nn.Module, unet: nn.Module) -> None:
    report = fuse(unet, training=False)
    assert not report.kept
    assert "GEGLU: linear_geglu" in report.replaced.values()
    assert _ran(unet)[0] >= {"geglu", "upsample_conv2d"}  # on a CPU the projection keeps its weight in order
    kinds = {type(part) for part in unet.modules()}
    assert {ProjectedGEGLU, PreparedUpsample2D} <= kinds
    changed = fuse(unet)
    assert set(changed.replaced.values()) == {"GEGLU: geglu", "Upsample2D: with its convolution"}
    kinds = {type(part) for part in unet.modules()}
    assert {GEGLU, Upsample2D} <= kinds and not {ProjectedGEGLU, PreparedUpsample2D} & kinds
    fuse(unet, training=False)
    restore(unet)
    assert [type(part) for part in unet.modules()] == [type(part) for part in stock.modules()]
    assert not any({"_kept", "_phases"} & vars(part).keys() for part in unet.modules())
    assert torch.equal(_ran(unet)[1], _ran(stock)[1])


def test_gradients_flow_through_the_modules_for_inference(stock: nn.Module, unet: nn.Module) -> None:
    fuse(unet, training=False)
    got, baseline = _results(unet, torch.float32), _results(copy.deepcopy(stock), torch.float32)
    oracle = _results(copy.deepcopy(stock).double(), torch.float64)
    assert got.keys() == baseline.keys() == oracle.keys()
    assert_all([compare(got[k], oracle[k], baseline[k], op="unet", tensor=k, gradient=True, rows=4096) for k in oracle])


def _upsampler(unet: nn.Module) -> Any:
    return next(part for part in unet.modules() if isinstance(part, PreparedUpsample2D))


def test_the_sums_of_weights_are_kept_and_made_again(stock: nn.Module, unet: nn.Module) -> None:
    fuse(unet, training=False)
    _ran(unet)
    up = _upsampler(unet)
    kept = up._phases.tensor
    _ran(unet)
    assert up._phases.tensor is kept
    assert not any("_kept" in name or "_phases" in name for name in unet.state_dict())
    with torch.no_grad():  # as an optimiser writes
        up.conv.weight.mul_(2.0)
    after = _ran(unet)[1]
    assert up._phases.tensor is not kept
    other = copy.deepcopy(unet)
    restore(other)
    torch.testing.assert_close(after, _ran(other)[1], rtol=1e-4, atol=1e-5)
    unet.load_state_dict(stock.state_dict())
    torch.testing.assert_close(_ran(unet)[1], _ran(stock)[1], rtol=1e-4, atol=1e-5)
    up.conv.weight.data.mul_(3.0)  # leaves no trace: fuse has to be told
    fuse(unet, training=False)
    other = copy.deepcopy(unet)
    restore(other)
    torch.testing.assert_close(_ran(unet)[1], _ran(other)[1], rtol=1e-4, atol=1e-5)


def test_nothing_is_kept_where_the_weights_learn_or_are_cast(unet: nn.Module) -> None:
    fuse(unet, training=False)
    unet(**_arguments())
    assert _upsampler(unet)._phases is None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        unet(**_arguments())
    assert _upsampler(unet)._phases is None
    with torch.inference_mode():
        unet(**_arguments())
    assert _upsampler(unet)._kept is not None


def test_hooks_and_lora_on_the_projection_are_respected(unet: nn.Module) -> None:
    from peft import LoraConfig

    fuse(unet, training=False)
    gate = next(part for part in unet.modules() if isinstance(part, ProjectedGEGLU))
    seen: list[int] = []
    handle = gate.proj.register_forward_hook(lambda *_: seen.append(1))
    ran, before = _ran(unet)
    assert seen and "geglu" in ran
    handle.remove()
    unet.add_adapter(LoraConfig(r=2, target_modules=["ff.net.0.proj"], init_lora_weights=False))
    ran, after = _ran(unet)
    assert "linear_geglu" not in ran and "geglu" in ran
    assert not torch.allclose(before, after)


def test_a_copy_for_inference_keeps_sums_of_its_own(unet: nn.Module) -> None:
    fuse(unet, training=False)
    y = _ran(unet)[1]
    twin = copy.deepcopy(unet)
    assert torch.equal(_ran(twin)[1], y)
    with torch.no_grad():
        _upsampler(twin).conv.weight.mul_(2.0)
    assert torch.equal(_ran(unet)[1], y)
    assert not torch.allclose(_ran(twin)[1], y)
