# SPDX-License-Identifier: Apache-2.0
"""One benchmark per op."""
