"""Packed text encoders compute what transformers' do, follow every change, and step aside where they must."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sdxl_fast import OneStepPipeline
from sdxl_fast.inference.accelerated import attach, detach, runner_of
from sdxl_fast.inference.text_program import penultimate
from sdxl_fast.models import config as configs
from sdxl_fast.models.tokenizer import train_tokenizer
from sdxl_fast.testing.compare import assert_all, compare

ROWS = 256  # the accumulated roundings of some dozen operations, as one sum


@pytest.fixture(scope="module")
def stock() -> tuple[Any, Any]:
    torch.manual_seed(0)
    tokenizer = train_tokenizer(["a red apple"], vocab_size=560, max_tokens=configs.TOY.max_tokens)
    return tuple(e.eval() for e in configs.build_text_encoders(configs.TOY, tokenizer, tokenizer))


@pytest.fixture(params=[0, 1], ids=["text_encoder", "text_encoder_2"])
def pair(request: pytest.FixtureRequest, stock: tuple[Any, Any]) -> tuple[Any, Any]:
    """An encoder by its modules, and the same one packed."""
    packed = copy.deepcopy(stock[request.param])
    attach(packed)
    return stock[request.param], packed


def _ids(encoder: Any, batch: int = 2) -> Tensor:
    end, length = encoder.config.eos_token_id, encoder.config.max_position_embeddings
    ids = torch.randint(3, 500, (batch, length))
    for row in range(batch):
        ids[row, 3 + row :] = end  # the tokenizer pads with it
    return ids


@torch.no_grad()
def test_it_computes_what_the_modules_do(pair: tuple[Any, Any]) -> None:
    modules, packed = pair
    ids = _ids(modules)
    exact = copy.deepcopy(modules).double()
    ours, theirs, truth = (e(ids, output_hidden_states=True) for e in (packed, modules, exact))
    assert len(ours.hidden_states) == len(theirs.hidden_states)
    assert set(ours.keys()) == set(theirs.keys())
    found = zip((*ours.hidden_states, ours[0]), (*theirs.hidden_states, theirs[0]), strict=True)
    wanted = (*truth.hidden_states, truth[0])
    assert_all([compare(y, t, base, op="text", rows=ROWS) for (y, base), t in zip(found, wanted, strict=True)])
    assert runner_of(packed).use.packed == 1  # type: ignore[union-attr]


@torch.no_grad()
def test_what_is_kept_of_the_weights_follows_them(pair: tuple[Any, Any]) -> None:
    modules, packed = pair
    ids = _ids(modules)
    packed(ids)
    for parameter in packed.parameters():  # which leaves no trace, so the runner is told
        parameter.data.mul_(1.03)
    runner_of(packed).touch()  # type: ignore[union-attr]
    other = copy.deepcopy(packed)
    detach(other)
    torch.testing.assert_close(packed(ids)[0], other(ids)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_what_sdxl_reads_is_the_state_before_the_last(pair: tuple[Any, Any]) -> None:
    modules, packed = pair
    ids = _ids(modules)
    for ours, theirs in zip(penultimate(packed, ids), penultimate(modules, ids), strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_row_of_the_first_end_token_is_pooled(pair: tuple[Any, Any]) -> None:
    modules, packed = pair
    for end in (modules.config.eos_token_id, 2):  # 2 stands in old configurations, whatever the end token is
        for encoder in pair:
            encoder.config.eos_token_id = getattr(encoder, "text_model", encoder).eos_token_id = end
        detach(packed)
        attach(packed)
        ids = _ids(modules)
        assert torch.allclose(packed(ids)[1 if len(packed(ids)) > 1 else 0], modules(ids)[1], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_changed_weights_are_followed(pair: tuple[Any, Any]) -> None:
    modules, packed = pair
    ids, changed = _ids(modules), copy.deepcopy(modules)
    packed(ids)
    for encoder in (changed, packed):
        layer = getattr(encoder, "text_model", encoder).encoder.layers[0]
        layer.self_attn.k_proj.weight.mul_(1.5)
        layer.self_attn.v_proj.weight = torch.nn.Parameter(layer.self_attn.v_proj.weight * 2)
    theirs, ours = changed(ids)[0], packed(ids)[0]
    assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(ours, modules(ids)[0], rtol=1e-2, atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("asked", [{"attention_mask": 1}, {"output_attentions": True}, {"output_hidden_states": [1]}])
def test_what_is_not_packed_runs_by_the_modules(pair: tuple[Any, Any], asked: dict[str, Any]) -> None:
    modules, packed = pair
    ids = _ids(modules)
    if "attention_mask" in asked:
        asked = {"attention_mask": (ids != ids[0, -1]).long()}
    for encoder in pair:
        encoder.set_attn_implementation("eager" if "output_attentions" in asked else "sdpa")
    ours, theirs = packed(ids, **asked), modules(ids, **asked)
    assert torch.equal(ours[0], theirs[0])
    assert ours.keys() == theirs.keys()
    use = runner_of(packed).use  # type: ignore[union-attr]
    assert use.packed == 0
    assert sum(use.modules.values()) == 1


def test_gradients_flow_through_the_modules(pair: tuple[Any, Any]) -> None:
    _, packed = pair
    packed(_ids(packed)).last_hidden_state.sum().backward()
    assert runner_of(packed).use.packed == 0  # type: ignore[union-attr]
    assert any(p.grad is not None for p in packed.parameters())
    packed.zero_grad(set_to_none=True)


def test_detached_it_is_what_it_was(pair: tuple[Any, Any]) -> None:
    modules, packed = pair
    detach(packed)
    assert type(packed) is type(modules)
    for (name, ours), theirs in zip(packed.named_parameters(), modules.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        assert ours.untyped_storage().nbytes() == ours.nbytes, name


def test_it_is_saved_as_the_class_it_stands_for(pair: tuple[Any, Any], tmp_path: Path) -> None:
    modules, packed = pair
    packed.save_pretrained(tmp_path)
    again = type(modules).from_pretrained(tmp_path)
    assert packed.config.architectures == [type(modules).__name__]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), modules.parameters(), strict=True))


def test_the_pipeline_encodes_with_it(toy_folder: Path) -> None:
    pipe = OneStepPipeline.from_pretrained(toy_folder, device="cpu")
    pipe.encode_prompt(["a red apple"])
    for name in ("text_encoder", "text_encoder_2"):
        part = pipe.report[name]
        assert part.packed, part.reason
        assert (part.use.packed, sum(part.use.modules.values())) == (1, 0)
