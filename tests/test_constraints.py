# SPDX-License-Identifier: Apache-2.0
"""Every rule accepts what it should, refuses the rest, and says what came and what to do."""

from __future__ import annotations

import dataclasses
import inspect
import re

import pytest
import torch

from sdxl_fast import constraints, dispatch
from sdxl_fast.constraints import (
    Condition,
    DeviceLike,
    DeviceType,
    DimBetween,
    DimsLike,
    Divides,
    Dtype,
    DtypeLike,
    EvenLast,
    ExactlyOne,
    Integer,
    IsTensor,
    LastAtMost,
    LastMultiple,
    Ndim,
    NoGradient,
    NonNegative,
    OneOf,
    SameShape,
    ShapeFrom,
    Sizes,
    Together,
    first_problem,
)

X = torch.zeros(2, 8, 4, 4)
HALF = X.half()

# rule, values that satisfy it, values that do not, what the refusal says
EXAMPLES = [
    (
        Sizes("x", "[2, C, 4, 4] with channels", lambda v: (2, None, 4, 4)),
        {"x": X},
        {"x": X[:, :0]},
        "x must have shape [2, C, 4, 4] with channels = [2, any, 4, 4], got [2, 0, 4, 4]",
    ),
    (
        LastMultiple("x", 4),
        {"x": X},
        {"x": X[..., :3]},
        "the last dimension of x must be a multiple of 4, got shape [2, 8, 4, 3]",
    ),
    (
        DimBetween("x", 1, "tokens", least=1, most=8),
        {"x": X},
        {"x": X[:, :0]},
        "x must have at least 1 and at most 8 tokens (dimension 1), got shape [2, 0, 4, 4]",
    ),
    (
        DimBetween("x", 1, "keys", most=7),
        {"x": X[:, :7]},
        {"x": X},
        "x must have at most 7 keys (dimension 1), got shape [2, 8, 4, 4]",
    ),
    (
        DimsLike("y", "x", (0, 2, 3), "[N,H,D]"),
        {"x": X, "y": X[:, :5]},
        {"x": X, "y": X[:, :, :3]},
        "y must have the sizes [N,H,D] of x; got y [2, 8, 3, 4] with x [2, 8, 4, 4]",
    ),
    (
        NonNegative("n", optional=True),
        {"n": None},
        {"n": -1.0},
        "n must be a finite number >= 0 or None, got -1.0",
    ),
    (
        LastAtMost("x", 4),
        {"x": X},
        {"x": X.transpose(1, 3)},
        "the last dimension of x must be at most 4, got shape [2, 4, 4, 8]",
    ),
    (IsTensor("x"), {"x": X}, {"x": None}, "x must be a tensor, got NoneType"),
    (IsTensor("x", optional=True), {"x": None}, {"x": 3}, "x must be a tensor or None, got int"),
    (
        Dtype("x", (torch.float32, torch.float16)),
        {"x": HALF},
        {"x": X.long()},
        "x must be float32 or float16, got int64; convert it: x.to(torch.float32)",
    ),
    (
        DtypeLike("w", "x"),
        {"w": X, "x": X},
        {"w": X, "x": HALF},
        "w must have the dtype of x; got w float32 with x float16; convert it: w.to(x.dtype)",
    ),
    (
        DtypeLike("w", "x", also=(torch.float32,)),
        {"w": X, "x": HALF},
        {"w": X, "x": X.double()},
        "w must have the dtype of x or be float32; got w float32 with x float64; convert it: w.to(x.dtype)",
    ),
    (
        DeviceLike("w", "x"),
        {"w": X, "x": X},
        {"w": X, "x": X.to("meta")},
        "w must be on the device of x; got w on cpu and x on meta; move it: w.to(x.device)",
    ),
    (DeviceType("x", "cpu"), {"x": X}, {"x": X.to("meta")}, "x must be a cpu tensor, got one on meta"),
    (Ndim("x", 4, "[N,C,H,W]"), {"x": X}, {"x": X[0]}, "x must have 4 dimensions [N,C,H,W], got shape [8, 4, 4]"),
    (
        Ndim("x", 1, "[...,C]", at_least=True),
        {"x": X},
        {"x": X.sum()},
        "x must have at least 1 dimension [...,C], got shape []",
    ),
    (
        ShapeFrom("s", "x", (0, 1), "[N,C]"),
        {"s": torch.zeros(2, 8), "x": X},
        {"s": torch.zeros(8, 2), "x": X},
        "s must have shape [N,C] of x = [2, 8], got [8, 2]",
    ),
    (
        SameShape("n", "x"),
        {"n": HALF, "x": X},
        {"n": X[:1], "x": X},
        "n must have the shape of x [2, 8, 4, 4], got [1, 8, 4, 4]",
    ),
    (EvenLast("x"), {"x": X}, {"x": X[..., :3]}, "the last dimension of x must be even, got shape [2, 8, 4, 3]"),
    (
        Divides("g", "x", 1),
        {"g": 4, "x": X},
        {"g": 3, "x": X},
        "g must be positive and divide dimension 1 of x, got g=3 for 8 channels",
    ),
    (Divides("g", "x", 1), {"g": 8, "x": X}, {"g": 0, "x": X}, "got g=0 for 8 channels"),
    (Integer("i", low=0, high=4), {"i": 3}, {"i": 4}, "i must be an int >= 0 and < 4, got 4"),
    (Integer("i", low=0), {"i": 0}, {"i": True}, "i must be an int >= 0, got True"),
    (Integer("i"), {"i": -5}, {"i": None}, "i must be an int, got None"),
    (Integer("i", optional=True), {"i": None}, {"i": "1"}, "i must be an int or None, got '1'"),
    (NonNegative("e"), {"e": 0}, {"e": float("inf")}, "e must be a finite number >= 0, got inf"),
    (NonNegative("e"), {"e": 1e-5}, {"e": "1e-5"}, "got '1e-5'"),
    (OneOf("a", ("none", "silu")), {"a": "silu"}, {"a": ["silu"]}, "a must be 'none' or 'silu', got ['silu']"),
    (Together("w", "b"), {"w": None, "b": None}, {"w": X, "b": None}, "got None only for b"),
    (ExactlyOne("s", "n"), {"s": X, "n": None}, {"s": X, "n": X}, "exactly one of s and n must be given, got both"),
    (ExactlyOne("s", "n"), {"s": None, "n": X}, {"s": None, "n": None}, "got neither"),
    (
        NoGradient("n"),
        {"n": X},
        {"n": X.clone().requires_grad_()},
        "no gradient is defined for n, which requires grad; detach it: n.detach()",
    ),
    (Condition("x must be small", lambda v: v["x"] < 3), {"x": 1}, {"x": 5}, "x must be small"),
]


@pytest.mark.parametrize(("rule", "good", "bad", "message"), EXAMPLES, ids=lambda v: type(v).__name__)
def test_rule_accepts_refuses_and_explains(rule, good, bad, message):
    assert rule.check(good) is None
    problem = rule.check(bad)
    assert message in problem
    assert "\n" not in problem and rule.describe()
    assert not re.search(r"<.* object at", rule.describe())


def test_every_rule_class_has_an_example():
    classes = {
        value
        for value in vars(constraints).values()
        if inspect.isclass(value) and dataclasses.is_dataclass(value) and hasattr(value, "check")
    }
    assert classes == {type(rule) for rule, *_ in EXAMPLES}


@pytest.mark.parametrize(
    "rule",
    [
        Dtype("x", (torch.float32,)),
        DtypeLike("x", "y"),
        DeviceLike("x", "y"),
        Ndim("x", 4, "[N,C,H,W]"),
        ShapeFrom("x", "y", (0,), "[N]"),
        SameShape("x", "y"),
        NoGradient("x"),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_absent_optional_tensor_breaks_no_rule(rule):
    assert rule.check({"x": None, "y": X}) is None


def test_no_grad_lifts_the_rule_against_gradients():
    with torch.no_grad():
        assert NoGradient("n").check({"n": X.clone().requires_grad_()}) is None


def test_first_problem_is_the_first():
    rules = (IsTensor("x"), Ndim("x", 3, "[A,B,C]"), Dtype("x", (torch.float64,)))
    assert first_problem(rules, {"x": X}).startswith("x must have 3 dimensions")
    assert first_problem(rules[:1], {"x": X}) is None


def test_rules_of_ops_name_only_their_arguments():
    """A misspelt argument name would raise KeyError at the first call."""
    for info in dispatch.registry().values():
        names = set(inspect.signature(getattr(__import__("sdxl_fast").ops, info.name)).parameters)
        assert info.lead.partition("[")[0] in names, f"{info.name}: {info.lead}"
        names.add(info.lead)  # the first tensor of a list, in an op that takes lists
        for rule in (*info.rules, *(r for b in info.backends for r in b.rules)):
            used = {getattr(rule, field) for field in ("arg", "other", "first", "second") if hasattr(rule, field)}
            assert used <= names, f"{info.name}: {rule}"
