"""Fused attention inside whole models: ControlNet's residuals, IP-Adapter, CLIP, modules sharded by FSDP2."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from diffusers import ControlNetModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from sdxl_fast import dispatch
from sdxl_fast.models.config import TOY, build_unet
from sdxl_fast.nn import Attention, fuse, restore
from sdxl_fast.nn import BasicTransformerBlock as FusedBlock


def _arguments() -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8),
        "timestep": torch.tensor([999, 249]),
        "encoder_hidden_states": torch.randn(2, 7, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32), "time_ids": torch.full((2, 6), 32.0)},
        "return_dict": False,
    }


@pytest.fixture
def unet() -> nn.Module:
    torch.manual_seed(0)
    return build_unet(TOY)


def test_controlnet_and_the_unet_that_takes_its_residuals(unet: nn.Module) -> None:
    controlnet = ControlNetModel.from_unet(unet, conditioning_channels=3)
    with torch.no_grad():
        for parameter in controlnet.parameters():
            if not parameter.any():  # its output convolutions start at zero
                parameter.normal_(std=0.2)
    picture = torch.randn(2, 3, 64, 64)

    def run(control: nn.Module, network: nn.Module) -> torch.Tensor:
        down, mid = control(**_arguments(), controlnet_cond=picture)
        y: torch.Tensor = network(
            **_arguments(), down_block_additional_residuals=down, mid_block_additional_residual=mid
        )[0]
        return y

    with torch.no_grad():
        expected = run(controlnet, unet)
        assert not torch.allclose(expected, unet(**_arguments())[0])
        reports = [fuse(network) for network in (controlnet, unet)]
        assert not any(report.kept for report in reports)
        assert any("Attention" in what for what in reports[0].replaced.values())
        with dispatch.record() as counts:
            got = run(controlnet, unet)
    assert {"self_attention", "cross_attention", "group_norm_silu", "geglu"} <= {op for op, _ in counts}
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_ip_adapter_processors_stay_and_are_named(unet: nn.Module) -> None:
    """Set before or after `fuse`, they run; attention without them is fused."""
    processors = {}
    for name, processor in unet.attn_processors.items():
        module = unet.get_submodule(name.removesuffix(".processor"))
        if module.is_cross_attention:
            processor = IPAdapterAttnProcessor2_0(module.inner_dim, module.cross_attention_dim, num_tokens=(4,))
        processors[name] = processor
    unet.set_attn_processor(dict(processors))  # which it empties
    arguments = _arguments()
    arguments["encoder_hidden_states"] = (arguments["encoder_hidden_states"], [torch.randn(2, 1, 4, 64)])
    fused = copy.deepcopy(unet)
    report = fuse(fused)
    adapters = {name.removesuffix(".processor") for name in processors if "attn2" in name}
    assert set(report.kept) == adapters
    assert all("IPAdapterAttnProcessor2_0" in reason for reason in report.kept.values())
    late = build_unet(TOY)
    late.load_state_dict({k: v for k, v in unet.state_dict().items() if ".processor." not in k})
    assert not fuse(late).kept
    late.set_attn_processor(copy.deepcopy(processors))
    with torch.no_grad():
        expected = unet(**arguments)[0]
        for network in (fused, late):
            with dispatch.record() as counts:
                torch.testing.assert_close(network(**arguments)[0], expected, rtol=1e-4, atol=1e-4)
            ran = {op for op, _ in counts}
            assert "self_attention" in ran and "cross_attention" not in ran


@pytest.mark.parametrize("kind", ["CLIPTextModel", "CLIPTextModelWithProjection"])
def test_of_clip_the_norms_are_fused_and_why_attention_is_not(kind: str) -> None:
    import transformers

    torch.manual_seed(0)
    config = transformers.CLIPTextConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=12, bos_token_id=48, eos_token_id=49, pad_token_id=49,
    )  # fmt: skip
    model = getattr(transformers, kind)(config).eval()
    tokens = torch.randint(0, 50, (2, 12))

    def run() -> list[torch.Tensor]:
        found = model(tokens, output_hidden_states=True)
        pooled = found.text_embeds if "Projection" in kind else found.pooler_output
        return [pooled, found.last_hidden_state, *found.hidden_states]

    names = list(model.state_dict())
    with torch.no_grad():
        before = run()
        report = fuse(model)
        assert len(report.kept) == 2 and all("causal" in reason for reason in report.kept.values())
        assert set(report.replaced.values()) == {"LayerNorm"} and len(report.replaced) == 5
        with dispatch.record() as counts:
            torch.testing.assert_close(run(), before, rtol=1e-5, atol=1e-5)
        assert sum(counts.values()) == 5
        assert list(model.state_dict()) == names
        assert restore(model) == len(report.replaced)
        assert all(torch.equal(a, b) for a, b in zip(run(), before, strict=True))


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[None]:
    """A process group of one process."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("first", ["fuse", "fully_shard"])
def test_a_sharded_block_trains_as_the_whole_one(alone: None, first: str) -> None:
    """FSDP2 on a fused block: parameters are gathered around the forward that the fused modules run in."""
    torch.manual_seed(0)
    whole = BasicTransformerBlock(32, 2, 16, cross_attention_dim=20, activation_fn="geglu")
    sharded = copy.deepcopy(whole)
    mesh = dist.init_device_mesh("cpu", (1,))
    if first == "fully_shard":
        fully_shard(sharded.norm2, mesh=mesh)
        fully_shard(sharded, mesh=mesh)
    assert not fuse(sharded).kept
    assert isinstance(sharded.attn1, Attention) and isinstance(sharded, FusedBlock)
    if first == "fuse":
        fully_shard(sharded, mesh=mesh)
    assert isinstance(sharded, FSDPModule) and not fuse(sharded).replaced
    x, context = torch.randn(2, 9, 32), torch.randn(2, 5, 20)
    results = []
    for block in (whole, sharded):
        with dispatch.record() as counts:
            y = block(x, encoder_hidden_states=context)
        y.square().mean().backward()
        results.append(y.detach())
    assert {op for op, _ in counts} == {"self_attention", "cross_attention", "geglu", "layer_norm"}
    torch.testing.assert_close(results[1], results[0])
    for (name, one), (_, other) in zip(whole.named_parameters(), sharded.named_parameters(), strict=True):
        torch.testing.assert_close(other.grad.full_tensor(), one.grad, msg=name, rtol=1e-4, atol=1e-6)
    restore(sharded)
    assert isinstance(sharded, FSDPModule) and not isinstance(sharded, FusedBlock)
    with dispatch.record() as counts:
        torch.testing.assert_close(sharded(x, encoder_hidden_states=context), y.detach())
    assert not counts
