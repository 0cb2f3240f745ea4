# SPDX-License-Identifier: Apache-2.0
"""The catalogue of SDXL shapes is what the models have."""

from __future__ import annotations

import pytest

from sdxl_fast.testing.cases import Case, sdxl_cases, shrunk, trace


def test_recorded_shapes_are_those_of_the_models():
    traced = trace(1024, 1024)
    for op, cases in traced.items():
        assert cases == sdxl_cases(op), "run python -m sdxl_fast.testing.cases"


def test_known_shapes_are_there():
    """The first residual block of the U-Net, the VAE's last map, the widest GEGLU; from the architecture by hand."""
    norms = {case.shape: case.options for case in sdxl_cases("group_norm_silu") if case.options["activation"] == "silu"}
    assert norms[1, 320, 128, 128]["num_groups"] == 32
    assert norms[1, 128, 1024, 1024]["eps"] == 1e-6
    assert {case.shape for case in sdxl_cases("geglu")} == {(1, 4096, 5120), (1, 1024, 10240)}
    assert {case.shape[1:] for case in sdxl_cases("upsample_conv2d")} == {
        (1280, 32, 32), (640, 64, 64), (512, 128, 128), (512, 256, 256), (256, 512, 512)
    }  # fmt: skip
    out_projections = [c for c in sdxl_cases("linear") if c.shape == (1, 1024, 1280) and c.options["residual"]]
    assert [case.options["out_features"] for case in out_projections] == [1280]
    assert [case.shape for case in sdxl_cases("forward_diffusion", height=832, width=1216)] == [(1, 4, 104, 152)]


def test_batch_and_shrinking_keep_channels_and_drop_duplicates():
    batched = sdxl_cases("group_norm_silu", batch=3)
    assert {case.shape[0] for case in batched} == {3}
    small = shrunk(batched, longest=8)
    assert max(max(case.shape[2:]) for case in small) == 8
    assert {case.shape[1] for case in small} == {case.shape[1] for case in batched}
    assert len({case.name for case in small}) == len(small) < len(batched)
    assert shrunk([Case("7x9", (7, 9), {})], longest=4)[0].shape == (7, 4)


def test_unknown_op_is_refused():
    with pytest.raises(ValueError, match="op must be"):
        sdxl_cases("conv3d")
