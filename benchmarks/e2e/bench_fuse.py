# SPDX-License-Identifier: Apache-2.0
"""What ``sdxl_fast.fuse`` gains on the CPU: ``python -m benchmarks.e2e.bench_fuse``.

The VAE's decoder, the UNet's forward, and forward and backward of the UNet with a squared error, as stock modules and
fused, both in both memory layouts; the faster of each are compared. An optimiser's step is left out: it is the same
code on either side.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command, machine, report
from benchmarks.command import Say, say
from benchmarks.gate import PEER_ULPS, Verdict
from benchmarks.results import ResultsFile
from benchmarks.suite import GATE_FAILED, LAYOUTS
from benchmarks.timing import clock_for, interleave, quotient, summarise
from sdxl_fast import fuse
from sdxl_fast.models import loading
from sdxl_fast.testing.compare import K_FORWARD, K_GRADIENT, error_scale

# Times the speed of stock modules in their faster layout.
TARGETS = {"vae decode": 1.2, "unet forward": 1.1, "training step": 1.0}
STOCK, FUSED = "stock", "fused"
BATCHES = (1, 8)

Run = Callable[[Any, dict[str, Any]], Tensor]


@dataclass(frozen=True)
class Request:
    """What to time: a folder or hub id (None for the embedded pipeline), the batch, and how often."""

    model: str | None = None
    batch: int = 1
    rounds: int = 11
    budget_s: float = 10.0

    def key(self) -> dict[str, str]:
        """Returns the entries that tell its row from others."""
        name = "embedded pipeline" if self.model is None else Path(self.model).name
        return {"model": name, "case": f"batch {self.batch}", "dtype": "float32", "mode": "fuse"}


def _decode(vae: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        pixels: Tensor = vae.decode(inputs["sample"]).sample
    return pixels


def _predict(unet: Any, inputs: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return _forward(unet, inputs)


def _forward(unet: Any, inputs: dict[str, Any]) -> Tensor:
    y: Tensor = unet(**{k: v for k, v in inputs.items() if k != "wanted"}, return_dict=False)[0]
    return y


def _train(unet: Any, inputs: dict[str, Any]) -> Tensor:
    """Returns the first convolution's gradient, to which all of the backward leads."""
    unet.zero_grad(set_to_none=True)
    (_forward(unet, inputs) - inputs["wanted"]).square().mean().backward()
    gradient: Tensor = unet.conv_in.weight.grad
    return gradient


def _inputs(folder: Path, config: Any, batch: int) -> dict[str, Any]:
    """Draws what the UNet takes; its latents serve the VAE too."""
    generator = torch.Generator().manual_seed(0)
    tokens = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())["model_max_length"]
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    latents = (batch, config.in_channels, config.sample_size, config.sample_size)
    return {
        "sample": normal(*latents),
        "wanted": normal(*latents),
        "timestep": torch.full((batch,), 999),
        "encoder_hidden_states": normal(batch, tokens, config.cross_attention_dim),
        "added_cond_kwargs": {"text_embeds": normal(batch, pooled), "time_ids": torch.full((batch, 6), 64.0)},
    }


def _placed(value: Any, layout: torch.memory_format, dtype: torch.dtype) -> Any:
    if isinstance(value, dict):
        return {k: _placed(v, layout, dtype) for k, v in value.items()}
    value = value.to(dtype) if value.is_floating_point() else value
    return value.contiguous(memory_format=layout) if value.ndim == 4 else value


def _arrangements(network: nn.Module, *, training: bool) -> dict[str, tuple[nn.Module, torch.memory_format]]:
    """Returns the contestants: a network and the layout of its maps."""
    found = {
        f"{STOCK} {name}": (copy.deepcopy(network).to(memory_format=layout), layout) for name, layout in LAYOUTS.items()
    }
    for name, layout in LAYOUTS.items():
        fused = copy.deepcopy(network).to(memory_format=layout)
        fuse(fused, training=training)
        found[f"{FUSED} {name}"] = (fused, layout)
    return found


class _Calls:
    """One contestant in one stage."""

    def __init__(self, run: Run, network: nn.Module, inputs: dict[str, Any]) -> None:
        self._run, self._network, self._inputs = run, network, inputs

    def __call__(self) -> Tensor:
        return self._run(self._network, self._inputs)


def _judge(run: Run, network: nn.Module, calls: dict[str, _Calls], inputs: dict[str, Any]) -> dict[str, Verdict]:
    """Compares with stock in float64; twice the error of stock, of gradients three times, is allowed."""
    wanted = run(copy.deepcopy(network).double(), _placed(inputs, torch.contiguous_format, torch.float64))
    errors = {name: error_scale(call(), wanted).relative for name, call in calls.items()}
    factor = K_GRADIENT if run is _train else K_FORWARD
    bound = factor * max(error for name, error in errors.items() if not name.startswith(FUSED))
    bound += PEER_ULPS * torch.finfo(torch.float32).eps
    return {name: Verdict(e <= bound, f"relative L2 {e:.2g}, bound {bound:.2g}") for name, e in errors.items()}


def _stage(run: Run, network: nn.Module, inputs: dict[str, Any], request: Request) -> dict[str, Any]:
    """Returns by contestant its samples, or why it was refused, and the verdict of the gate."""
    arranged = _arrangements(network, training=run is _train)
    calls = {name: _Calls(run, n, _placed(inputs, layout, torch.float32)) for name, (n, layout) in arranged.items()}
    gates = _judge(run, network, calls, inputs)
    clock = clock_for("cpu")
    timed = {name: clock.prepare([call]) for name, call in calls.items() if gates[name].passed}
    samples = interleave(timed, rounds=request.rounds, budget_s=request.budget_s)
    return {name: {"gate": gate, "samples": samples.get(name)} for name, gate in gates.items()}


def _fastest(found: dict[str, Any], kind: str) -> Any:
    """Returns the samples of the faster layout of stock or of fused modules, None if both were refused."""
    timed = [result["samples"] for name, result in found.items() if name.startswith(kind) and result["samples"]]
    return min(timed, key=lambda samples: summarise(samples).median, default=None)


def measure(request: Request) -> dict[str, Any]:
    """Returns the row of a request: by contestant and stage the seconds, and how many times stock's speed ours is."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    folder = loading.resolve(request.model)
    unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet").eval()
    vae = AutoencoderKL.from_pretrained(folder, subfolder="vae").eval()
    inputs = _inputs(folder, unet.config, request.batch)
    stages: dict[str, tuple[Run, nn.Module]] = {
        "vae decode": (_decode, vae),
        "unet forward": (_predict, unet),
        "training step": (_train, unet),
    }
    contestants: dict[str, dict[str, Any]] = {}
    ratios = {}
    for stage, (run, network) in stages.items():
        found = _stage(run, network, inputs, request)
        for name, result in found.items():
            entry = contestants.setdefault(name, {"stages": {}, "gate": ""})
            gate: Verdict = result["gate"]
            entry["gate"] += f"{'; ' if entry['gate'] else ''}{stage}: {gate.detail}"
            if gate.passed:
                entry["stages"][stage] = summarise(result["samples"]).as_dict()
            else:
                entry["refused"] = f"{GATE_FAILED}: {stage}: {gate.detail}"
        ours, stock = _fastest(found, FUSED), _fastest(found, STOCK)
        if ours and stock:
            ratios[stage] = quotient(stock, ours).as_dict()
    targets = [{"stage": stage, "speedup": speedup} for stage, speedup in TARGETS.items()]
    about = "Modules as diffusers has them and fused; the training step is forward, squared error and backward."
    return {**request.key(), "about": about, "contestants": contestants, "ratios": ratios, "targets": targets}


def run(requests: Sequence[Request], results: ResultsFile, *, tell: Say = say) -> None:
    """Times requests one after the other, writing each as it is done."""
    for request in requests:
        if results.find("end_to_end", request.key()) is None:
            row = measure(request)
            results.put("end_to_end", row)
            tell(report.model_text(row) + "\n")


def main(argv: Sequence[str] | None = None) -> None:
    """Times fused against stock modules on the CPU."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.e2e.bench_fuse", "Time stock and fused modules side by side.")
    parser.add_argument("--model", help="a diffusers folder; default: the embedded pipeline")
    parser.add_argument("--batch", type=int, action="append", help="may be repeated; default: 1 and 8")
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    machine.restart_with_warm_allocator("benchmarks.e2e.bench_fuse", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    results = command.start(arguments.out, "cpu", clock_for("cpu", quick=arguments.quick), quick=arguments.quick)
    rounds, budget = (3, 0.5) if arguments.quick else (arguments.rounds, 10.0)
    run([Request(arguments.model, batch, rounds, budget) for batch in arguments.batch or BATCHES], results)
    raise SystemExit(command.finish(results))


if __name__ == "__main__":
    main()
