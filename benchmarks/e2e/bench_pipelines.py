# SPDX-License-Identifier: Apache-2.0
"""Whole pipelines side by side: ``python -m benchmarks.e2e.bench_pipelines``.

One step from text to uint8 pictures on the device by every contestant of `peers`, on the same weights and noise, stage
by stage. A *new prompt* is another text at every call; the *same prompt* again is what a second picture of it costs,
which ours have encoded before. ``python -m benchmarks.e2e`` runs this at many sizes.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import command, machine, report
from benchmarks.command import Say, say
from benchmarks.e2e import floor, random_model
from benchmarks.e2e.peers import COMPILED, FLOAT8, OURS, STOCK, Contestant, Setting, Size, makers, quiet, stock
from benchmarks.e2e.random_model import PROMPT, RANDOM_SDXL
from benchmarks.gate import PEER_ULPS, Verdict
from benchmarks.measure import ContextLostError, alive
from benchmarks.results import ResultsFile
from benchmarks.suite import GATE_FAILED
from benchmarks.timing import clock_for, interleave, quotient, summarise
from sdxl_fast.models import config as configs
from sdxl_fast.models import loading
from sdxl_fast.testing.compare import K_FORWARD, error_scale
from sdxl_fast.text import one_line

MODES = ("new prompt", "same prompt")
LEAST_PSNR = 20.0
"""dB of float8 pictures against float32 ones: below it they are other pictures, not less exact ones."""
AGAINST_STOCK, AGAINST_COMPILED = "over diffusers", "over torch.compile"
# Of the embedded pipeline on a CPU, by batch: times the speed of diffusers in its faster layout.
CPU_SPEEDUPS = {1: 1.5, 8: 1.15}
# Of SDXL at 1024 px, batch 1, on an H100 or H200: seconds by contestant, and times the compiled peer's speed.
GPU_SECONDS = {OURS[1]: 0.034, FLOAT8: 0.024}
GPU_SPEEDUP = 1.5


@dataclass(frozen=True)
class Request:
    """What to time.

    Attributes:
        model: a folder or hub id; None for the embedded pipeline; ``"sdxl-random"`` for the true SDXL configuration
            with random weights.
        dtype: name of the weights' and activations' dtype.
        batch: pictures at a time.
        compile, float8, third_parties: whether these contestants take part.
        rounds, budget_s: as for the ops.
        size: height and width in pixels; None is the pipeline's own.
    """

    model: str | None
    dtype: str = "float32"
    batch: int = 1
    compile: bool = False
    rounds: int = 11
    budget_s: float = 20.0
    size: Size | None = None
    float8: bool = False
    third_parties: bool = False

    def key(self, mode: str) -> dict[str, str]:
        """Returns the entries that tell its row from others."""
        name = "embedded pipeline" if self.model is None else Path(self.model).name
        case = f"batch {self.batch}" + ("" if self.size is None else f", {self.size[0]}x{self.size[1]} px")
        return {"model": name, "case": case, "dtype": self.dtype, "mode": f"pipeline, {mode}"}


def judge(
    contestants: Mapping[str, Contestant], setting: Setting, latents: torch.Tensor, refused: dict[str, str]
) -> dict[str, Verdict]:
    """Compares each picture with diffusers' one precision up; twice the error of diffusers itself is allowed.

    float8 is judged by its PSNR. Who cannot draw is taken down in ``refused``.
    """
    high = torch.float64 if setting.dtype == torch.float32 else torch.float32
    oracle = stock(setting)
    for name in ("text_encoder", "text_encoder_2", "unet", "vae"):
        getattr(oracle, name).to(high)
    prompts = [PROMPT] * len(latents)
    # all start from the same noise, rounded to the dtype that is judged; one by one, for the memory of large batches
    noise = latents.to(setting.dtype).to(high)
    call = {"num_inference_steps": 1, "guidance_scale": 0.0, "output_type": "np", **setting.sides}
    found = [oracle(PROMPT, latents=one, **call).images for one in noise.split(1)]
    wanted = torch.from_numpy(np.concatenate(found)).double()
    del oracle
    errors, ratios = {}, {}
    for name, contestant in contestants.items():
        try:
            picture = torch.from_numpy(contestant.picture(prompts, latents)).double()
        except Exception as error:  # a peer's compiler may fail in any way; the row says how
            refused[name] = one_line(error)
            continue
        finite = bool(picture.isfinite().all())
        errors[name] = error_scale(picture, wanted).relative if finite else float("inf")
        ratios[name] = -10 * float((picture - wanted).square().mean().clamp_min(1e-30).log10()) if finite else 0.0
    stocks = [errors[name] for name in STOCK if name in errors]
    bound = K_FORWARD * max(stocks, default=0.0) + PEER_ULPS * torch.finfo(setting.dtype).eps
    verdicts = {n: Verdict(e <= bound, f"relative L2 {e:.2g}, bound {bound:.2g}") for n, e in errors.items()}
    if FLOAT8 in errors:
        value = ratios[FLOAT8]
        verdicts[FLOAT8] = Verdict(value >= LEAST_PSNR, f"PSNR {value:.1f} dB, at least {LEAST_PSNR:g}")
    return verdicts


class _Calls:
    """Samples are whole calls; every prompt is a new text, or always the same. Stage times are kept."""

    def __init__(self, contestant: Contestant, latents: torch.Tensor, texts: Iterator[str]) -> None:
        self._contestant, self._latents, self._texts = contestant, latents, texts
        self.stages: dict[str, list[float]] = {}
        for _ in range(2):  # the first sets libraries up, and compiles what is to be compiled
            self.sample()
        self.stages.clear()

    def sample(self) -> float:
        """Draws once; seconds."""
        prompts = [next(self._texts) for _ in range(len(self._latents))]
        for stage, seconds in self._contestant.sample(prompts, self._latents).items():
            self.stages.setdefault(stage, []).append(seconds)
        return self.stages["total"][-1]


@contextlib.contextmanager
def folder_of(model: str | None, dtype: str, device: str) -> Iterator[Path]:
    """The folder of a request's model; that of random weights is there for the block only."""
    if model == RANDOM_SDXL:
        with random_model.folder(configs.SDXL, getattr(torch, dtype), device) as found:
            yield found
    else:
        yield loading.resolve(model)


def measure(request: Request, device: str, ceilings: Mapping[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Returns a row for each mode: the seconds of each stage by contestant, refused where the picture is wrong."""
    setting = Setting(folder, getattr(torch, request.dtype), device, request.size)
    contestants: dict[str, Contestant] = {}
    refused: dict[str, str] = {}
    made = makers(compile=request.compile, float8=request.float8, third_parties=request.third_parties)
    for name, make in made.items():
        try:
            contestants[name] = make(setting)
        except Exception as error:  # not installed, out of memory, or of another version: the row says so
            refused[name] = one_line(error)
    latents, size = _latents(setting, request.batch)
    gates = judge(contestants, setting, latents, refused)
    gc.collect()
    needed = floor.work(folder, request.batch, size)
    texts = _texts()
    rows = []
    for mode in MODES:
        timed = {n: _Calls(contestants[n], latents, texts[mode]) for n, gate in gates.items() if gate.passed}
        interleave(timed, rounds=request.rounds, budget_s=request.budget_s)
        found: dict[str, Any] = {}
        for name in made:
            gate = gates.get(name, Verdict(False, ""))
            entry: dict[str, Any] = {"stages": {}, "gate": gate.detail}
            if name in timed:
                entry["stages"] = {stage: summarise(times).as_dict() for stage, times in timed[name].stages.items()}
            else:
                entry["refused"] = refused.get(name) or f"{GATE_FAILED}: {gate.detail}"
            found[name] = entry
        totals = {name: calls.stages["total"] for name, calls in timed.items()}
        about = f"Whole calls, one step, {size[0]}x{size[1]} px, {mode}, to uint8 on the device."
        row = {**request.key(mode), "about": about, "contestants": found, "ratios": ratios_of(totals)}
        row["floor"] = floor.seconds(needed, request.dtype, ceilings)
        rows.append({**row, "targets": targets_of(request, device, mode, size)})
    return rows


def _texts() -> dict[str, Iterator[str]]:
    return {"new prompt": (f"{PROMPT} {n}" for n in itertools.count()), "same prompt": itertools.repeat(PROMPT)}


def _latents(setting: Setting, batch: int) -> tuple[torch.Tensor, Size]:
    """Returns unit noise, and the size in pixels that it stands for."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    unet = UNet2DConditionModel.load_config(setting.folder, subfolder="unet")
    factor = configs.vae_scale_factor(AutoencoderKL.load_config(setting.folder, subfolder="vae"))
    size = setting.size or (unet["sample_size"] * factor,) * 2
    shape = (batch, unet["in_channels"], size[0] // factor, size[1] // factor)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(setting.device), size


def ratios_of(totals: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Returns how many times the speed of the fastest eager peer, and of the compiled one, the faster of ours has."""
    medians = {name: summarise(times).median for name, times in totals.items()}
    ours = min((name for name in OURS if name in medians), key=medians.__getitem__, default=None)
    eager = min((name for name in STOCK if name in medians), key=medians.__getitem__, default=None)
    if ours is None:
        return {}
    pairs = {AGAINST_STOCK: eager, AGAINST_COMPILED: COMPILED if COMPILED in medians else None}
    return {what: quotient(totals[n], totals[ours]).as_dict() for what, n in pairs.items() if n is not None}


def targets_of(request: Request, device: str, mode: str, size: Size) -> list[dict[str, Any]]:
    """Returns what a row is meant to reach; prompts that were encoded before prove nothing."""
    if mode != MODES[0]:
        return []
    if device == "cpu":
        if request.model is not None or request.batch not in CPU_SPEEDUPS or request.size is not None:
            return []
        compiled = [{"stage": AGAINST_COMPILED, "speedup": 1, "what": "no slower than torch.compile"}]
        speedup = CPU_SPEEDUPS[request.batch]
        what = f"at least {speedup:g} times diffusers in its faster layout"
        first = {"stage": AGAINST_STOCK, "speedup": speedup, "what": what}
        return [first, *(compiled if request.compile else [])]
    if size != (1024, 1024) or request.batch != 1 or request.dtype != "bfloat16":
        return []
    found: list[dict[str, Any]] = [
        {"contestant": name, "stage": "total", "seconds": seconds}
        for name, seconds in GPU_SECONDS.items()
        if name != FLOAT8 or request.float8
    ]
    if request.compile:
        what = f"at least {GPU_SPEEDUP:g} times diffusers compiled"
        found.append({"stage": AGAINST_COMPILED, "speedup": GPU_SPEEDUP, "what": what})
    return found


def run(requests: Sequence[Request], device: str, results: ResultsFile, *, tell: Say = say) -> None:
    """Times requests one after the other, writing each as it is done; what cannot run is a row that says why."""
    missing = [r for r in requests if results.find("end_to_end", r.key(MODES[0])) is None]
    for (model, dtype), group in itertools.groupby(missing, key=lambda request: (request.model, request.dtype)):
        with folder_of(model, dtype, device) as folder:
            for request in group:
                for row in _rows(request, device, results, folder):
                    results.put("end_to_end", row)
                    tell(report.model_text(row) + "\n")


def _rows(request: Request, device: str, results: ResultsFile, folder: Path) -> list[dict[str, Any]]:
    """Returns the rows of a request, or the one that says what went wrong."""
    try:
        return measure(request, device, results.data["ceilings"], folder)
    except Exception as error:  # of any compiler of kernels too: the row says what it was
        row = {**request.key(MODES[0]), "about": "", "skipped": one_line(error), "contestants": {}}
        if not alive(device):
            raise ContextLostError("end_to_end", row) from error
        return [row]
    finally:
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()


def parse_size(text: str) -> Size:
    """Returns height and width of ``"1024"`` or ``"1216x832"`` [pixels].

    Raises:
        argparse.ArgumentTypeError: no such numbers, or not multiples of 64.
    """
    try:
        sides = tuple(int(part) for part in text.split("x"))
    except ValueError:
        sides = ()
    if len(sides) not in (1, 2) or any(side < 64 or side % 64 for side in sides):
        raise argparse.ArgumentTypeError(f"{text} is no side or HEIGHTxWIDTH in multiples of 64")
    return sides[0], sides[-1]


def default_dtype(device: str) -> str:
    """Returns the dtype that a device is fast in."""
    return "bfloat16" if device == "cuda" else "float32"


def main(argv: Sequence[str] | None = None) -> None:
    """Times whole pipelines on the CPU or the GPU."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.e2e.bench_pipelines", "Time whole pipelines side by side.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"folder or hub id; {RANDOM_SDXL}; default: the embedded pipeline")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default: 1 and 8")
    parser.add_argument("--size", type=parse_size, help="side or HEIGHTxWIDTH in pixels; default: the model's own")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    parser.add_argument("--fp8", action="store_true", help="calibrate and time float8 too; needs bfloat16")
    parser.add_argument("--third-parties", action="store_true", help="try stable-fast, OneDiff and Torch-TensorRT too")
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    dtype = arguments.dtype or default_dtype(arguments.device)
    if arguments.fp8 and dtype != "bfloat16":
        parser.error("--fp8 needs --dtype bfloat16")
    machine.restart_with_warm_allocator("benchmarks.e2e.bench_pipelines", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    quiet()
    clock = clock_for(arguments.device, quick=arguments.quick)
    results = command.start(arguments.out, arguments.device, clock, quick=arguments.quick)
    rounds, budget = (3, 2.0) if arguments.quick else (arguments.rounds, 20.0)
    requests = [
        Request(
            arguments.model,
            dtype,
            batch,
            arguments.compile,
            rounds,
            budget,
            size=arguments.size,
            float8=arguments.fp8,
            third_parties=arguments.third_parties,
        )
        for batch in arguments.batch or (1, 8)
    ]
    run(requests, arguments.device, results)
    raise SystemExit(command.finish(results))


if __name__ == "__main__":
    main()
