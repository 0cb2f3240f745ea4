# SPDX-License-Identifier: Apache-2.0
"""The ops in plain PyTorch: the eager backend, the float64 oracle, the second-order path and the cost model.

Every module ``X`` offers ``fwd`` (differentiable), ``bwd`` (closed form), ``flops``, ``bytes`` and ``WRONG``,
deliberately wrong variants that the comparison of :mod:`sdxl_fast.testing` has to reject. float32 and lower are
computed in float32 and rounded once at the end; float64 is computed in float64.
"""
