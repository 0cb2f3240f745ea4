# SPDX-License-Identifier: Apache-2.0
"""Choosing a backend: preference, refusal with reasons, forcing, explaining, listing."""

from __future__ import annotations

import dataclasses
import json
import re
import threading
from pathlib import Path

import pytest
import torch

import sdxl_fast
from sdxl_fast import dispatch, explain, ops, use_backend
from sdxl_fast.constraints import Dtype, Ndim
from sdxl_fast.dispatch import BACKENDS, Backend, OpInfo, available_backends, matrix_markdown, select
from sdxl_fast.errors import UnavailableError, UnsupportedError
from sdxl_fast.ops import _backends


def _kernel():
    raise AssertionError("not to be called")


def _missing():
    raise UnavailableError("no such machine")


def _op(*backends: Backend) -> OpInfo:
    return OpInfo("toy", "x", (), (*backends, Backend("eager", lambda: (_kernel, _kernel))), dict, lambda: None)


def _working(name: str, *rules) -> Backend:
    return Backend(name, lambda: (_kernel, _kernel), rules)


VALUES = {"x": torch.zeros(2, 3)}


def test_first_backend_of_the_preference_wins():
    assert select(_op(_working("cpu")), VALUES).backend == "cpu"
    assert select(_op(_working("triton"), _working("cuda")), VALUES).backend == "eager", "not in the order of a CPU"


def test_refusing_and_missing_backends_are_passed_over():
    assert select(_op(_working("cpu", Ndim("x", 4, "[N,C,H,W]"))), VALUES).backend == "eager"
    assert select(_op(Backend("cpu", _missing)), VALUES).backend == "eager"


def test_forcing_runs_that_backend_or_says_why_not():
    info = _op(_working("triton"), _working("cpu", Dtype("x", (torch.float64,))), Backend("cuda", _missing))
    with use_backend("triton"):
        assert select(info, VALUES).backend == "triton"
    with use_backend("cpu"), pytest.raises(UnsupportedError, match=r"toy: backend 'cpu' cannot.*float64, got float32"):
        select(info, VALUES)
    with use_backend("cuda"), pytest.raises(UnsupportedError, match=r"backend 'cuda' cannot.*: no such machine"):
        select(info, VALUES)
    with use_backend("cpu"), pytest.raises(UnsupportedError, match="this op has no such backend"):
        select(_op(), VALUES)


def test_all_refusing_lists_every_reason():
    info = OpInfo(
        "toy",
        "x",
        (),
        (Backend("cpu", _missing), _working("eager", Ndim("x", 4, "[N,C,H,W]"))),
        dict,
        lambda: None,
    )
    with pytest.raises(UnsupportedError, match=r"cpu: no such machine; eager: x must have 4 dimensions"):
        select(info, VALUES)


def test_blocks_nest_and_end():
    with use_backend("eager"):
        with use_backend("cpu"):
            assert dispatch.forced_backend() == "cpu"
        assert dispatch.forced_backend() == "eager"
        with pytest.raises(RuntimeError), use_backend("cpu"):
            raise RuntimeError
        assert dispatch.forced_backend() == "eager"
    assert dispatch.forced_backend() is None


def test_other_threads_are_not_forced():
    seen = []
    with use_backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(dispatch.forced_backend()))
        thread.start()
        thread.join()
    assert seen == [None]


def test_unknown_backend_is_refused():
    with (
        pytest.raises(ValueError, match="backend must be 'cuda', 'triton', 'cpu', 'library' or 'eager', got 'gpu'"),
        use_backend("gpu"),
    ):
        pass


def test_triton_never_runs_on_cpu_tensors_unasked(monkeypatch):
    x = torch.randn(3, 8)
    assert explain("geglu", x).backend in ("cpu", "eager")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    rule = _backends.TritonDevice("x")
    assert "must be a cuda tensor" in rule.check({"x": x})
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert rule.check({"x": x}) is None


def test_explain_takes_name_or_function_and_gives_reasons():
    x = torch.randn(3, 8)
    by_name, by_function = explain("geglu", x, approximate="tanh"), explain(ops.geglu, x=x)
    assert by_name == by_function
    assert set(by_name.reasons) | {by_name.backend} == set(BACKENDS)
    with use_backend("eager"):
        forced = explain("geglu", x)
    assert forced.backend == "eager" and forced.forced
    assert str(forced).startswith("geglu runs on eager (forced)\n")
    assert all(line.startswith("  not ") for line in str(forced).splitlines()[1:])


def test_explain_runs_nothing(monkeypatch):
    info = dispatch.registry()["geglu"]
    dispatch.reset()
    fakes = tuple(Backend(b.name, lambda: (_kernel, _kernel), b.rules) for b in info.backends)
    monkeypatch.setattr(dispatch, "_registry", {"geglu": dataclasses.replace(info, backends=fakes, _loaded={})})
    assert explain("geglu", torch.zeros(2, 4)).backend == "cpu"
    assert explain("geglu", torch.zeros(2, 4, device="meta")).backend == "eager"


def test_explain_rejects_what_the_op_rejects():
    *others, last = map(repr, dispatch.registry())
    listed = f"op must be {', '.join(others)} or {last}, got 'norm'"
    with pytest.raises(ValueError, match=f"^{re.escape(listed)}$"):
        explain("norm")
    with pytest.raises(ValueError, match="last dimension of x must be even"):
        explain("geglu", torch.zeros(3))
    with pytest.raises(ValueError, match="geglu: missing a required argument: 'x'"):
        explain("geglu")


def test_available_backends_covers_everything():
    table = available_backends()
    assert list(table) == sorted(sdxl_fast.ops.__all__)
    for row in table.values():
        assert tuple(row) == BACKENDS
        assert row["eager"] is None
        assert all(reason is None or len(reason) > 10 for reason in row.values())


def test_a_backend_that_cannot_load_gives_its_reason(monkeypatch):
    """A missing native library leaves the op running on the reference."""
    import sdxl_fast.native as native

    monkeypatch.setattr(native, "unavailable_reason", lambda device: "not built for this test")
    dispatch.reset()
    try:
        assert available_backends()["geglu"]["cpu"] == "not built for this test"
        assert explain("geglu", torch.zeros(2, 4)).backend == "eager"
        with use_backend("cpu"), pytest.raises(UnsupportedError, match="not built for this test"):
            ops.geglu(torch.zeros(2, 4))
    finally:
        monkeypatch.undo()
        dispatch.reset()


def test_preferences_are_well_formed():
    rows = json.loads((Path(dispatch.__file__).parent / "ops" / "preferences.json").read_text())["rows"]
    allowed = {"device", "order", "op", "dtype", "min_elements", "max_elements", "measured"}
    for row in rows:
        assert set(row) <= allowed and {"device", "order"} <= set(row)
        assert set(row["order"]) <= set(BACKENDS) and row["order"][-1] == "eager", "every order ends where all can run"
        assert row.get("op") in (None, *sdxl_fast.ops.__all__)
        general = set(row) <= {"device", "order"}
        assert general or "measured" in row, "a special row says what was measured"
    assert rows[-1]["device"] == "*"


def test_preference_rows_narrow_by_op_dtype_and_size(monkeypatch):
    rows = (
        {"device": "cpu", "op": "toy", "dtype": "bfloat16", "min_elements": 10, "max_elements": 20, "order": ["cpu"]},
        {"device": "*", "order": ["eager"]},
    )
    monkeypatch.setattr(dispatch, "_preferences", lambda: rows)
    for count, dtype, op, expected in [
        (10, torch.bfloat16, "toy", "cpu"),
        (19, torch.bfloat16, "toy", "cpu"),
        (20, torch.bfloat16, "toy", "eager"),
        (9, torch.bfloat16, "toy", "eager"),
        (15, torch.float32, "toy", "eager"),
        (15, torch.bfloat16, "other", "eager"),
    ]:
        assert dispatch.preference(op, torch.zeros(count, dtype=dtype)) == (expected,)


def test_matrix_has_a_row_per_op():
    lines = matrix_markdown().splitlines()
    assert lines[0] == "| op | cuda | triton | cpu | library | eager |"
    assert [re.match(r"\| `(\w+)` \|", line).group(1) for line in lines[2:]] == sorted(ops.__all__)


def test_registering_twice_or_without_eager_is_refused():
    with pytest.raises(ValueError, match="'geglu' is registered already"):
        dispatch.register(dispatch.registry()["geglu"])
    for backends in ((_working("cpu"),), (_working("tpu"), _working("eager"))):
        with pytest.raises(ValueError, match="backends must be among"):
            dispatch.register(OpInfo("toy", "x", (), backends, dict, lambda: None))


def test_record_counts_forward_calls_per_backend():
    x = torch.randn(2, 4)
    with dispatch.record() as counts, use_backend("eager"):
        ops.geglu(x)
        ops.geglu(x)
    ops.geglu(x)
    assert counts == {("geglu", "eager"): 2}
    torch.compiler.reset()
    with dispatch.record() as counts, use_backend("eager"):
        torch.compile(ops.geglu, fullgraph=True, backend="aot_eager")(x)
    assert counts == {("geglu", "eager"): 1}, "running the graph counts, tracing it does not"
