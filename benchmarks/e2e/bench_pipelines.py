# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines side by side: ``python -m benchmarks.e2e.bench_pipelines``.

diffusers' own pipeline in both memory layouts, the same under torch.compile, ``sdxl_fast.optimize`` of it, and
``OneStepPipeline``: one step from text to a float picture, on the same weights and noise. A *new prompt* is another
text at every call; the *same prompt* again is what a second picture of it costs, which ours have encoded before.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import command, machine, report
from benchmarks.command import Say, say
from benchmarks.gate import PEER_ULPS, Verdict
from benchmarks.results import ResultsFile
from benchmarks.suite import GATE_FAILED
from benchmarks.timing import clock_for, interleave, summarise
from sdxl_fast import OneStepPipeline, optimize
from sdxl_fast.models import loading
from sdxl_fast.testing.compare import K_FORWARD, error_scale

PROMPT = "a red apple"
STOCK = ("diffusers, contiguous", "diffusers, channels-last")
COMPILED = "diffusers, compiled"
OURS = ("sdxl_fast.optimize", "OneStepPipeline")
MODES = ("new prompt", "same prompt")

Draw = Callable[[list[str], torch.Tensor], np.ndarray]


@dataclass(frozen=True)
class Request:
    """What to time: a folder (None for the embedded pipeline), the batch, the dtype's name, and how often."""

    model: str | None
    dtype: str = "float32"
    batch: int = 1
    compile: bool = False
    rounds: int = 11
    budget_s: float = 20.0

    def key(self, mode: str) -> dict[str, str]:
        """Returns the entries that tell its row from others."""
        name = "embedded pipeline" if self.model is None else Path(self.model).name
        return {"model": name, "case": f"batch {self.batch}", "dtype": self.dtype, "mode": f"pipeline, {mode}"}


def stock(folder: Path, dtype: torch.dtype, device: str, *, channels_last: bool = False) -> Any:
    """Returns diffusers' pipeline of a folder, with guidance off and silent."""
    from diffusers import StableDiffusionXLPipeline

    pipe = StableDiffusionXLPipeline.from_pretrained(folder, torch_dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    if channels_last:
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
    return pipe


def _by_diffusers(pipe: Any, *, channels_last: bool) -> Draw:
    layout = torch.channels_last if channels_last else torch.contiguous_format

    def draw(prompts: list[str], latents: torch.Tensor) -> np.ndarray:
        given = latents.to(pipe.unet.dtype).contiguous(memory_format=layout)
        found = pipe(prompts, latents=given, num_inference_steps=1, guidance_scale=0.0, output_type="np").images
        return np.asarray(found)

    return draw


def _by_ours(pipe: OneStepPipeline) -> Draw:
    def draw(prompts: list[str], latents: torch.Tensor) -> np.ndarray:
        found = pipe(prompts, latents=latents.to(pipe.dtype), num_inference_steps=1, output_type="np").images
        return np.asarray(found)

    return draw


def contestants(folder: Path, dtype: torch.dtype, device: str, *, compile: bool = False) -> dict[str, Draw]:
    """Returns the pipelines, each with weights of its own."""
    found = {
        name: _by_diffusers(stock(folder, dtype, device, channels_last=last), channels_last=last)
        for name, last in zip(STOCK, (False, True), strict=True)
    }
    if compile:
        pipe = stock(folder, dtype, device, channels_last=True)
        pipe.unet, pipe.vae.decoder = torch.compile(pipe.unet), torch.compile(pipe.vae.decoder)
        found[COMPILED] = _by_diffusers(pipe, channels_last=True)
    found[OURS[0]] = _by_diffusers(optimize(stock(folder, dtype, device), shapes=()), channels_last=False)
    found[OURS[1]] = _by_ours(OneStepPipeline.from_pretrained(folder, dtype=dtype, device=device))
    return found


def judge(draws: dict[str, Draw], folder: Path, latents: torch.Tensor, dtype: torch.dtype) -> dict[str, Verdict]:
    """Compares each picture with diffusers' one precision up; twice the error of diffusers itself is allowed."""
    high = torch.float64 if dtype == torch.float32 else torch.float32
    oracle = stock(folder, dtype, str(latents.device))
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        getattr(oracle, name).to(high)
    prompts = [PROMPT] * len(latents)
    # all start from the same noise, rounded to the dtype that is judged
    wanted = torch.from_numpy(_by_diffusers(oracle, channels_last=False)(prompts, latents.to(dtype))).double()
    errors = {}
    for name, draw in draws.items():
        picture = torch.from_numpy(draw(prompts, latents))
        errors[name] = error_scale(picture, wanted).relative if bool(picture.isfinite().all()) else float("inf")
    bound = K_FORWARD * max(errors[name] for name in STOCK) + PEER_ULPS * torch.finfo(dtype).eps
    return {name: Verdict(e <= bound, f"relative L2 {e:.2g}, bound {bound:.2g}") for name, e in errors.items()}


class _Calls:
    """Samples are whole calls; every prompt is a new text, or always the same."""

    def __init__(self, draw: Draw, latents: torch.Tensor, texts: Iterator[str]) -> None:
        self._draw, self._latents, self._texts = draw, latents, texts
        for _ in range(2):  # the first sets libraries up, and compiles what is to be compiled
            self.sample()

    def sample(self) -> float:
        """Draws once; seconds."""
        prompts = [next(self._texts) for _ in range(len(self._latents))]
        start = time.perf_counter()
        self._draw(prompts, self._latents)
        return time.perf_counter() - start


def measure(request: Request, device: str) -> list[dict[str, Any]]:
    """Returns a row for each mode: seconds of whole calls by contestant, refused where the picture is wrong."""
    folder, dtype = loading.resolve(request.model), getattr(torch, request.dtype)
    draws = contestants(folder, dtype, device, compile=request.compile)
    config = OneStepPipeline.from_pretrained(folder, dtype=dtype, device=device).unet.config
    side = config.sample_size
    shape = (request.batch, config.in_channels, side, side)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    gates = judge(draws, folder, latents, dtype)
    numbers = itertools.count()
    texts = {"new prompt": (f"{PROMPT} {n}" for n in numbers), "same prompt": itertools.repeat(PROMPT)}
    rows = []
    for mode in MODES:
        timed = {name: _Calls(draw, latents, texts[mode]) for name, draw in draws.items() if gates[name].passed}
        samples = interleave(timed, rounds=request.rounds, budget_s=request.budget_s)
        found: dict[str, Any] = {}
        for name, gate in gates.items():
            found[name] = {"stages": {}, "gate": gate.detail, "refused": f"{GATE_FAILED}: {gate.detail}"}
            if gate.passed:
                found[name] = {"stages": {"total": summarise(samples[name]).as_dict()}, "gate": gate.detail}
        about = f"Whole calls, one step, {mode}; best stock over best of ours: {_speedup(samples):.2f}."
        rows.append({**request.key(mode), "about": about, "contestants": found})
    return rows


def _speedup(samples: dict[str, list[float]]) -> float:
    """How many times faster the faster of ours is than the fastest peer, by the best samples."""
    best = {name: min(times) for name, times in samples.items()}
    peers = [best[name] for name in (*STOCK, COMPILED) if name in best]
    ours = [best[name] for name in OURS if name in best]
    return min(peers) / min(ours) if peers and ours else float("nan")


def run(requests: Sequence[Request], device: str, results: ResultsFile, *, tell: Say = say) -> None:
    """Times requests one after the other, writing each as it is done."""
    for request in requests:
        if results.find("end_to_end", request.key(MODES[0])) is None:
            for row in measure(request, device):
                results.put("end_to_end", row)
                tell(report.model_text(row) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Times whole pipelines on the CPU or the GPU."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.e2e.bench_pipelines", "Time whole pipelines side by side.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help="a diffusers folder; default: the embedded pipeline")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default: 1 and 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    machine.restart_with_warm_allocator("benchmarks.e2e.bench_pipelines", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    clock = clock_for(arguments.device, quick=arguments.quick)
    results = command.start(arguments.out, arguments.device, clock, quick=arguments.quick)
    rounds, budget = (3, 2.0) if arguments.quick else (arguments.rounds, 20.0)
    requests = [
        Request(arguments.model, arguments.dtype, batch, arguments.compile, rounds, budget)
        for batch in arguments.batch or (1, 8)
    ]
    run(requests, arguments.device, results)
    raise SystemExit(command.finish(results))


if __name__ == "__main__":
    main()
