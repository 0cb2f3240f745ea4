# SPDX-License-Identifier: Apache-2.0
"""From the start of a process to its first picture: ``python -m benchmarks.e2e.bench_cold_start``.

Every sample is a Python process of its own: starting the interpreter and importing, loading the weights, and one
prompt to a uint8 picture in memory, whatever is compiled or captured on the way. Files are in the page cache after the
first round, as they are on a machine that starts a service again, and memory is allocated as the system does it, not
by the warm allocator of other benchmarks. The peak of memory is the process's own, or what it reserved of the GPU's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, machine, report
from benchmarks.command import Say, say
from benchmarks.e2e.bench_pipelines import default_dtype, folder_of
from benchmarks.e2e.random_model import PROMPT, RANDOM_SDXL
from benchmarks.results import ResultsFile
from benchmarks.timing import clock_for, summarise

STAGES = ("imports", "loading", "first picture", "total")

_OURS = """
from sdxl_fast import OneStepPipeline
tell("imports")
pipe = OneStepPipeline.from_pretrained(FOLDER, dtype=DTYPE, device=DEVICE)
tell("loading")
picture = pipe(PROMPT, seed=0, num_inference_steps=1, output_type="uint8").images.cpu()
"""
_STOCK = """
from diffusers import StableDiffusionXLPipeline
tell("imports")
pipe = StableDiffusionXLPipeline.from_pretrained(FOLDER, dtype=DTYPE).to(DEVICE)
pipe.set_progress_bar_config(disable=True)
tell("loading")
picture = pipe(PROMPT, num_inference_steps=1, guidance_scale=0.0, output_type="pil").images[0]
"""
_COMPILED = _STOCK.replace(
    'tell("loading")',
    """pipe.unet.to(memory_format=torch.channels_last)
pipe.vae.to(memory_format=torch.channels_last)
pipe.unet, pipe.vae.decoder = torch.compile(pipe.unet), torch.compile(pipe.vae.decoder)
tell("loading")""",
)
CODE = {"diffusers": _STOCK, "diffusers, compiled": _COMPILED, "OneStepPipeline": _OURS}
_FRAME = """
import json, sys, time
stamps = []
def tell(stage):
    stamps.append((stage, time.time()))
import torch
torch.set_num_threads(THREADS)
{code}
tell("first picture")
import resource
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
if DEVICE == "cuda":
    peak = torch.cuda.max_memory_reserved()
print("STAMPS", json.dumps([stamps, peak]), flush=True)
"""


@dataclass(frozen=True)
class Request:
    """What to time: a folder (None for the embedded pipeline), the dtype's name, and how often."""

    model: str | None
    dtype: str
    compile: bool = False
    rounds: int = 3
    threads: int = 1

    def key(self) -> dict[str, str]:
        """Returns the entries that tell its row from others."""
        name = "embedded pipeline" if self.model is None else Path(self.model).name
        return {"model": name, "case": "batch 1", "dtype": self.dtype, "mode": "cold start"}


def sample(name: str, request: Request, device: str, folder: Path) -> tuple[dict[str, float], int]:
    """Runs one process; seconds by stage, and its peak of memory in bytes.

    Raises:
        RuntimeError: it failed, with the end of what it said.
    """
    given = {
        "FOLDER": repr(str(folder)),
        "DTYPE": f"torch.{request.dtype}",
        "DEVICE": repr(device),
        "PROMPT": repr(PROMPT),
        "THREADS": str(request.threads),
    }
    code = _FRAME.format(code=CODE[name])
    for key, value in given.items():
        code = code.replace(key, value)
    start = time.time()
    environment = {name: value for name, value in os.environ.items() if name not in machine.WARM_ALLOCATOR}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    found = [line for line in done.stdout.splitlines() if line.startswith("STAMPS ")]
    if done.returncode or not found:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr.strip()[-400:]}")
    stamps, peak = json.loads(found[0].removeprefix("STAMPS "))
    stages, before = {}, start
    for stage, now in stamps:
        stages[stage], before = now - before, now
    return {**stages, "total": before - start}, peak


def measure(request: Request, device: str, folder: Path) -> dict[str, Any]:
    """Returns the row: the contestants' processes one after the other, round by round."""
    names = [name for name in CODE if request.compile or "compiled" not in name]
    samples: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    peaks: dict[str, list[int]] = {name: [] for name in names}
    refused: dict[str, str] = {}
    for _ in range(request.rounds):
        for name in names:
            if name not in refused:
                try:
                    seconds, peak = sample(name, request, device, folder)
                    samples[name].append(seconds)
                    peaks[name].append(peak)
                except RuntimeError as error:
                    refused[name] = str(error).splitlines()[-1]
    contestants: dict[str, Any] = {}
    for name in names:
        contestants[name] = {"stages": {}, "gate": "pictures are compared by bench_pipelines"}
        if name in refused:
            contestants[name]["refused"] = refused[name]
        else:
            stages = {s: [found[s] for found in samples[name]] for s in STAGES}
            contestants[name]["stages"] = {s: summarise(values).as_dict() for s, values in stages.items()}
            contestants[name]["memory_bytes"] = summarise(peaks[name]).median
    target = {"contestant": "OneStepPipeline", "memory_of": "diffusers"}
    row = {**request.key(), "about": "From process start to the first picture.", "contestants": contestants}
    return {**row, "ratios": {}, "targets": [target]}


def run(requests: Sequence[Request], device: str, results: ResultsFile, *, tell: Say = say) -> None:
    """Times requests one after the other."""
    for request in requests:
        if results.find("end_to_end", request.key()) is None:
            with folder_of(request.model, request.dtype, device) as folder:
                row = measure(request, device, folder)
            results.put("end_to_end", row)
            tell(report.model_text(row) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Times the first picture on the CPU or the GPU."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.e2e.bench_cold_start", "Time a process until its first picture.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"a diffusers folder; {RANDOM_SDXL}; default: the embedded pipeline")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    machine.restart_with_warm_allocator("benchmarks.e2e.bench_cold_start", given, arguments.threads)
    results = command.start(
        arguments.out, arguments.device, clock_for(arguments.device, quick=arguments.quick), quick=arguments.quick
    )
    dtype = arguments.dtype or default_dtype(arguments.device)
    rounds = 1 if arguments.quick else arguments.rounds
    request = Request(arguments.model, dtype, arguments.compile, rounds, arguments.threads)
    run([request], arguments.device, results)
    raise SystemExit(command.finish(results))


if __name__ == "__main__":
    main()
