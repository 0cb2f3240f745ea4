# SPDX-License-Identifier: Apache-2.0
"""Metrics of generated pictures, the report that puts them side by side, and the drawings that go with it."""
