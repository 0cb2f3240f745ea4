# SPDX-License-Identifier: Apache-2.0
"""C++/CUDA and Triton accelerated SDXL: fused operations, one-step generation and adversarial distillation.

Public names load on first use, so that importing the package builds nothing, touches no GPU and does not import torch.
"""

from __future__ import annotations

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sdxl_fast import ops as ops
    from sdxl_fast.dispatch import explain as explain
    from sdxl_fast.dispatch import use_backend as use_backend
    from sdxl_fast.inference import OneStepPipeline as OneStepPipeline
    from sdxl_fast.inference import calibrate as calibrate
    from sdxl_fast.inference import optimize as optimize
    from sdxl_fast.inference import report as report
    from sdxl_fast.inference import restore as restore
    from sdxl_fast.nn import fuse as fuse

try:
    __version__ = version("sdxl-fast")
except PackageNotFoundError:  # a checkout on sys.path that was never installed
    __version__ = "0+uninstalled"

# name -> (module, attribute; None for the module itself)
_PUBLIC: dict[str, tuple[str, str | None]] = {
    "OneStepPipeline": ("sdxl_fast.inference", "OneStepPipeline"),
    "calibrate": ("sdxl_fast.inference", "calibrate"),
    "explain": ("sdxl_fast.dispatch", "explain"),
    "fuse": ("sdxl_fast.nn", "fuse"),
    "ops": ("sdxl_fast.ops", None),
    "optimize": ("sdxl_fast.inference", "optimize"),
    "report": ("sdxl_fast.inference", "report"),
    "restore": ("sdxl_fast.inference", "restore"),
    "use_backend": ("sdxl_fast.dispatch", "use_backend"),
}

__all__ = [
    "OneStepPipeline",
    "__version__",
    "calibrate",
    "explain",
    "fuse",
    "ops",
    "optimize",
    "report",
    "restore",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module_name, attribute = _PUBLIC[name]
    module = importlib.import_module(module_name)
    value = module if attribute is None else getattr(module, attribute)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
