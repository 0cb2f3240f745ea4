# SPDX-License-Identifier: Apache-2.0
"""Triton backend of `sdxl_fast`: one file per op, each exporting `X_fwd` and `X_bwd` on torch tensors.

The folder is installed as `sdxl_fast.triton_kernels`. A different project owns the top-level import name
`triton_kernels`, and engines that look for it must not find this folder in its place.
"""

if __name__ == "triton_kernels":
    raise ImportError(
        "this `triton_kernels` folder belongs to sdxl_fast and is not importable under its bare name; "
        "import `sdxl_fast.triton_kernels` instead, and keep the sdxl_fast checkout off sys.path"
    )
