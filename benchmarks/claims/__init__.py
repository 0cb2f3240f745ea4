# SPDX-License-Identifier: Apache-2.0
"""The papers' claims, tried on the embedded model: ``python -m benchmarks.claims``."""
