"""Every way in which weights change is noticed, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sdxl_fast.inference.watch import Change, Watch


def _network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3)))


@torch.no_grad()
def _in_place(network: Any) -> None:
    network[1][0].weight.mul_(2)


@torch.no_grad()
def _copied(network: Any) -> None:
    network[0].bias.copy_(torch.ones(3))


def _replaced_data(network: Any) -> None:
    network[0].weight.data = network[0].weight.data.clone()


def _new_parameter(network: Any) -> None:
    network[0].weight = nn.Parameter(network[0].weight.detach().clone())


def _no_bias(network: Any) -> None:
    network[0].bias = None


def _wrapped(network: Any) -> None:
    network[1][0] = nn.Sequential(network[1][0])


def _grown(network: Any) -> None:
    network[1].add_module("more", nn.Identity())


def _hooked(network: Any) -> None:
    network[1][0].register_forward_hook(lambda module, args, output: output * 2)


def _own_forward(network: Any) -> None:
    network[0].forward = lambda x: x


CHANGES: dict[str, tuple[Callable[[Any], Any], Change]] = {
    "in place": (_in_place, Change.VALUES),
    "copy_": (_copied, Change.VALUES),
    "load_state_dict": (lambda n: n.load_state_dict(_network().state_dict()), Change.VALUES),
    "buffer": (lambda n: n[1][1].running_mean.add_(1), Change.VALUES),
    "new storage": (_replaced_data, Change.STRUCTURE),
    "new parameter": (_new_parameter, Change.STRUCTURE),
    "no bias": (_no_bias, Change.STRUCTURE),
    "dtype": (lambda n: n.double(), Change.STRUCTURE),
    "wrapped": (_wrapped, Change.STRUCTURE),
    "grown": (_grown, Change.STRUCTURE),
    "hook": (_hooked, Change.STRUCTURE),
    "forward": (_own_forward, Change.STRUCTURE),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_seen_once(case: str) -> None:
    change, kind = CHANGES[case]
    network = _network().eval()
    watch = Watch(network)
    network(torch.randn(4, 2))
    assert watch.look() is Change.NONE
    change(network)
    assert watch.look() is kind
    assert watch.look() is Change.NONE


def test_a_write_without_a_trace_has_to_be_told() -> None:
    network = _network()
    watch = Watch(network)
    network[0].weight.data += 1  # what peft's merges do
    assert watch.look() is Change.NONE
    watch.touch()
    assert watch.look() is Change.VALUES
    assert watch.look() is Change.NONE


def test_identity_stands_for_addresses() -> None:
    network = _network()
    watch = Watch(network)
    before = watch.identity
    _in_place(network)
    watch.look()
    assert watch.identity == before
    _replaced_data(network)
    watch.look()
    assert watch.identity != before


def test_other_facts_count_as_structure() -> None:
    facts = [1]
    watch = Watch(_network(), facts=lambda: tuple(facts))
    assert watch.look() is Change.NONE
    facts.append(2)
    assert watch.look() is Change.STRUCTURE
