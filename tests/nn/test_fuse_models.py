"""A fused UNet under what trainers do with one: LoRA, channels_last, autocast, torch.compile, an optimiser."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_blocks import CrossAttnDownBlock2D, CrossAttnUpBlock2D
from torch import nn

from sdxl_fast import dispatch
from sdxl_fast.models.config import TOY, build_unet, build_vae
from sdxl_fast.nn import fuse
from sdxl_fast.testing.compare import assert_all, compare

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "time_emb_proj"]


def _arguments(dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    torch.manual_seed(1)
    return {
        "sample": torch.randn(2, 4, 8, 8).to(dtype),
        "timestep": torch.tensor([999, 249]),
        "encoder_hidden_states": torch.randn(2, 7, 64).to(dtype),
        "added_cond_kwargs": {"text_embeds": torch.randn(2, 32).to(dtype), "time_ids": torch.full((2, 6), 32.0)},
        "return_dict": False,
    }


def _results(unet: nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    unet.zero_grad()
    y = unet(**_arguments(dtype))[0]
    y.float().square().mean().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in unet.named_parameters() if p.grad is not None}


def _assert_same(fused: nn.Module, stock: nn.Module, run: Callable[..., dict[str, torch.Tensor]] = _results) -> None:
    got, baseline = run(fused), run(stock)
    oracle = _results(copy.deepcopy(stock).double(), torch.float64)
    assert got.keys() == baseline.keys() == oracle.keys()
    assert_all([compare(got[k], oracle[k], baseline[k], op="unet", tensor=k, gradient=True, rows=4096) for k in oracle])


@pytest.fixture
def unet() -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build_unet(TOY)
    return model


def test_keys_layouts_and_files_stay(unet: nn.Module) -> None:
    """In either memory format: shapes, strides and values under the same names, and a stock model loads them."""
    for memory_format in (torch.contiguous_format, torch.channels_last):
        unet.to(memory_format=memory_format)
        before = {name: (t.shape, t.stride(), t.dtype, t.data_ptr()) for name, t in unet.state_dict().items()}
        for training in (True, False):
            fuse(unet, training=training)
            after = {name: (t.shape, t.stride(), t.dtype, t.data_ptr()) for name, t in unet.state_dict().items()}
            assert after == before
    torch.manual_seed(5)
    other = build_unet(TOY)
    other.load_state_dict(unet.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(other(**_arguments())[0], unet(**_arguments())[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_lora_added_afterwards_trains_and_loads(unet: nn.Module, training: bool) -> None:
    from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict

    if not training:  # prepared convolutions work in it, in which PyTorch's own GroupNorm is less exact
        unet.to(memory_format=torch.channels_last)
    stock = copy.deepcopy(unet)
    fuse(unet, training=training)
    for model in (unet, stock):
        torch.manual_seed(2)
        model.add_adapter(LoraConfig(r=2, target_modules=TARGETS, init_lora_weights=False))
    _assert_same(unet, stock)
    before = {name: p.detach().clone() for name, p in stock.named_parameters() if p.requires_grad}
    for model in (unet, stock):
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=10.0).step()
    for (name, one), other in zip(unet.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5, msg=name)  # gradients are 1e-4 from the exact ones
        assert name not in before or not torch.equal(other, before[name])
    saved = get_peft_model_state_dict(unet)
    assert saved.keys() == get_peft_model_state_dict(stock).keys()
    with torch.no_grad():
        expected = unet(**_arguments())[0]
        torch.manual_seed(3)
        late = build_unet(TOY)
        late.load_state_dict({k.replace(".base_layer", ""): v for k, v in unet.state_dict().items() if "lora" not in k})
        fuse(late, training=training)
        late.add_adapter(LoraConfig(r=2, target_modules=TARGETS))
        assert not torch.allclose(late(**_arguments())[0], expected, rtol=1e-3)
        set_peft_model_state_dict(late, saved)
        torch.testing.assert_close(late(**_arguments())[0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_channels_last(unet: nn.Module, checkpointing: bool) -> None:
    stock = copy.deepcopy(unet)
    unet.to(memory_format=torch.channels_last)
    fuse(unet)
    if checkpointing:
        unet.train().enable_gradient_checkpointing()

    def run(model: nn.Module) -> dict[str, torch.Tensor]:
        arguments = _arguments()
        arguments["sample"] = arguments["sample"].contiguous(memory_format=torch.channels_last)
        model.zero_grad()
        y = model(**arguments)[0]
        assert model is not unet or y.is_contiguous(memory_format=torch.channels_last)
        y.square().mean().backward()
        return {"y": y.detach()} | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    _assert_same(unet, stock, run)


def test_autocast(unet: nn.Module) -> None:
    stock = copy.deepcopy(unet)
    fuse(unet)

    def run(model: nn.Module) -> dict[str, torch.Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            return _results(model)

    _assert_same(unet, stock, run)


def _received(unet: nn.Module, kind: type[nn.Module]) -> tuple[nn.Module, Any, Any]:
    """The first block of a kind, and the arguments it gets."""
    block = next(part for part in unet.modules() if type(part) is kind)
    caught: list[Any] = []
    handle = block.register_forward_pre_hook(lambda _, args, kwargs: caught.append((args, kwargs)), with_kwargs=True)
    with torch.no_grad():
        unet(**_arguments())
    handle.remove()
    return block, *caught[0]


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("kind", [CrossAttnDownBlock2D, CrossAttnUpBlock2D])
def test_a_block_compiles_whole(unet: nn.Module, kind: type[nn.Module], training: bool) -> None:
    fuse(unet, training=training)
    block, args, kwargs = _received(unet, kind)
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    results = []
    for call in (block, compiled):
        block.zero_grad()
        with dispatch.record() as counts:
            outputs = call(*args, **kwargs)
        first = outputs if isinstance(outputs, torch.Tensor) else outputs[0]
        first.square().mean().backward()
        results.append([first.detach(), *(p.grad.clone() for p in block.parameters() if p.grad is not None)])
    assert counts
    torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
def test_a_vae_decodes_the_same_either_way(training: bool) -> None:
    torch.manual_seed(0)
    vae = build_vae(TOY).eval()
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        expected = vae.decode(latents).sample
        report = fuse(vae, training=training)
        assert not report.kept
        torch.testing.assert_close(vae.decode(latents).sample, expected, rtol=1e-4, atol=1e-5)
