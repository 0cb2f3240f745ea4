# SPDX-License-Identifier: Apache-2.0
"""Tools for testing ops against the float64 oracle; part of the package so that others can test their own backends."""
