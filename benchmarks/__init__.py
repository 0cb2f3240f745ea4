# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of the ops and of one-step generation; ``benchmarks/README.md`` says how to run and read them."""
