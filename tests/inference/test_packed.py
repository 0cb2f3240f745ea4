"""Packed UNet and decoder compute what their modules compute, follow every change, and step aside where they must."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor, SlicedAttnProcessor
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sdxl_fast.inference import packing
from sdxl_fast.inference.accelerated import attach, detach, runner_of
from sdxl_fast.models.config import SDXL, TOY, build_unet, build_vae
from sdxl_fast.testing.compare import assert_all, compare

ROWS = 4096  # the accumulated roundings of some hundred operations, as one sum


def _arguments(dtype: torch.dtype = torch.float32, batch: int = 2, side: int = 8) -> dict[str, Any]:
    torch.manual_seed(1)
    sample, text = torch.randn(batch, 4, side, side), torch.randn(batch, 7, 64)
    added = {"text_embeds": torch.randn(batch, 32).to(dtype), "time_ids": torch.full((batch, 6), 32.0).to(dtype)}
    return {
        "sample": sample.to(dtype),
        "timestep": 999,
        "encoder_hidden_states": text.to(dtype),
        "added_cond_kwargs": added,
        "return_dict": False,
    }


def _residuals(unet: Any, dtype: torch.dtype) -> dict[str, Any]:
    """As a ControlNet gives them, made by a UNet of the same shape."""
    torch.manual_seed(2)
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda m, args, out: seen.append(torch.randn_like(out)))
        for block in unet.down_blocks
        for module in (*block.resnets, *(block.downsamplers or ()))
    ]
    arguments = _arguments()
    middle = unet.mid_block.register_forward_hook(lambda m, args, out: seen.append(torch.randn_like(out)))
    first = unet.conv_in.register_forward_hook(lambda m, args, out: seen.append(torch.randn_like(out)))
    with torch.no_grad():
        unet(**arguments)
    for hook in (*hooks, middle, first):
        hook.remove()
    *down, mid = [part.to(dtype) for part in seen]
    return {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}


@pytest.fixture(scope="module")
def stock() -> Any:
    torch.manual_seed(0)
    return build_unet(TOY).eval()


@pytest.fixture
def unet(stock: Any) -> Any:
    return copy.deepcopy(stock)


@torch.no_grad()
def _compare(got: Any, stock: Any, calls: Callable[[torch.dtype], dict[str, Any]]) -> None:
    """The packed network against its modules, with those in float64 as the oracle."""
    y, baseline = got(**calls(torch.float32))[0], stock(**calls(torch.float32))[0]
    oracle = copy.deepcopy(stock).double()(**calls(torch.float64))[0]
    assert_all([compare(y, oracle, baseline, op="packed", rows=ROWS)])


TIMESTEPS = (999, torch.tensor(499), torch.tensor([249]), torch.tensor([999, 1]), 17.5)


@pytest.mark.parametrize("timestep", TIMESTEPS, ids=str)
def test_the_unet_computes_what_its_modules_do(stock: Any, unet: Any, timestep: Any) -> None:
    runner = attach(unet)
    for _ in range(2):  # the second time from what is kept
        _compare(unet, stock, lambda dtype: {**_arguments(dtype), "timestep": timestep})
    assert (runner.use.packed, not runner.use.modules) == (2, True)


def test_controlnet_residuals_are_added(stock: Any, unet: Any) -> None:
    runner = attach(unet)
    extra = {dtype: _residuals(stock, dtype) for dtype in (torch.float32, torch.float64)}
    _compare(unet, stock, lambda dtype: {**_arguments(dtype), **extra[dtype]})
    assert runner.use.packed == 1


class _MapCopies(TorchDispatchMode):
    """Counts concatenations of maps."""

    found = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found += func is torch.ops.aten.cat.default and args[0][0].ndim == 4
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("controlled", [False, True], ids=["alone", "ControlNet"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@torch.no_grad()
def test_skip_connections_are_read_where_they_lie(
    stock: Any, unet: Any, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, controlled: bool
) -> None:
    """As on a GPU, forced here: no map is concatenated, in the kernels or before them."""
    blocks = sum(len(block.resnets) for block in unet.up_blocks)
    unet.to(dtype)
    modules = copy.deepcopy(unet)
    extra = {d: _residuals(stock, d) if controlled else {} for d in (dtype, torch.float64)}
    calls = {d: {**_arguments(dtype), **_arguments(d), **more} for d, more in extra.items()}
    runner = attach(unet)
    for _ in range(2):  # the second time with other weights
        for in_place in (False, True):
            monkeypatch.setattr(packing, "read_in_place", lambda x, in_place=in_place: in_place)
            with _MapCopies() as copies:
                y = unet(**calls[dtype])[0]
            assert copies.found == (0 if in_place else blocks)
            oracle = copy.deepcopy(modules).double()(**calls[torch.float64])[0]
            assert_all([compare(y, oracle, modules(**calls[dtype])[0], op="packed", rows=ROWS)])
        _weights(unet)
        _weights(modules)
    assert runner.use.packed == 4 and not runner.use.modules


def test_a_residual_block_without_a_shortcut_reads_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    from diffusers.models.resnet import ResnetBlock2D

    monkeypatch.setattr(packing, "read_in_place", lambda x: True)
    torch.manual_seed(0)
    module = ResnetBlock2D(in_channels=32, out_channels=32, temb_channels=None, groups=8, eps=1e-5).eval()
    x, skip = torch.randn(2, 2, 16, 4, 4).unbind()
    with torch.no_grad():
        got = packing.Resnet(module, "resnet")(x, None, skip)
        torch.testing.assert_close(got, module(torch.cat((x, skip), 1), None))


def test_sizes_that_cannot_be_halved_run_by_the_modules(stock: Any, unet: Any) -> None:
    runner = attach(unet)
    _compare(unet, stock, lambda dtype: _arguments(dtype, side=9))
    assert runner.use.packed == 0
    assert "halved" in next(iter(runner.use.modules))


def test_the_vae_decodes_what_its_modules_do() -> None:
    torch.manual_seed(0)
    vae = build_vae(TOY).eval()
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        baseline = vae.decode(latents).sample
        oracle = copy.deepcopy(vae).double().decode(latents.double()).sample
        runner = attach(vae)
        got = vae.decode(latents, return_dict=False)[0]
        assert_all([compare(got, oracle, baseline, op="decode", rows=ROWS)])
        assert torch.equal(vae.decode(latents).sample, got)
        vae.enable_slicing()
        assert_all([compare(vae.decode(latents).sample, oracle, baseline, op="sliced", rows=ROWS)])
    assert runner.use.packed == 4


@torch.no_grad()
def test_what_is_kept_of_the_decoders_weights_follows_them() -> None:
    torch.manual_seed(0)
    vae = build_vae(TOY).eval()
    latents = torch.randn(2, 4, 8, 8)
    attach(vae)
    vae.decode(latents)
    _behind_the_back(vae)
    other = copy.deepcopy(vae)
    detach(other)
    torch.testing.assert_close(vae.decode(latents).sample, other.decode(latents).sample, rtol=1e-4, atol=1e-5)


def test_a_float16_vae_is_decoded_in_bfloat16() -> None:
    """It overflows in float16; diffusers casts it to float32 on every call and returns that."""
    torch.manual_seed(0)
    vae = build_vae(TOY).eval()
    vae.register_to_config(force_upcast=True)
    latents = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        oracle = vae.half().float().decode(latents).sample
        bfloat16 = copy.deepcopy(vae).bfloat16().decode(latents.bfloat16()).sample.float()
        vae.half()
        runner = attach(vae)
        got = vae.decode(latents.half()).sample
        assert got.dtype == torch.float32
        assert (got - oracle).norm() <= 2 * (bfloat16 - oracle).norm()
        assert next(vae.parameters()).dtype == torch.float16
        vae.decoder.conv_out.weight.mul_(2)
        assert (vae.decode(latents.half()).sample - got).abs().max() > 0.1
    assert runner.use.packed == 2


def test_names_values_and_files_stay(stock: Any, unet: Any, tmp_path: Any) -> None:
    attach(unet)
    assert list(unet.state_dict()) == list(stock.state_dict())
    unet.save_pretrained(tmp_path)
    written = load_file(tmp_path / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(written[name], tensor) for name, tensor in stock.state_dict().items())
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"


def test_packing_costs_no_memory(unet: Any) -> None:
    size = sum(p.nbytes for p in unet.parameters())
    attach(unet)
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in unet.parameters()}
    assert sum(storages.values()) == size


def test_detach_gives_the_stock_network_back_bit_for_bit(stock: Any, unet: Any) -> None:
    attach(unet)
    detach(unet)
    assert type(unet) is type(stock)
    assert [type(m) for m in unet.modules()] == [type(m) for m in stock.modules()]
    assert all(p.untyped_storage().nbytes() == p.nbytes for p in unet.parameters())
    assert all(a.stride() == b.stride() for a, b in zip(unet.parameters(), stock.parameters(), strict=True))
    with torch.no_grad():
        assert torch.equal(unet(**_arguments())[0], stock(**_arguments())[0])
    detach(unet)  # nothing left to do


def test_a_copy_has_no_runner_and_still_works(stock: Any, unet: Any) -> None:
    attach(unet)
    other = copy.deepcopy(unet)
    assert runner_of(other) is None
    _compare(other, stock, _arguments)


@torch.no_grad()
def _weights(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.mul_(1.01)


def _moved(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.data = parameter.data * 1.02


def _behind_the_back(unet: Any) -> None:
    for parameter in unet.parameters():
        parameter.data.mul_(1.03)
    runner = runner_of(unet)
    if runner is not None:
        runner.touch()


def _replaced_block(unet: Any) -> None:
    torch.manual_seed(9)
    unet.mid_block = build_unet(TOY).eval().mid_block


def _processor(unet: Any) -> None:
    unet.set_attn_processor(AttnProcessor())


def _sliced(unet: Any) -> None:
    unet.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(SlicedAttnProcessor(2))


def _hook(unet: Any) -> None:
    unet.down_blocks[0].resnets[0].register_forward_hook(lambda module, args, output: output * 1.5)


def _freeu(unet: Any) -> None:
    unet.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)


def _lora(unet: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(3)
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "conv1"], init_lora_weights=False))


def _fused_lora(unet: Any) -> None:
    _lora(unet)
    unet.fuse_lora()
    unet.unload_lora()


PACKED = {"values": _weights, "moved": _moved, "unseen": _behind_the_back, "block": _replaced_block,
          "processor": _processor, "fused LoRA": _fused_lora}  # fmt: skip
BY_MODULES = {"sliced": _sliced, "hook": _hook, "FreeU": _freeu, "LoRA": _lora}


@pytest.mark.parametrize("case", [*PACKED, *BY_MODULES])
def test_every_change_of_the_network_is_followed(stock: Any, unet: Any, case: str) -> None:
    """What was kept (prompt, time embedding) is made again; what packed code does not know runs by the modules."""
    change: Callable[[Any], None] = (PACKED | BY_MODULES)[case]
    runner = attach(unet)
    reference = copy.deepcopy(stock)
    with torch.no_grad():
        arguments = _arguments()
        before = unet(**arguments)[0]
        change(unet)
        change(reference)
        assert (unet(**arguments)[0] - before).abs().max() > 1e-3 or case in ("processor", "sliced")
        wanted = reference(**arguments)[0]
        torch.testing.assert_close(unet(**arguments)[0], wanted)
    assert runner.use.packed == (3 if case in PACKED else 1)
    assert (runner.program is not None) == (case in PACKED)
    assert bool(runner.reason) == (case in BY_MODULES)


def test_gradients_flow_through_the_modules(stock: Any, unet: Any) -> None:
    attach(unet)
    unet(**_arguments())[0].square().mean().backward()
    stock.zero_grad()
    stock(**_arguments())[0].square().mean().backward()
    for (name, got), wanted in zip(unet.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=lambda text, name=name: f"{name}: {text}")


def test_unusual_calls_run_by_the_modules(stock: Any, unet: Any) -> None:
    runner = attach(unet)
    masks = {"encoder_attention_mask": torch.tensor([[1] * 5 + [0] * 2] * 2)}
    with torch.no_grad():
        torch.testing.assert_close(unet(**_arguments(), **masks)[0], stock(**_arguments(), **masks)[0])
        with torch.autocast("cpu", torch.bfloat16):
            unet(**_arguments())
        unet.train()
        unet(**_arguments())
    assert runner.use.packed == 0
    assert set(runner.use.modules) == {"encoder_attention_mask was given", "autocast is on", "it is in training mode"}


def test_other_networks_say_what_they_are(unet: Any) -> None:
    with pytest.raises(ValueError, match="Linear cannot be packed"):
        attach(nn.Linear(2, 2))
    plain = type(unet)(sample_size=8, block_out_channels=(32, 64), down_block_types=("DownBlock2D",) * 2,
                       up_block_types=("UpBlock2D",) * 2, cross_attention_dim=8, norm_num_groups=8)  # fmt: skip
    runner = attach(plain)
    assert "text_time" in runner.reason
    assert plain(torch.randn(1, 4, 8, 8), 1, torch.randn(1, 3, 8)).sample.shape == (1, 4, 8, 8)


def test_the_true_networks_can_be_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sdxl_fast.inference import packing, unet_program, vae_program

    for module in (packing, unet_program):
        monkeypatch.setattr(module, "pack", torch.cat)  # without memory there is nothing to make views of
    with torch.device("meta"):
        unet, vae = build_unet(SDXL).eval(), build_vae(SDXL).eval()
    program = unet_program.UNetProgram(unet)
    assert program._kv_weight.shape == (60 * 2 * 1280 + 10 * 2 * 640, 2048)
    assert program._time_weight.shape == (sum(program._time_widths), 1280)
    vae_program.DecoderProgram(vae)
