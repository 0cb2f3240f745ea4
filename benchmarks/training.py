# SPDX-License-Identifier: Apache-2.0
"""The cost of training: ``python -m benchmarks.training``.

One discriminator and one student step of SDXL-Lightning on the embedded model's architecture with random weights: this
package's, and a plain loop of diffusers and peft in both memory layouts. Each runs in processes of its own, which take
turns, so that a peak of memory is one's own and a disturbed minute hits all.

    python -m benchmarks.training                              # on the CPU
    python -m benchmarks.training --device cuda --model sdxl   # SDXL's configuration, one GPU of 80 GB
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import command, machine, report
from benchmarks.gate import Verdict
from benchmarks.plain_training import PlainLoop, Start
from benchmarks.results import ResultsFile
from benchmarks.suite import GATE_FAILED
from benchmarks.timing import clock_for, kernel_seconds, quotient, summarise
from benchmarks.training_ground import STEPS, Ground, Scene
from sdxl_fast.diffusion import schedule
from sdxl_fast.text import one_line
from sdxl_fast.train.lightning import AdversarialTask

OURS = "sdxl_fast"
MODELS = {"embedded": "embedded architecture, random weights", "sdxl": "SDXL's configuration, random weights"}
PLAIN = {"diffusers + peft, contiguous": False, "diffusers + peft, channels-last": True}
COMPILED = "sdxl_fast, compiled"
NAMES = (OURS, *PLAIN)
TIMED = "D step and student step"
BATCHES = {"embedded": 48, "sdxl": 1}
QUICK = {"rounds": 1, "steps": 1, "batch": 4}  # at most, to try the code
BOUND = 1e-3  # of the gate, relative L2 in float32
# Times the speed of the faster plain loop, and the share of the leaner one's memory, by model.
SPEEDUP = {"embedded": 1.1, "sdxl": 1.5}
MEMORY = {"sdxl": 0.7}
BUSY = 0.9  # with less of a step in kernels the GPU waits for the host
MIB = 2**20


def _with_weights_of(task: AdversarialTask, loop: PlainLoop) -> PlainLoop:
    loop.student.load_state_dict(task.student.unet.state_dict())
    loop.discriminator.load_state_dict({_plain(key): value for key, value in task.discriminator.state_dict().items()})
    return loop


def _plain(key: str) -> str:
    """The peer's name of a parameter of the discriminator."""
    return key.removeprefix("encoder.").removeprefix("head.")


def _starts(task: AdversarialTask, use: str) -> Start:
    found = task.start(0, use)
    return Start(found.x_t, found.t, dict(found.condition))


def _gradients(loss: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    return torch.cat([g.flatten().double() for g in torch.autograd.grad(loss, list(parameters))])


def gate(device: str = "cpu") -> dict[str, Verdict]:
    """Both losses and their gradients in float32 from the same weights and batches; ours is the measure of each peer.

    On the embedded architecture. The LoRA is given values, without which half of its gradients are zero.
    """
    machine.full_float32()
    ground = Ground.lay(Scene(device=device), "precision=fp32", "batch=4")
    other = copy.deepcopy(ground)  # ours fuses and lays out the very networks
    task = ground.ours()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for name, parameter in task.student.unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))  # drawn on the CPU
    judging = [p for p in task.discriminator.parameters() if p.requires_grad]
    learning = [p for p in task.student.unet.parameters() if p.requires_grad]
    with sdpa_kernel(SDPBackend.MATH):
        ours = {
            "D": _gradients(task._discriminator_loss(0)[0], judging),
            "student": _gradients(task._student_loss(0)[0], learning),
        }
    starts = {"D": _starts(task, "discriminator"), "student": _starts(task, "student")}
    named = [name for name, p in task.student.unet.named_parameters() if p.requires_grad]
    judged = [_plain(name) for name, p in task.discriminator.named_parameters() if p.requires_grad]
    verdicts = {}
    for contestant, channels_last in PLAIN.items():
        loop = _with_weights_of(task, other.plain(channels_last=channels_last))
        d, student = dict(loop.discriminator.named_parameters()), dict(loop.student.named_parameters())
        theirs = {
            "D": _gradients(loop.d_loss(starts["D"]), [d[name] for name in judged]),
            "student": _gradients(loop.g_loss(starts["student"]), [student[name] for name in named]),
        }
        errors = {name: float((theirs[name] - ours[name]).norm() / ours[name].norm()) for name in ours}
        said = ", ".join(f"{name} {error:.1e}" for name, error in errors.items())
        verdicts[contestant] = Verdict(max(errors.values()) <= BOUND, f"gradients {said} of {BOUND:g}")
    verdicts[OURS] = Verdict(
        all(v.passed for v in verdicts.values()), "gradients as the plain loops'" if verdicts else "no peer"
    )
    return verdicts


def peak_bytes() -> int:
    """The most memory that this process has held; getrusage would begin with what its parent held."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def child(name: str, steps: int, batch: int, threads: int, scene: Scene) -> dict[str, Any]:
    """Times one contestant in this process: seconds of each pair of steps, and the peak of memory over the imports.

    On a GPU the peak is of the memory that torch has handed out there; "kernel_seconds" is what one more pair of steps
    computes.
    """
    torch.set_num_threads(threads)
    before = peak_bytes()
    ground = Ground.lay(scene, f"batch={batch}")
    source, on_gpu = ground.source, scene.device == "cuda"
    attention: Any = contextlib.nullcontext()
    run: Callable[[int], Any]
    if name in (OURS, COMPILED):
        attention = attention if on_gpu else sdpa_kernel(SDPBackend.MATH)  # as `trainer.fit` has it
        run = ground.ours(compiled=name == COMPILED).step
        del ground
    else:
        loop = ground.plain(channels_last=PLAIN[name])
        grid, alphas, images_seen = (
            torch.tensor(schedule.trailing_timesteps(STEPS)),
            loop.alphas.cpu(),
            itertools.count(),
        )
        del ground

        def draw() -> Start:
            latents, text = source.batch(batch, slice(None), ("plain",), next(images_seen), text_of_next=False)
            t = grid[torch.randint(len(grid), (batch,))]
            a, noise = alphas[t][:, None, None, None], torch.randn_like(latents)
            pure = (t == len(alphas) - 1)[:, None, None, None]
            x_t = torch.where(pure, noise, a.sqrt() * latents + (1 - a).sqrt() * noise)
            told = {key: rows.to(scene.device) for key, rows in text.items()}
            return Start(x_t.to(scene.device), t.to(scene.device), told)

        def run(images: int) -> Any:
            loop.step(draw)

    seconds = []
    with attention:
        for index in range(steps + 2):
            started = time.perf_counter()
            run(index * batch)
            if on_gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() if on_gpu else peak_bytes() - before
        kernels = {"kernel_seconds": kernel_seconds(lambda: run((steps + 2) * batch))} if on_gpu else {}
    return {"seconds": seconds[2:], "memory_bytes": peak, **kernels}


def _in_a_process(name: str, steps: int, batch: int, threads: int, scene: Scene) -> dict[str, Any]:
    arguments = ["--child", name, "--steps", str(steps), "--batch", str(batch), "--threads", str(threads)]
    arguments += ["--model", scene.model, "--device", scene.device, *(["--recompute"] if scene.recompute else [])]
    done = subprocess.run([sys.executable, "-m", "benchmarks.training", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-200:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(
    *,
    threads: int,
    rounds: int = 4,
    steps: int = 8,
    batch: int = 48,
    scene: Scene | None = None,
    compiled: bool = False,
) -> dict[str, Any]:
    """The row of the results file: seconds per pair of steps and peak of memory of each contestant.

    Args:
        threads: of each process.
        rounds: processes of each contestant, which take turns.
        steps: timed in each, after two that are not.
        batch: pictures per step.
        scene: None is the embedded model on the CPU.
        compiled: whether ours by torch.compile takes part, as it always does on a GPU.
    """
    scene = scene or Scene()
    verdicts = gate(scene.device)
    if compiled or scene.device == "cuda":
        verdicts[COMPILED] = verdicts[OURS]
    refused = {name: f"{GATE_FAILED}: {verdict.detail}" for name, verdict in verdicts.items() if not verdict.passed}
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in verdicts}
    for _ in range(rounds):
        for name in runs:
            if name not in refused:
                try:
                    runs[name].append(_in_a_process(name, steps, batch, threads, scene))
                except RuntimeError as error:  # out of memory, say: the others go on
                    refused[name] = one_line(error)
    seconds = {name: [s for run in found for s in run["seconds"]] for name, found in runs.items()}
    contestants: dict[str, Any] = {}
    for name, verdict in verdicts.items():
        contestants[name] = {"stages": {}, "gate": verdict.detail}
        if name in refused:
            contestants[name]["refused"] = refused[name]
        else:
            contestants[name] |= _entry(runs[name], seconds[name])
    return {
        **key(scene, batch),
        **{"about": about(contestants), "contestants": contestants},
        **judged(scene.model, seconds, contestants),
    }


def key(scene: Scene, batch: int) -> dict[str, str]:
    """The entries that tell a row from others."""
    mode = "SDXL-Lightning, LoRA, D" + (", recomputing" if scene.recompute else "")
    return {"model": MODELS[scene.model], "case": f"batch {batch}", "dtype": "bfloat16 autocast", "mode": mode}


def _entry(runs: Sequence[Mapping[str, Any]], seconds: Sequence[float]) -> dict[str, Any]:
    """What the runs of a contestant come to."""
    time = summarise(seconds)
    found = {"stages": {TIMED: time.as_dict()}, "memory_bytes": max(run["memory_bytes"] for run in runs)}
    if "kernel_seconds" in runs[0]:
        found["kernel_share"] = min(run["kernel_seconds"] for run in runs) / time.median
    return found


def judged(model: str, seconds: dict[str, list[float]], contestants: dict[str, Any]) -> dict[str, Any]:
    """How many times the faster plain loop's speed the faster of ours is, and what is to be reached."""
    timed = [name for name, found in contestants.items() if "memory_bytes" in found]

    def best(names: list[str]) -> str | None:
        return min(names, key=lambda name: summarise(seconds[name]).median, default=None)

    plain, ours = best([n for n in timed if n in PLAIN]), best([n for n in timed if n not in PLAIN])
    if plain is None or ours is None:
        return {"ratios": {}, "targets": []}
    least = SPEEDUP[model]
    what = f"a step at least {least:g} times the faster plain loop's"
    targets: list[dict[str, Any]] = [{"stage": TIMED, "speedup": least, "what": what}]
    if model in MEMORY:
        lean = min((n for n in timed if n in PLAIN), key=lambda name: contestants[name]["memory_bytes"])
        targets.append({"contestant": ours, "memory_of": lean, "share": MEMORY[model]})
    return {"ratios": {TIMED: quotient(seconds[plain], seconds[ours]).as_dict()}, "targets": targets}


def about(contestants: dict[str, Any]) -> str:
    """The peaks of memory, and ours as a share of the leaner plain loop's."""
    held = {name: found["memory_bytes"] for name, found in contestants.items() if "memory_bytes" in found}
    plain, ours = ([n for n in held if (n in PLAIN) is peer] for peer in (True, False))
    if not plain or not ours:
        return "Nothing to compare: a gate failed."
    share = min(held[name] for name in ours) / min(held[name] for name in plain)
    said = ", ".join(f"{name} {size / MIB:.0f} MiB" for name, size in held.items())
    return (
        f"Peaks of memory over the imports: {said}; ours over the leaner plain one {share:.2f}. Ours also averages "
        "the weights where the recipe hands the average on." + _busy(contestants)
    )


def _busy(contestants: dict[str, Any]) -> str:
    """How much of a step's wall clock the GPU computes, and whom it waits for."""
    shares = {name: found["kernel_share"] for name, found in contestants.items() if "kernel_share" in found}
    late = {name: " (waits for the host)" if share < BUSY else "" for name, share in shares.items()}
    said = ", ".join(f"{name} {share:.0%}{late[name]}" for name, share in shares.items())
    return f" Of a step's time the GPU computes: {said}." if said else ""


def main(argv: Sequence[str] | None = None) -> None:
    """Times training, on the CPU unless told otherwise."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.training", "Time the training steps of SDXL-Lightning.")
    parser.add_argument("--batch", type=int, help="pictures per step; default: 48, and 1 of SDXL's size")
    parser.add_argument("--steps", type=int, default=8, help="timed in each process")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--model", choices=tuple(MODELS), default="embedded", help="sdxl needs a GPU of 80 GB")
    parser.add_argument("--recompute", action="store_true", help="gradient checkpointing on both sides, of sdxl")
    parser.add_argument("--child", choices=(*NAMES, COMPILED), help=argparse.SUPPRESS)
    parser.set_defaults(rounds=4)
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    device, threads = arguments.device, arguments.threads
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda, but torch finds no CUDA GPU here")
    if arguments.recompute and arguments.model != "sdxl":
        parser.error("--recompute is for --model sdxl")
    scene = Scene(arguments.model, device, arguments.recompute)
    batch = arguments.batch or BATCHES[arguments.model]
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.steps, batch, threads, scene)))
        return
    if device == "cpu":
        machine.restart_with_warm_allocator("benchmarks.training", given, threads)
    torch.set_num_threads(threads)
    results = command.start(arguments.out, device, clock_for(device, quick=arguments.quick), quick=arguments.quick)
    lengths = {"rounds": arguments.rounds, "steps": arguments.steps, "batch": batch}
    if arguments.quick:
        lengths = {name: min(length, QUICK[name]) for name, length in lengths.items()}
    write(results, measure(threads=threads, **lengths, scene=scene, compiled=arguments.compile))
    raise SystemExit(command.finish(results))


def write(results: ResultsFile, row: dict[str, Any]) -> None:
    """Puts the row into the file and on the terminal."""
    results.put("end_to_end", row)
    command.say(report.model_text(row) + "\n")


if __name__ == "__main__":
    main()
