"""`fuse` changes what runs and nothing else; `restore` takes it back."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from diffusers.models import resnet
from torch import nn

from sdxl_fast import dispatch
from sdxl_fast.models.config import TOY, build_unet, build_vae
from sdxl_fast.nn import fuse, restore
from sdxl_fast.testing.compare import assert_all, compare


def _unet_arguments(dtype: torch.dtype) -> dict:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8).to(dtype),
        "timestep": torch.tensor([999, 249]),
        "encoder_hidden_states": torch.randn(2, 7, 64).to(dtype),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32).to(dtype), "time_ids": torch.full((2, 6), 32.0)},
        "return_dict": False,
    }


def _unet_results(unet: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    y = unet(**_unet_arguments(dtype))[0]
    y.square().mean().backward()
    return {"y": y} | {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def unet() -> nn.Module:
    torch.manual_seed(0)
    return build_unet(TOY)


def test_unet_forward_and_every_gradient_stay_the_same(unet: nn.Module) -> None:
    fused = copy.deepcopy(unet)
    fuse(fused)
    got, baseline = _unet_results(fused, torch.float32), _unet_results(unet, torch.float32)
    oracle = _unet_results(copy.deepcopy(unet).double(), torch.float64)
    assert got.keys() == baseline.keys() == oracle.keys()
    # a chain of some forty operations: the bound for sums of 4096 rows stands for the accumulated roundings
    assert_all([compare(got[k], oracle[k], baseline[k], op="unet", tensor=k, gradient=True, rows=4096) for k in oracle])


def test_every_norm_and_gate_of_the_unet_runs_fused(unet: nn.Module) -> None:
    fused = copy.deepcopy(unet)
    stock_types = Counter(type(module).__name__ for module in unet.modules())
    report = fuse(fused)
    assert not report.kept
    with dispatch.record() as counts:
        fused(**_unet_arguments(torch.float32))
    calls = Counter(op for op, _ in counts.elements())
    # GroupNorms under names of their own: two a residual block, one before each transformer, one at the end
    assert calls["group_norm_silu"] == stock_types["GroupNorm"]
    assert calls["geglu"] == stock_types["GEGLU"]
    assert calls["upsample_conv2d"] == stock_types["Upsample2D"] > 0
    assert "ResnetBlock2D" in str(report)


def test_names_parameters_and_state_dict_are_untouched(unet: nn.Module) -> None:
    fused = copy.deepcopy(unet)
    before = {name: parameter.data_ptr() for name, parameter in fused.named_parameters()}
    fuse(fused)
    assert list(fused.state_dict()) == list(unet.state_dict())
    assert {name: parameter.data_ptr() for name, parameter in fused.named_parameters()} == before


def test_restore_gives_the_stock_model_back_bit_for_bit(unet: nn.Module) -> None:
    model = copy.deepcopy(unet)
    count = len(fuse(model).replaced)
    assert restore(model) >= count
    assert [type(module) for module in model.modules()] == [type(module) for module in unet.modules()]
    arguments = _unet_arguments(torch.float32)
    with torch.no_grad():
        assert torch.equal(model(**arguments)[0], unet(**arguments)[0])
    assert restore(model) == 0


def test_a_second_call_changes_nothing(unet: nn.Module) -> None:
    model = copy.deepcopy(unet)
    fuse(model)
    again = fuse(model)
    assert not again.replaced
    assert not again.kept


def test_vae_encodes_and_decodes_the_same() -> None:
    torch.manual_seed(0)
    vae = build_vae(TOY)
    fused = copy.deepcopy(vae)
    report = fuse(fused)
    assert not report.kept
    assert {"encoder.conv_norm_out", "decoder.conv_norm_out", "decoder.mid_block.attentions.0.group_norm"} <= set(
        report.replaced
    )
    pictures = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        got, baseline = (m.encode(pictures).latent_dist.mean for m in (fused, vae))
        oracle = copy.deepcopy(vae).double().encode(pictures.double()).latent_dist.mean
        assert_all([compare(got, oracle, baseline, op="encode", rows=4096)])
        decoded, stock = (m.decode(baseline).sample for m in (fused, vae))
        oracle = vae.double().decode(baseline.double()).sample
        assert_all([compare(decoded, oracle, stock, op="decode", rows=4096)])


def test_what_has_another_forward_is_left_alone_and_named() -> None:
    class MyNorm(nn.GroupNorm):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return super().forward(input) * 2

    class MyBlock(resnet.ResnetBlock2D):
        pass

    hooked = nn.GroupNorm(2, 4)
    hooked.forward = lambda x: x  # as accelerate's offloading does
    scale_shift = resnet.ResnetBlock2D(in_channels=4, groups=2, time_embedding_norm="scale_shift")
    model = nn.ModuleDict(
        {
            "mine": MyNorm(2, 4),
            "hooked": hooked,
            "block": MyBlock(in_channels=4, groups=2),
            "scaled": scale_shift,
            "gelu": resnet.ResnetBlock2D(in_channels=4, groups=2, non_linearity="gelu"),
        }
    )
    report = fuse(model)
    assert not report.replaced
    assert set(report.kept) == set(model)
    assert "MyNorm" in report.kept["mine"]
    assert "hook" in report.kept["hooked"]
    assert "scale_shift" in report.kept["scaled"]
    assert "GELU" in report.kept["gelu"]
    x = torch.randn(1, 4, 2, 2)
    assert torch.equal(model["hooked"](x), x)


def test_lora_layers_keep_working(unet: nn.Module) -> None:
    """An adapter wraps the projections inside fused modules; fusing before or after must not matter."""
    from peft import LoraConfig

    config = LoraConfig(r=2, target_modules=["ff.net.0.proj", "conv1"], init_lora_weights=False)
    torch.manual_seed(3)
    adapted = copy.deepcopy(unet)
    adapted.add_adapter(config)
    fused = copy.deepcopy(adapted)
    assert not fuse(fused).kept
    got, baseline = _unet_results(fused, torch.float32), _unet_results(adapted, torch.float32)
    oracle = _unet_results(copy.deepcopy(adapted).double(), torch.float64)
    assert any("lora" in name for name in oracle)
    assert_all([compare(got[k], oracle[k], baseline[k], op="lora", tensor=k, gradient=True, rows=4096) for k in oracle])
