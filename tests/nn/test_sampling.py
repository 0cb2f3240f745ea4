"""`nn.Upsample2D` is diffusers' module, in every way it can be used."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D as StockUpsample2D
from torch import nn

from sdxl_fast import dispatch
from sdxl_fast.nn import Upsample2D, fuse, restore
from sdxl_fast.testing.compare import assert_all, compare


def _pair(**options: object) -> tuple[StockUpsample2D, nn.Module]:
    torch.manual_seed(0)
    stock = StockUpsample2D(12, **{"use_conv": True, "out_channels": 10, **options})
    return stock, copy.deepcopy(stock)


def _fused(module: nn.Module) -> list[tuple[str, str]]:
    with dispatch.record() as calls:
        module(torch.randn(1, 12, 9, 9))
    return list(calls)


@pytest.mark.parametrize("name", ["conv", "Conv2d_0"])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_forward_and_gradients_are_the_stock_ones(name: str, layout: torch.memory_format) -> None:
    stock, module = _pair(name=name)
    assert set(fuse(nn.ModuleList([module])).replaced.values()) == {"Upsample2D: with its convolution"}
    assert _fused(module) == [("upsample_conv2d", "library")]
    x = torch.randn(2, 12, 9, 10).contiguous(memory_format=layout)
    results = {}
    for key, model, dtype in (
        ("got", module, torch.float32),
        ("base", stock, torch.float32),
        ("exact", stock, torch.float64),
    ):
        model, leaf = copy.deepcopy(model).to(dtype), x.detach().clone().to(dtype).requires_grad_()
        y = model(leaf)
        y.square().mean().backward()
        results[key] = {"y": y.detach(), "dx": leaf.grad, **{n: p.grad for n, p in model.named_parameters()}}
    assert_all(
        [
            compare(results["got"][k], results["exact"][k], results["base"][k], tensor=k, gradient=k != "y", rows=720)
            for k in results["exact"]
        ]
    )


def test_a_small_map_takes_the_stock_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU it does not pay for the sums of the weights, unless a backend is asked for."""
    monkeypatch.setattr("sdxl_fast.nn.sampling._FEW_POSITIONS", 2 * 9 * 10)
    stock, module = _pair()
    fuse(nn.ModuleList([module]))
    assert _fused(module) == []
    x = torch.randn(1, 12, 9, 9)
    assert torch.equal(module(x), stock(x))
    with dispatch.use_backend("library"):
        assert _fused(module) == [("upsample_conv2d", "library")]
    with dispatch.record() as calls:
        module(torch.randn(2, 12, 9, 10))
    assert list(calls) == [("upsample_conv2d", "library")]


def test_parameters_keep_their_names_and_restore_gives_the_class_back() -> None:
    stock, module = _pair()
    model = nn.ModuleList([module])
    fuse(model)
    assert isinstance(module, Upsample2D) and list(module.state_dict()) == list(stock.state_dict())
    assert not fuse(model).replaced
    assert restore(model) == 1
    assert type(module) is StockUpsample2D
    x = torch.randn(1, 12, 5, 5)
    assert torch.equal(module(x), stock(x))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_conv": False, "out_channels": None}, "no convolution"),
        ({"use_conv_transpose": True}, "other things, than upsample and convolve"),
        ({"interpolate": False}, "other things, than upsample and convolve"),
        ({"norm_type": "ln_norm", "elementwise_affine": True, "eps": 1e-5}, "other things"),
        ({"kernel_size": 5, "padding": 2}, "not 3x3"),
        ({"padding": 0}, "not 3x3 with padding 1"),
    ],
)
def test_what_does_something_else_is_kept_and_said_why(options: dict[str, object], reason: str) -> None:
    _, module = _pair(**options)
    report = fuse(nn.ModuleDict({"up": module}))
    assert not report.replaced and reason in report.kept["up"]
    assert type(module) is StockUpsample2D


def test_a_lora_on_the_convolution_is_left_alone_and_said_so() -> None:
    """One that is there before, and one that comes after: then the stock forward runs."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(r=2, target_modules=["conv"], init_lora_weights=False)
    stock, module = _pair()
    before = inject_adapter_in_model(config, nn.ModuleDict({"up": copy.deepcopy(module)}))
    assert "LoRA" in fuse(before).kept["up"]
    after = nn.ModuleDict({"up": module})
    fuse(after)
    x = torch.randn(1, 12, 9, 9)
    plain = module(x)
    torch.manual_seed(1)
    inject_adapter_in_model(config, after)
    assert _fused(module) == []
    torch.manual_seed(1)
    expected = inject_adapter_in_model(config, nn.ModuleDict({"up": stock}))["up"](x)
    assert torch.equal(module(x), expected)
    assert not torch.allclose(expected, plain)


def test_hooks_of_the_convolution_are_called() -> None:
    _, module = _pair()
    seen: list[torch.Size] = []
    handle = module.conv.register_forward_hook(lambda _module, _args, y: seen.append(y.shape))
    assert "hooks" in fuse(nn.ModuleDict({"up": module})).kept["up"]
    handle.remove()
    fuse(nn.ModuleDict({"up": module}))
    module.conv.register_forward_hook(lambda _module, _args, y: seen.append(y.shape))
    module(torch.randn(1, 12, 9, 9))
    assert seen == [(1, 10, 18, 18)]


def test_another_size_than_the_double_takes_the_stock_way() -> None:
    stock, module = _pair()
    fuse(nn.ModuleList([module]))
    x = torch.randn(1, 12, 9, 9)
    assert torch.equal(module(x, (17, 19)), stock(x, (17, 19)))
    torch.testing.assert_close(module(x, (18, 18)), stock(x), rtol=1e-5, atol=1e-5)


def test_weights_changed_in_place_count_at_once() -> None:
    """Nothing derived from them is kept: a merged LoRA or an optimiser's step needs no notice."""
    stock, module = _pair()
    fuse(nn.ModuleList([module]))
    x = torch.randn(1, 12, 9, 9)
    with torch.no_grad():
        module(x)
        for model in (stock, module):
            model.conv.weight.data.add_(1.0)
        torch.testing.assert_close(module(x), stock(x), rtol=1e-5, atol=1e-4)


def test_compiles_whole_and_obeys_autocast() -> None:
    stock, module = _pair()
    fuse(nn.ModuleList([module]))
    x = torch.randn(1, 12, 9, 9)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), module(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x).dtype == stock(x).dtype == torch.bfloat16
