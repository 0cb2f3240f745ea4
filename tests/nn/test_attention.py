"""Fused attention equals diffusers' own, keeps its parts, and steps aside for what it does not do."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention as StockAttention,
)
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from torch import nn

from sdxl_fast import dispatch
from sdxl_fast.models.config import TOY, build_unet
from sdxl_fast.nn import Attention, fuse, restore
from sdxl_fast.testing.compare import assert_all, compare

KINDS = {
    "self": {"query_dim": 48, "heads": 2, "dim_head": 24},
    "cross": {"query_dim": 48, "heads": 2, "dim_head": 24, "cross_attention_dim": 20},
    "vae": {
        "query_dim": 32, "heads": 1, "dim_head": 32, "norm_num_groups": 4, "residual_connection": True, "bias": True,
        "rescale_output_factor": 2.0, "_from_deprecated_attn_block": True,
    },
}  # fmt: skip


def _stock(kind: str) -> StockAttention:
    torch.manual_seed(0)
    module = StockAttention(**KINDS[kind])
    for parameter in module.parameters():
        parameter.data.mul_(2.0)  # sharper than the initialisation, where attention is nearly uniform
    return module


def _arguments(kind: str, dtype: torch.dtype = torch.float32, *, keys: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(1)
    if kind == "vae":
        return [torch.randn(2, 32, 4, 6).to(dtype)]
    context = [torch.randn(2, keys, 20)] if kind == "cross" else []
    return [t.to(dtype) for t in (torch.randn(2, 11, 48), *context)]


def _results(module: nn.Module, arguments: list[torch.Tensor], **options: torch.Tensor) -> dict[str, torch.Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    module.zero_grad()
    y = module(*leaves, **options)
    y.float().square().mean().backward()
    found = {"y": y.detach()} | {f"input {i}": t.grad for i, t in enumerate(leaves)}
    return found | {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_stock_module_gradients_included(kind: str, autocast: bool) -> None:
    stock = _stock(kind)
    fused = copy.deepcopy(stock)
    assert not fuse(fused).kept
    arguments = _arguments(kind)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), dispatch.record() as counts:
        got = _results(fused, arguments)
    assert {op for op, _ in counts} >= {f"{kind}_attention"}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        baseline = _results(stock, arguments)
    oracle = _results(copy.deepcopy(stock).double(), [t.double() for t in arguments])
    assert got.keys() == baseline.keys() == oracle.keys()
    assert_all([compare(got[k], oracle[k], baseline[k], op=kind, tensor=k, gradient=True, rows=64) for k in oracle])


def test_parts_and_names_stay() -> None:
    module = _stock("cross")
    before = {name: parameter.data_ptr() for name, parameter in module.named_parameters()}
    report = fuse(module)
    assert report.replaced == {"": "Attention: cross_attention"}
    assert {name: parameter.data_ptr() for name, parameter in module.named_parameters()} == before
    assert restore(module) == 1
    assert type(module) is StockAttention


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_maps_keep_their_memory_format(memory_format: torch.memory_format) -> None:
    module = _stock("vae")
    fuse(module)
    x = _arguments("vae")[0].contiguous(memory_format=memory_format)
    with torch.no_grad():
        y = module(x)
    assert y.is_contiguous(memory_format=memory_format)
    torch.testing.assert_close(y, _stock("vae")(x).detach())


def test_other_argument_forms_of_the_stock_module() -> None:
    """Tokens instead of a map; extra arguments that models pass along; a prompt longer than the one-pass kernel's."""
    module, stock = _stock("vae"), _stock("vae")
    fuse(module)
    tokens = _arguments("vae")[0].flatten(2).transpose(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(module(tokens, temb=None), stock(tokens))
    module, stock = _stock("cross"), _stock("cross")
    fuse(module)
    x, context = _arguments("cross", keys=300)
    with torch.no_grad(), dispatch.record() as counts:
        y = module(x, encoder_hidden_states=context, ip_adapter_masks=None)
    assert [op for op, _ in counts] == ["self_attention"]
    torch.testing.assert_close(y, stock(x, context).detach())


def test_a_mask_is_left_to_the_stock_forward() -> None:
    module, stock = _stock("cross"), _stock("cross")
    fuse(module)
    x, context = _arguments("cross")
    mask = torch.zeros(2, 1, 7)
    mask[..., 4:] = -10_000.0
    with torch.no_grad(), dispatch.record() as counts:
        y = module(x, context, mask)
        assert torch.equal(y, stock(x, context, mask))
        assert not torch.allclose(y, stock(x, context))
    assert not counts


def test_processors_of_their_own_are_left_alone_before_and_after() -> None:
    model = nn.ModuleDict({"ip": _stock("cross"), "plain": _stock("cross"), "old": _stock("self")})
    model["ip"].set_processor(IPAdapterAttnProcessor2_0(hidden_size=48, cross_attention_dim=20, num_tokens=(4,)))
    model["old"].set_processor(AttnProcessor())
    report = fuse(model)
    assert set(report.replaced) == {"plain", "old"}
    assert "IPAdapterAttnProcessor2_0" in report.kept["ip"]
    assert type(model["ip"]) is StockAttention
    x, context = _arguments("cross")
    model["plain"].set_processor(SlicedAttnProcessor(slice_size=1))
    with torch.no_grad(), dispatch.record() as counts:
        y = model["plain"](x, context)
        assert not counts, "a processor set later runs"
        torch.testing.assert_close(y, _stock("cross")(x, context))
        model["plain"].set_processor(AttnProcessor2_0())
        model["plain"](x, context)
    assert [op for op, _ in counts] == ["cross_attention"]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"qk_norm": "layer_norm"}, "norms of its own"),
        ({"query_dim": 64, "spatial_norm_dim": 8}, "norms of its own"),
        ({"cross_attention_dim": 20, "cross_attention_norm": "layer_norm"}, "norms of its own"),
        ({"added_kv_proj_dim": 20}, "other projections"),
        ({"kv_heads": 1}, "shares keys"),
        ({"scale_qk": False}, "does not scale"),
        ({"is_causal": True}, "masks"),
    ],
)
def test_what_does_more_is_kept_with_the_reason(options: dict, reason: str) -> None:
    report = fuse(nn.ModuleDict({"odd": StockAttention(**{"query_dim": 48, "heads": 2, "dim_head": 24, **options})}))
    assert reason in report.kept["odd"]


def test_subclasses_are_kept() -> None:
    class MyAttention(StockAttention):
        pass

    report = fuse(nn.ModuleDict({"mine": MyAttention(query_dim=48, heads=2, dim_head=24)}))
    assert "MyAttention is a subclass of Attention" in report.kept["mine"]


def _block() -> BasicTransformerBlock:
    """SDXL's transformer block at the width of its second level, with attention that is far from uniform."""
    torch.manual_seed(0)
    block = BasicTransformerBlock(640, 10, 64, cross_attention_dim=2048, activation_fn="geglu")
    for name, parameter in block.named_parameters():
        if "to_q" in name or "to_k" in name:
            parameter.data.mul_(3.0)
    return block


def _block_arguments(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    return torch.randn(1, 40, 640).to(dtype).requires_grad_(), torch.randn(1, 77, 2048).to(dtype)


def _block_results(block: nn.Module, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    x, context = _block_arguments(dtype)
    block.zero_grad()
    y = block(x, encoder_hidden_states=context)
    y.float().square().mean().backward()
    return {"y": y.detach(), "dx": x.grad} | {n: p.grad.clone() for n, p in block.named_parameters()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_transformer_block_at_true_width(dtype: torch.dtype) -> None:
    stock = _block()
    oracle = _block_results(copy.deepcopy(stock).double(), torch.float64)
    stock = stock.to(dtype)
    fused = copy.deepcopy(stock)
    report = fuse(fused)
    assert {"Attention: self_attention", "Attention: cross_attention"} <= set(report.replaced.values())
    got, baseline = _block_results(fused, dtype), _block_results(stock, dtype)
    assert_all(
        [compare(got[k], oracle[k], baseline[k], op="block", tensor=k, gradient=True, rows=4096) for k in oracle]
    )


def test_a_block_compiles_whole() -> None:
    block = _block()
    fuse(block)
    x, context = (t.detach() for t in _block_arguments(torch.float32))
    torch.compiler.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, encoder_hidden_states=context), block(x, encoder_hidden_states=context))


def test_gradient_checkpointing_and_lora() -> None:
    """Recomputing the forward gives the same gradients, through LoRA layers on every projection."""
    from peft import LoraConfig

    torch.manual_seed(0)
    unet = build_unet(TOY)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights=False))
    arguments = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([7]),
        "encoder_hidden_states": torch.randn(1, 7, 64),
        "added_cond_kwargs": {"text_embeds": torch.randn(1, 32), "time_ids": torch.full((1, 6), 32.0)},
    }

    def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
        model.zero_grad()
        model.train()(**arguments).sample.square().mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    stock = gradients(copy.deepcopy(unet))
    assert not fuse(unet).kept
    assert any(isinstance(module, Attention) for module in unet.modules())
    plain = gradients(unet)
    unet.enable_gradient_checkpointing()
    again = gradients(unet)
    assert sum("lora" in name for name in plain) > 8
    assert plain.keys() == again.keys() == stock.keys()
    assert all(torch.equal(plain[name], again[name]) for name in plain)
    for name, gradient in stock.items():
        torch.testing.assert_close(plain[name], gradient, rtol=1e-3, atol=1e-6)
