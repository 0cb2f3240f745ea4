# SPDX-License-Identifier: Apache-2.0
"""One step from prompt to picture, stage by stage: ``python -m benchmarks.e2e.bench_one_step``.

The same pipeline with and without the fused operations, in turn. ``latency`` is what a caller waits: launches, Python
and tokenizer included. ``graph`` (GPU only) is each stage alone as a replayed CUDA graph, free of launch gaps.
Weights make no difference to the time, so the true SDXL configuration is timed with random ones, and the row says so.
"""

from __future__ import annotations

import contextlib
import copy
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import command, machine, report
from benchmarks.command import Say, say
from benchmarks.e2e import random_model
from benchmarks.e2e.random_model import PROMPT, RANDOM_SDXL
from benchmarks.gate import PEER_ULPS, Verdict
from benchmarks.measure import ContextLostError, alive
from benchmarks.results import ResultsFile
from benchmarks.suite import GATE_FAILED
from benchmarks.timing import Call, Clock, Timed, clock_for, interleave, quotient, summarise
from sdxl_fast import OneStepPipeline, restore
from sdxl_fast.inference.runner import runner_of
from sdxl_fast.models import config as configs
from sdxl_fast.models.conditioning import tokenize
from sdxl_fast.testing.compare import K_FORWARD, error_scale
from sdxl_fast.text import one_line

STAGES = ("text_encoders", "unet", "vae")
OURS, STOCK = "sdxl_fast", "stock modules"
# Of SDXL's true configuration in one step on a CPU: times the speed of stock modules.
CPU_SPEEDUP = 1.2

Stages = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Request:
    """What to time.

    Attributes:
        model: a folder, hub id or file; None for the embedded pipeline; ``"sdxl-random"`` for the true SDXL
            configuration with random weights.
        batch: pictures at a time.
        dtype: name of the weights' and activations' dtype.
        graphs: whether to time the stages as CUDA graphs too.
        compile: whether stock modules compiled by torch.compile take part, which takes minutes for SDXL.
        rounds, budget_s: as for the ops.
        size: side of the picture in pixels; None is the pipeline's own.
    """

    model: str | None
    dtype: str
    batch: int = 1
    graphs: bool = False
    compile: bool = False
    rounds: int = 11
    budget_s: float = 20.0
    size: int | None = None

    def key(self, mode: str) -> dict[str, str]:
        """Returns the entries that tell its row from others."""
        name = "embedded pipeline" if self.model is None else self.model
        name = Path(name).name if Path(name).exists() else name  # where a folder lies is nobody's business
        case = f"batch {self.batch}" + ("" if self.size is None else f", {self.size} px")
        return {"model": name, "case": case, "dtype": self.dtype, "mode": mode}


def load(request: Request, device: str) -> OneStepPipeline:
    """Returns the pipeline of a request on the device."""
    dtype = getattr(torch, request.dtype)
    if request.model == RANDOM_SDXL:
        return random_model.pipeline(configs.SDXL, dtype, device)
    return OneStepPipeline.from_pretrained(request.model, dtype=dtype, device=device)


@dataclass(frozen=True)
class Arrangement:
    """One way to run the pipeline: its UNet and VAE; all ways share their weights."""

    unet: Any
    vae: Any

    def install(self, pipe: OneStepPipeline) -> None:
        """Makes the pipeline run this way."""
        pipe.unet, pipe.vae = self.unet, self.vae


def _sharing_weights(network: torch.nn.Module) -> Any:
    """Returns a copy of the modules on the same parameters, with stock classes."""
    tensors = (*network.parameters(), *network.buffers())
    found = copy.deepcopy(network, {id(t): t for t in tensors})
    restore(found)
    return found


def arrangements(pipe: OneStepPipeline, *, compile: bool = False) -> dict[str, Arrangement]:
    """Returns the contestants: the pipeline as it is, on stock modules, and on those compiled if asked for."""
    found = {
        OURS: Arrangement(pipe.unet, pipe.vae),
        STOCK: Arrangement(_sharing_weights(pipe.unet), _sharing_weights(pipe.vae)),
    }
    if compile:
        vae = _sharing_weights(pipe.vae)
        vae.decoder = torch.compile(vae.decoder)
        found["compile"] = Arrangement(torch.compile(_sharing_weights(pipe.unet)), vae)
    return found


def _pixels(pipe: OneStepPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Returns the unclamped picture of given noise."""
    batch = [PROMPT] * len(latents)
    with torch.no_grad():
        clean = pipe(batch, latents=latents, num_inference_steps=1, output_type="latent").images
        return pipe.decode(clean)


def _promoted(pipe: OneStepPipeline, way: Arrangement, latents: torch.Tensor) -> torch.Tensor:
    """Returns the picture drawn one precision up: casting the weights up and back loses nothing."""
    low = pipe.dtype
    high = torch.float64 if low == torch.float32 else torch.float32
    networks = (pipe.text_encoder, pipe.text_encoder_2, way.unet, way.vae)
    try:
        way.install(pipe)
        for network in networks:
            torch.nn.Module.to(network, high)  # diffusers' own `to` warns of casts, which it must not here
        pipe.dtype = high
        return _pixels(pipe, latents.to(high))
    finally:
        for network in networks:
            torch.nn.Module.to(network, low)
        pipe.dtype = low


def judge(pipe: OneStepPipeline, ways: dict[str, Arrangement], latents: torch.Tensor) -> dict[str, Verdict]:
    """Compares each contestant's picture with that of stock modules one precision up.

    The error may be twice that of stock modules plus what a peer of an op may have. Stock modules, the yardstick
    itself, have to be finite.
    """
    oracle = _promoted(pipe, ways[STOCK], latents).double()
    errors = {}
    for name, way in ways.items():
        way.install(pipe)
        pixels = _pixels(pipe, latents)
        errors[name] = error_scale(pixels, oracle).relative if bool(torch.isfinite(pixels).all()) else math.inf
    bound = K_FORWARD * errors[STOCK] + PEER_ULPS * torch.finfo(pipe.dtype).eps
    return {
        name: Verdict(error <= bound and error < math.inf, f"relative L2 {error:.2g}, bound {bound:.2g}")
        for name, error in errors.items()
    }


class _Latency:
    """Samples are whole calls of the pipeline; the seconds of each stage are kept."""

    def __init__(self, pipe: OneStepPipeline, way: Arrangement, batch: int) -> None:
        self._pipe, self._way, self._batch = pipe, way, batch
        self.stages: dict[str, list[float]] = {}
        for _ in range(2):  # the first call sets up libraries, and compiles what is to be compiled
            self.sample()
        self.stages.clear()

    def sample(self) -> float:
        self._way.install(self._pipe)
        # on a GPU what one graph can hold
        kind = "np" if self._pipe.device.type == "cpu" else "uint8"
        self._pipe([PROMPT] * self._batch, seed=0, num_inference_steps=1, output_type=kind)
        for stage, seconds in self._pipe.timings.items():
            self.stages.setdefault(stage, []).append(seconds)
        return self.stages["total"][-1]


def stage_calls(pipe: OneStepPipeline, batch: int) -> dict[str, Call]:
    """Returns each stage as a call on fixed tensors, without a step on the host."""
    texts = [PROMPT] * batch
    side = pipe.default_size // pipe.vae_scale_factor
    with torch.no_grad():
        embeds, pooled = pipe.encode_prompt(texts)
    latents = torch.randn(batch, pipe.unet.config.in_channels, side, side, device=pipe.device).to(pipe.dtype)
    latents = latents.contiguous(memory_format=torch.channels_last)
    steps = torch.full((batch,), 999, device=pipe.device)
    size = torch.tensor([[pipe.default_size] * 2 + [0, 0] + [pipe.default_size] * 2], device=pipe.device)
    added = {"text_embeds": pooled, "time_ids": size.to(pipe.dtype).expand(batch, -1)}
    towers = ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2))
    ids = [(tokenize(tokenizer, texts).to(pipe.device), tower) for tokenizer, tower in towers]

    def encode() -> Any:
        return [tower(tokens, output_hidden_states=True) for tokens, tower in ids]

    def predict() -> Any:
        return pipe.unet(latents, steps, embeds, added_cond_kwargs=added, return_dict=False)[0]

    calls = {"text_encoders": encode, "unet": predict, "vae": lambda: pipe.decode(latents)}
    return {name: torch.no_grad()(call) for name, call in calls.items()}


@contextlib.contextmanager
def _without_graphs(way: Arrangement) -> Iterator[None]:
    """Within the block the packed networks capture nothing: the clock does, and no graph holds another."""
    runners = [runner for runner in map(runner_of, (way.unet, way.vae)) if runner is not None]
    held = [runner.graphs for runner in runners]
    for runner in runners:
        runner.graphs = None
    try:
        yield
    finally:
        for runner, graphs in zip(runners, held, strict=True):
            runner.graphs = graphs


def _time_graphs(pipe: OneStepPipeline, ways: dict[str, Arrangement], request: Request, clock: Clock) -> Stages:
    """Returns by contestant the times of the stages, each captured alone."""
    timed: dict[str, Timed] = {}
    found: Stages = {name: {} for name in ways}
    for name, way in ways.items():
        way.install(pipe)
        with _without_graphs(way):
            for stage, call in stage_calls(pipe, request.batch).items():
                try:
                    timed[f"{name}/{stage}"] = clock.prepare([call])
                except Exception as error:  # of a capture, or of a compiler of kernels
                    found[name][stage] = {"refused": one_line(error)}
    for key, samples in interleave(timed, rounds=request.rounds, budget_s=request.budget_s).items():
        name, _, stage = key.partition("/")
        found[name][stage] = summarise(samples).as_dict()
    return {n: {s: stages[s] for s in STAGES if s in stages} for n, stages in found.items()}


def _time_latency(pipe: OneStepPipeline, ways: dict[str, Arrangement], request: Request, ratios: Stages) -> Stages:
    """Returns by contestant the seconds of the stages and of the whole call; ``ratios`` gets stock over ours."""
    timed = {name: _Latency(pipe, way, request.batch) for name, way in ways.items()}
    interleave(timed, rounds=request.rounds, budget_s=request.budget_s)
    if OURS in timed and STOCK in timed:
        stock, ours = timed[STOCK].stages, timed[OURS].stages
        # "image" is one graph of ours in place of two stages
        ratios |= {stage: quotient(stock[stage], ours[stage]).as_dict() for stage in ours if stage in stock}
    return {n: {s: summarise(x).as_dict() for s, x in t.stages.items()} for n, t in timed.items()}


def measure(
    request: Request, device: str, clock: Clock, *, pipe: OneStepPipeline | None = None
) -> list[dict[str, Any]]:
    """Times one request.

    Args:
        request: what to time.
        device: "cpu" or "cuda".
        clock: for the stages alone.
        pipe: the pipeline, instead of the one the request names.

    Returns:
        rows for the results file: "latency", and "graph" where that was asked for.

    Raises:
        ContextLostError: when a GPU fault makes this process useless.
    """
    pipe = load(request, device) if pipe is None else pipe
    pipe.default_size = request.size or pipe.default_size
    ways = arrangements(pipe, compile=request.compile)
    side = pipe.default_size // pipe.vae_scale_factor
    shape = (request.batch, pipe.unet.config.in_channels, side, side)
    latents = torch.randn(shape, generator=torch.Generator(device).manual_seed(0), device=device).to(pipe.dtype)
    gates = judge(pipe, ways, latents)
    admitted = {name: way for name, way in ways.items() if gates[name].passed}
    ratios: Stages = {}
    modes: dict[str, Callable[[], Stages]] = {"latency": lambda: _time_latency(pipe, admitted, request, ratios)}
    if request.graphs:
        modes["graph"] = lambda: _time_graphs(pipe, admitted, request, clock)
    weights = "random weights in the true SDXL configuration" if request.model == RANDOM_SDXL else "weights as loaded"
    about = f"{pipe.default_size} px, one step, {weights}."
    rows = []
    for mode, time in modes.items():
        stages = time()
        contestants = {
            name: {"stages": stages[name], "gate": gate.detail}
            if gate.passed
            else {"stages": {}, "gate": gate.detail, "refused": f"{GATE_FAILED}: {gate.detail}"}
            for name, gate in gates.items()
        }
        row = {**request.key(mode), "about": about, "contestants": contestants}
        if mode == "latency":
            aimed = request.model == RANDOM_SDXL and device == "cpu"
            row |= {"ratios": ratios, "targets": [{"stage": "total", "speedup": CPU_SPEEDUP}] if aimed else []}
        rows.append(row)
    ways[OURS].install(pipe)
    return rows


def run(requests: Sequence[Request], device: str, clock: Clock, results: ResultsFile, *, tell: Say = say) -> None:
    """Times requests one after the other; what cannot run here is a row that says why."""
    for request in requests:
        if results.find("end_to_end", request.key("latency")) is not None:
            continue
        try:
            rows = measure(request, device, clock)
        except Exception as error:  # of any compiler of kernels too: the row says what it was
            rows = [{**request.key("latency"), "about": "", "skipped": one_line(error), "contestants": {}}]
            if not alive(device):
                raise ContextLostError("end_to_end", rows[0]) from error
        for row in rows:
            results.put("end_to_end", row)
            tell(report.model_text(row) + "\n")


def test_one_step(benchmark: Any, pipeline: OneStepPipeline, arrangement: str) -> None:
    """For ``pytest benchmarks``: a whole call of the pipeline, after its gate."""
    ways = arrangements(pipeline)
    side = pipeline.default_size // pipeline.vae_scale_factor
    latents = torch.randn(1, pipeline.unet.config.in_channels, side, side, dtype=pipeline.dtype).to(pipeline.device)
    verdict = judge(pipeline, ways, latents)[arrangement]
    assert verdict.passed, verdict.detail
    ways[arrangement].install(pipeline)
    benchmark.group = "one step"
    benchmark(pipeline, PROMPT, seed=0, num_inference_steps=1, output_type="np")
    ways[OURS].install(pipeline)


def main(argv: Sequence[str] | None = None) -> None:
    """Times one-step generation on the CPU or the GPU."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.e2e.bench_one_step", "Time one-step generation.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", help=f"folder, hub id or file; {RANDOM_SDXL}: SDXL with random weights")
    parser.add_argument("--true-width", action="store_true", help=f"the same as --model {RANDOM_SDXL}, in bfloat16")
    parser.add_argument("--size", type=int, help="side of the picture in pixels; default: the model's own")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on a GPU, else float32")
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    if arguments.size is not None and (arguments.size < 64 or arguments.size % 64):
        parser.error(f"--size is {arguments.size}; it must be a multiple of 64")
    machine.restart_with_warm_allocator("benchmarks.e2e.bench_one_step", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    clock = clock_for(arguments.device, quick=arguments.quick)
    results = command.start(arguments.out, arguments.device, clock, quick=arguments.quick)
    cuda = arguments.device == "cuda"
    request = Request(
        RANDOM_SDXL if arguments.true_width else arguments.model,
        arguments.dtype or ("bfloat16" if cuda or arguments.true_width else "float32"),
        size=arguments.size,
        batch=arguments.batch,
        graphs=cuda,
        compile=arguments.compile,
        rounds=3 if arguments.quick else arguments.rounds,
        budget_s=2.0 if arguments.quick else 20.0,
    )
    run([request], arguments.device, clock, results)
    raise SystemExit(command.finish(results))


if __name__ == "__main__":
    main()
