# SPDX-License-Identifier: Apache-2.0
"""The report behind ``sdxl-fast env``: what a bug report needs to say about the machine and the installation."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from sdxl_fast import __version__, dispatch, native
from sdxl_fast.errors import UnavailableError

PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "safetensors", "numpy", "pydantic")
# Of the many flags a processor has, those that decide which vector path runs and how fast.
CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "amx_tile", "asimd")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu() -> dict[str, Any]:
    model, flags = platform.processor() or platform.machine(), set[str]()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            model = value.strip()
        elif key.strip() in ("flags", "Features"):
            flags.update(value.split())
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "model": model,
        "cores": usable,
        "torch_threads": torch.get_num_threads(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
    }


def _native() -> dict[str, Any]:
    reason = native.unavailable_reason("cpu")
    if reason is not None:
        return {"unavailable": reason}
    binding = native.load()
    try:
        path = str(native.library_path())
    except UnavailableError as error:
        path = str(error)
    return {
        "path": path,
        **native.build_info(),
        "vector_path": binding.cpu_isa(),
        "threads_from": binding.cpu_threading(),
    }


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        found.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return found


def _printed(pattern: str, *command: str) -> str | None:
    """What the group of ``pattern`` matches in the output of a command; None when it is missing or fails."""
    program = shutil.which(command[0])
    if program is None:
        return None
    try:
        run = subprocess.run([program, *command[1:]], capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    match = re.search(pattern, run.stdout)
    return match.group(1) if match else None


def collect() -> dict[str, Any]:
    """Returns the facts of the report, fit for JSON.

    Keys: ``sdxl_fast``, ``python``, ``platform``, ``packages`` (name to version or None), ``cpu``, ``gpus``,
    ``torch_cuda``, ``driver``, ``nvcc``, ``native`` (what the library says of itself, or ``unavailable`` with the
    reason), ``backends`` (op to backend to None when it works here, else the reason why not).
    """
    return {
        "sdxl_fast": __version__,
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        # torch says its build (+cpu, +cu130) even where the installed metadata does not.
        "packages": {name: _version(name) for name in PACKAGES} | {"torch": torch.__version__},
        "cpu": _cpu(),
        "gpus": _gpus(),
        "torch_cuda": torch.version.cuda,
        "driver": _printed(r"([\d.]+)", "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": _printed(r"V([\d.]+)", "nvcc", "--version"),
        "native": _native(),
        "backends": dispatch.available_backends(),
    }


def _native_lines(facts: dict[str, Any]) -> list[str]:
    if "unavailable" in facts:
        return [f"native       not available: {facts['unavailable']}"]
    cuda = "no CUDA"
    if facts["cuda"]:
        matrix = f"with CUTLASS {facts['cutlass']}" if facts["cutlass"] else "no matrix kernels (no CUTLASS, or no 90a)"
        cuda = f"CUDA {facts['cuda']} for {', '.join(facts['cuda_archs'])}, {matrix}"
    return [
        f"native       {facts['path']}",
        f"             version {facts['version']}, ABI {facts['abi']}, {facts['compiler']}, {cuda}",
        f"             vector path {facts['vector_path']} of {', '.join(facts['isas'])}; "
        f"threads from {facts['threads_from']}",
    ]


def _backend_lines(backends: dict[str, dict[str, str | None]]) -> list[str]:
    """One line per op, then each reason once with the ops it holds for."""
    lines = ["backends"]
    reasons: dict[tuple[str, str], list[str]] = {}
    for op, row in backends.items():
        lines.append(f"  {op:<20} {' '.join(name for name, reason in row.items() if reason is None)}")
        for name, reason in row.items():
            if reason is not None:
                reasons.setdefault((name, reason), []).append(op)
    for (name, reason), ops in reasons.items():
        whose = "" if len(ops) == len(backends) else f" ({', '.join(ops)})"
        lines.append(f"  not {name}{whose}: {reason}")
    return lines


def report() -> str:
    """Returns the facts of :func:`collect` as text to paste into an issue."""
    facts = collect()
    cpu, packages = facts["cpu"], facts["packages"]
    gpus = [f"{g['name']}, compute capability {g['capability']}, {g['memory_gib']} GiB" for g in facts["gpus"]]
    lines = [
        f"sdxl_fast    {facts['sdxl_fast']}",
        f"python       {facts['python']} on {facts['platform']}",
        "packages     " + ", ".join(f"{name} {version}" for name, version in packages.items() if version),
        "missing      " + (", ".join(name for name, version in packages.items() if not version) or "none of these"),
        f"cpu          {cpu['model']}, {cpu['cores']} usable cores, {cpu['torch_threads']} torch threads",
        f"             {' '.join(cpu['flags']) or 'no vector extension known here'}",
        f"gpu          {gpus[0] if gpus else 'none that torch can use'}",
        *(f"             {gpu}" for gpu in gpus[1:]),
        f"cuda         torch built for {facts['torch_cuda'] or 'no CUDA'}, driver {facts['driver'] or 'none'}, "
        f"nvcc {facts['nvcc'] or 'none'}",
        *_native_lines(facts["native"]),
        *_backend_lines(facts["backends"]),
    ]
    return "\n".join(lines)
