# SPDX-License-Identifier: Apache-2.0
"""``ops.geglu``: the shared suite, and what is its own."""

from __future__ import annotations

import pytest
import torch

from sdxl_fast import ops, use_backend
from sdxl_fast.ops.geglu import _OP
from sdxl_fast.reference import geglu as reference
from sdxl_fast.testing.cases import Case, draw, sdxl_cases, shrunk
from sdxl_fast.testing.contract_suite import ContractSuite


class TestGeglu(ContractSuite):
    op = _OP
    public = staticmethod(ops.geglu)
    reference = reference
    outputs = ("y",)
    inputs = ("x",)
    formats = ("contiguous", "strided")
    wrong = tuple(reference.WRONG)
    cases = (
        Case("ragged", (3, 5, 2 * 67)),
        Case("one-element", (1, 2)),
        Case("one-row", (2 * 33,)),
        Case("empty", (0, 8)),
        Case("no-columns", (3, 0)),
        Case("four-dims", (2, 3, 2, 2 * 16)),
        Case("tanh", (7, 2 * 129), {"approximate": "tanh"}),
        Case("wide", (16, 2 * 64), kind="wide"),
        Case("wide-tanh", (16, 2 * 64), {"approximate": "tanh"}, kind="wide"),
        Case("small", (16, 2 * 64), kind="small"),
    )
    sdxl = shrunk(sdxl_cases("geglu"), longest=4)
    full_size = sdxl_cases("geglu")
    tiny = Case("tiny", (3, 2 * 5))

    def make(self, case, dtype, generator):
        return {
            "x": draw(case.shape, case.kind, generator).to(dtype),
            "approximate": case.options.get("approximate", "none"),
        }


@pytest.mark.parametrize(
    ("x", "approximate", "message"),
    [
        (torch.zeros(3, 5), "none", r"last dimension of x must be even, got shape \[3, 5\]"),
        (torch.zeros(3, 4, dtype=torch.int32), "none", r"x must be float32.*got int32.*x\.to\(torch\.float32\)"),
        (torch.zeros(()), "none", r"x must have at least 1 dimension .*got shape \[\]"),
        (torch.zeros(3, 4), "fast", r"approximate must be 'none' or 'tanh', got 'fast'"),
        ([1.0, 2.0], "none", r"x must be a tensor, got list"),
        (torch.zeros(2, dtype=torch.complex64), "none", r"x must be float32.*got complex64"),
    ],
)
def test_bad_input_names_argument_value_and_remedy(x, approximate, message):
    with pytest.raises(ValueError, match=message):
        ops.geglu(x, approximate=approximate)


def test_known_values():
    """GELU(1) = 0.8413447..., by hand; the first half is the value, the second the gate."""
    y = ops.geglu(torch.tensor([[3.0, 1.0]], dtype=torch.float64))
    torch.testing.assert_close(y, torch.tensor([[3 * 0.8413447460685429]], dtype=torch.float64))


@pytest.mark.large
@pytest.mark.parametrize("backend", ["cpu", "triton", "cuda"])
def test_more_than_2_to_the_31_elements(backend):
    """Index products are 64-bit: the rows beyond 2**31 elements come out as they do alone."""
    from sdxl_fast.testing.op_suite import device_of, require

    device = device_of(backend)
    require(backend, "geglu", {"x": torch.zeros(1, 2, device=device)})
    if backend == "triton" and device == "cpu":
        pytest.skip("backend triton: the interpreter would take hours")
    columns = 2 * 5120
    x = torch.zeros(2**31 // columns + 2, columns, dtype=torch.bfloat16, device=device)
    x[-1] = torch.randn(columns)
    with use_backend(backend):
        assert torch.equal(ops.geglu(x)[-1:], ops.geglu(x[-1:]))
