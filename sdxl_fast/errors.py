# SPDX-License-Identifier: Apache-2.0
"""Exceptions of the package.

Bad arguments raise plain :class:`ValueError` (what came, what is allowed, the remedy); the classes here are for the
cases a caller may want to tell apart. All derive from :class:`SdxlFastError`.
"""

from __future__ import annotations


class SdxlFastError(Exception):
    """Base of the package's own exceptions."""


class UnsupportedError(SdxlFastError, ValueError):
    """No backend, or not the forced one, can run this call. The message gives each backend's reason."""


class UnavailableError(SdxlFastError, RuntimeError):
    """A backend cannot be used on this machine at all (not built, no GPU, package missing)."""


class KernelLaunchError(SdxlFastError, RuntimeError):
    """A native kernel reported a failure; the message names op, backend, shapes and the driver's own text."""


class BuildMismatchError(SdxlFastError, RuntimeError):
    """The native library found does not fit this version of the package."""


class DataError(SdxlFastError, ValueError):
    """A data set is missing, damaged or not what it should be; the message says which file and what to do."""


class ModelError(SdxlFastError, ValueError):
    """A model folder or weight file is missing, unsafe, broken or of another architecture."""


class NotFewStepError(ModelError):
    """Nothing says how a checkpoint is sampled in a few steps: it may be a plain SDXL model, which needs guidance."""
