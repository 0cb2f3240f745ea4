"""The fused transformer block and LayerNorm equal the stock ones, and step aside for what they do not do."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention import BasicTransformerBlock as StockBlock
from torch import Tensor, nn

from sdxl_fast import dispatch
from sdxl_fast.nn import BasicTransformerBlock, LayerNorm, fuse, restore
from sdxl_fast.testing.compare import assert_all, compare

KINDS = {
    "sdxl": {"cross_attention_dim": 20},
    "self only": {},
    "two self": {"double_self_attention": True},
    "only cross": {"cross_attention_dim": 20, "only_cross_attention": True},
}


def _stock(**options: object) -> StockBlock:
    torch.manual_seed(0)
    block = StockBlock(32, 2, 16, **{"activation_fn": "geglu", **options})
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)  # norms start as ones and zeros
    return block.eval()


def _arguments(context: bool, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(1)
    return [t.to(dtype) for t in (torch.randn(2, 9, 32), *([torch.randn(2, 5, 20)] if context else []))]


def _call(block: nn.Module, arguments: list[Tensor], **options: object) -> Tensor:
    context = {"encoder_hidden_states": arguments[1]} if len(arguments) > 1 else {}
    y: Tensor = block(arguments[0], **context, **options)
    return y


def _results(block: nn.Module, arguments: list[Tensor]) -> dict[str, Tensor]:
    leaves = [t.detach().requires_grad_() for t in arguments]
    block.zero_grad()
    y = _call(block, leaves)
    y.float().square().mean().backward()
    found = {"y": y.detach()} | {f"input {i}": t.grad for i, t in enumerate(leaves) if t.grad is not None}
    return found | {name: p.grad.clone() for name, p in block.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_equals_the_stock_block_gradients_included(options: dict, autocast: bool) -> None:
    stock = _stock(**options)
    fused = copy.deepcopy(stock)
    assert not fuse(fused).kept
    assert isinstance(fused, BasicTransformerBlock)
    arguments = _arguments("cross_attention_dim" in options)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), dispatch.record() as counts:
        got = _results(fused, arguments)
    norms = sum(isinstance(part, nn.LayerNorm) for part in stock.modules())
    assert sum(count for (op, _), count in counts.items() if op == "layer_norm") == norms
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        baseline = _results(stock, arguments)
    oracle = _results(copy.deepcopy(stock).double(), [t.double() for t in arguments])
    assert got.keys() == baseline.keys() == oracle.keys()
    assert_all([compare(got[k], oracle[k], baseline[k], op="block", tensor=k, gradient=True, rows=512) for k in oracle])


def test_parts_stay_and_restore_gives_the_classes_back() -> None:
    block, stock = _stock(cross_attention_dim=20), _stock(cross_attention_dim=20)
    before = {name: parameter.data_ptr() for name, parameter in block.named_parameters()}
    assert fuse(block).replaced[""] == "BasicTransformerBlock: residuals added in LayerNorm"
    assert {name: parameter.data_ptr() for name, parameter in block.named_parameters()} == before
    assert list(block.state_dict()) == list(stock.state_dict())
    restore(block)
    assert [type(part) for part in block.modules()] == [type(part) for part in stock.modules()]
    arguments = _arguments(True)
    with torch.no_grad():
        assert torch.equal(_call(block, arguments), _call(stock, arguments))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"norm_type": "ada_norm", "num_embeds_ada_norm": 10}, "norm is AdaLayerNorm"),
        ({"norm_type": "layer_norm_i2vgen"}, "norm_type is 'layer_norm_i2vgen'"),
        ({"positional_embeddings": "sinusoidal", "num_positional_embeddings": 16}, "positional embeddings"),
        ({"attention_type": "gated", "cross_attention_dim": 20}, "GLIGEN"),
    ],
)
def test_what_does_more_is_kept_with_the_reason(options: dict, reason: str) -> None:
    block = StockBlock(32, 2, 16, **options)
    report = fuse(nn.ModuleDict({"odd": block}))
    assert reason in report.kept["odd"]
    assert type(block) is StockBlock and type(block.norm1) is not LayerNorm


def test_what_is_changed_afterwards_runs() -> None:
    """A chunked feed-forward, a norm that something took the place of, hooks on a norm."""
    arguments = _arguments(True)
    block, stock = _stock(cross_attention_dim=20), _stock(cross_attention_dim=20)
    fuse(block)
    seen: list[torch.Size] = []
    handle = block.norm2.register_forward_hook(lambda _module, args, _y: seen.append(args[0].shape))
    with torch.no_grad():
        expected = _call(stock, arguments)
        torch.testing.assert_close(_call(block, arguments), expected, rtol=1e-5, atol=1e-5)
        assert seen == [(2, 9, 32)]
        handle.remove()
        block.set_chunk_feed_forward(3, 1)
        torch.testing.assert_close(_call(block, arguments), expected, rtol=1e-5, atol=1e-5)
        block.set_chunk_feed_forward(None)
        for model in (block, stock):
            model.norm2 = nn.Sequential(model.norm2, nn.Tanh())
        changed = _call(stock, arguments)
        assert not torch.allclose(changed, expected)
        torch.testing.assert_close(_call(block, arguments), changed, rtol=1e-5, atol=1e-5)


def test_masks_reach_attention() -> None:
    block, stock = _stock(cross_attention_dim=20), _stock(cross_attention_dim=20)
    fuse(block)
    mask = torch.zeros(2, 1, 5)
    mask[..., 3:] = -10_000.0
    arguments = _arguments(True)
    with torch.no_grad():
        expected = _call(stock, arguments, encoder_attention_mask=mask)
        assert not torch.allclose(expected, _call(stock, arguments))
        got = _call(block, arguments, encoder_attention_mask=mask)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(3, 24), (2, 5, 24), (1, 2, 3, 24)], ids=str)
@pytest.mark.parametrize("affine", [True, False], ids=["affine", "plain"])
def test_layer_norm_equals_the_stock_one(shape: tuple[int, ...], affine: bool) -> None:
    torch.manual_seed(0)
    fused = LayerNorm(24, eps=1e-6, elementwise_affine=affine)
    stock = nn.LayerNorm(24, eps=1e-6, elementwise_affine=affine)
    if affine:
        nn.init.uniform_(fused.weight)
        nn.init.normal_(fused.bias)
        stock.load_state_dict(fused.state_dict())
    x, residual = torch.randn(shape), torch.randn(shape)
    got, total = fused(x, residual)
    assert torch.equal(total, x + residual)
    baseline, alone = stock(total), stock(x)
    stock.double()
    outcomes = [compare(got, stock(total.double()), baseline), compare(fused(x), stock(x.double()), alone)]
    assert_all(outcomes)


def test_a_sum_of_two_dtypes_is_the_wider() -> None:
    x, residual = torch.randn(2, 8, dtype=torch.bfloat16), torch.randn(2, 8)
    y, total = LayerNorm(8)(x, residual)
    assert y.dtype == total.dtype == torch.float32
    assert torch.equal(total, x + residual)


def test_norms_of_another_kind_are_kept() -> None:
    class MyNorm(nn.LayerNorm):
        pass

    model = nn.ModuleDict({"two": nn.LayerNorm((4, 8)), "mine": MyNorm(8), "biasless": nn.LayerNorm(8, bias=False)})
    report = fuse(model)
    assert not report.replaced
    assert "several dimensions" in report.kept["two"]
    assert "subclass of LayerNorm" in report.kept["mine"]
    assert "no bias" in report.kept["biasless"]
