# SPDX-License-Identifier: Apache-2.0
"""What a measurement depends on besides the code: device, driver, versions, commit, threads, allocator, other load."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent

# glibc gives large blocks back to the kernel when they are freed and gets them again, page fault by page fault, for the
# next output: a fresh 128 MB output costs five times its copy. With these it keeps them, on both sides of a comparison.
WARM_ALLOCATOR = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(64 << 20),
}
# Above this share of the processors used by others, before anything here has run, timings say little.
BUSY = 0.1


def has_glibc() -> bool:
    """Whether the C library is glibc, whose allocator the settings above are for."""
    return sys.platform == "linux" and platform.libc_ver()[0] == "glibc"


def restart_with_warm_allocator(module: str, arguments: list[str], threads: int) -> None:
    """Replaces this process by ``python -m module arguments`` with the allocator settings and thread count, once."""
    wanted = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    if has_glibc():
        wanted |= WARM_ALLOCATOR
    if all(os.environ.get(name) == value for name, value in wanted.items()):
        return
    os.environ.update(wanted)
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, "-m", module, *arguments])


def allocator() -> str:
    """Returns which allocator settings this process runs under."""
    if all(os.environ.get(name) == value for name, value in WARM_ALLOCATOR.items()):
        return "glibc, warm (" + " ".join(f"{k}={v}" for k, v in WARM_ALLOCATOR.items()) + ")"
    return "system default: page faults of fresh outputs are part of CPU timings"


def priority() -> str:
    """Returns how the system schedules this process: under a real-time policy nothing else runs on its processors."""
    policies = {getattr(os, f"SCHED_{name}", None): name for name in ("FIFO", "RR")}
    policy = os.sched_getscheduler(0) if hasattr(os, "sched_getscheduler") else None
    return f"real-time ({policies[policy]})" if policy in policies and policy is not None else "normal"


def full_float32() -> None:
    """Has float32 mean float32: cuDNN's convolutions round to TF32 unless told otherwise, which no gate would pass."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def processors() -> int:
    """Returns how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cache_bytes(device: str) -> int:
    """Returns the size of the last cache before memory: L2 of the GPU, the largest data cache of the CPU."""
    if device == "cuda":
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes, default=32 << 20)


def _cpu_seconds() -> tuple[float, float] | None:
    """Returns (busy, total) processor seconds since boot, of all processors together."""
    try:
        fields = [float(f) for f in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    except (OSError, ValueError, IndexError):
        return None
    return sum(fields) - fields[3] - fields[4], sum(fields)


def other_load(seconds: float = 0.5) -> float | None:
    """Returns the share of the machine's processors in use while this process sleeps; None where it cannot be told."""
    before = _cpu_seconds()
    time.sleep(seconds)
    after = _cpu_seconds()
    if before is None or after is None or after[1] <= before[1]:
        return None
    return (after[0] - before[0]) / (after[1] - before[1])


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def commit() -> str:
    """Returns the checkout's commit, marked when sources differ from it; of a copy without its history, that it is one.

    Such a copy, as an sdist unpacks, may lie in somebody else's checkout, whose commit says nothing of it.
    """
    top, _, found = (_output("git", "rev-parse", "--show-toplevel", "HEAD") or "").partition("\n")
    if not found or Path(top).resolve() != ROOT.resolve():
        return "unknown: the sources are no git checkout"
    changed = _output("git", "status", "--porcelain", "--untracked-files=no")
    return found + (" with local changes" if changed else "")


def _native() -> dict[str, Any]:
    from sdxl_fast import native

    try:
        return {**native.build_info(), "cpu_isa": native.load().cpu_isa()}
    except Exception as error:  # whatever is wrong with the library is what should stand here
        return {"unavailable": str(error)}


def _version(package: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_name() -> str:
    try:
        match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        match = None
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def _gpu_facts() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("nvidia-smi", "--query-gpu=driver_version,clocks.max.sm,clocks.max.mem,power.limit")
    smi = _output(*query, "--format=csv,noheader", f"--id={torch.cuda.current_device()}")
    names = ("driver", "max_sm_clock", "max_memory_clock", "power_limit")
    return {
        "device": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **dict(zip(names, (smi or "").split(", "), strict=False)),
    }


def facts(device: str) -> dict[str, Any]:
    """Returns everything a reader of the results needs to know of this machine and checkout."""
    found = {
        "device": _cpu_name(),
        "device_type": device,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "cache_bytes": cache_bytes(device),
        "host_cpu": _cpu_name(),
        "processors": processors(),
        "threads": torch.get_num_threads(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "allocator": allocator(),
        "priority": priority(),
        "load_of_others": other_load(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "native": _native(),
    }
    for package in ("sdxl-fast", "torch", "triton", "diffusers", "transformers"):
        found[package] = _version(package)
    return {**found, **_gpu_facts()} if device == "cuda" else found


def slug(machine: dict[str, Any]) -> str:
    """Returns ``<device>_<date>``, the name of the results file; a CPU's has its thread count."""
    name = machine["device"] + (f" {machine['threads']} threads" if machine["device_type"] == "cpu" else "")
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + "_" + machine["date"][:10]
