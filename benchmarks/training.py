# SPDX-License-Identifier: Apache-2.0
"""The cost of training: ``python -m benchmarks.training``.

One discriminator and one student step of SDXL-Lightning on the embedded model's architecture with random weights: this
package's, and a plain loop of diffusers and peft in both memory layouts. Each runs in processes of its own, which take
turns, so that a peak of memory is one's own and a disturbed minute hits all.
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import command, machine, report
from benchmarks.gate import Verdict
from benchmarks.plain_training import PlainLoop, Setting, Start
from benchmarks.results import ResultsFile
from benchmarks.suite import GATE_FAILED
from benchmarks.timing import clock_for, summarise
from sdxl_fast.diffusion import schedule
from sdxl_fast.models.conditioning import time_ids
from sdxl_fast.models.config import build_unet
from sdxl_fast.models.discriminators import LightningDiscriminator, UNetEncoder
from sdxl_fast.nn import fuse
from sdxl_fast.train.bench import Bench
from sdxl_fast.train.config import AdversarialPhase, LightningConfig, TeacherConfig, load_recipe
from sdxl_fast.train.lightning import AdversarialTask, Student, Teacher
from sdxl_fast.train.source import Condition
from sdxl_fast.train.students import add_lora

OURS = "sdxl_fast"
PLAIN = {"diffusers + peft, contiguous": False, "diffusers + peft, channels-last": True}
NAMES = (OURS, *PLAIN)
TIMED = "D step and student step"
STAGE, STEPS, TEACHER_STEPS = "4-step", 4, 8
BOUND = 1e-3  # of the gate, relative L2 in float32
MIB = 2**20


class RandomSource:
    """Latents and texts of the embedded model's shapes, a function of the number of images."""

    def __init__(self, teacher: TeacherConfig) -> None:
        pipeline = teacher.pipeline
        self.shapes = [(pipeline.vae.latent_channels, pipeline.latent_size, pipeline.latent_size)]
        self.tokens, self.pooled = pipeline.max_tokens, pipeline.text_encoder_2.projection
        self.width, self.side = pipeline.text_encoder.width + pipeline.text_encoder_2.width, pipeline.image_size

    def condition(self, count: int, draw: torch.Generator) -> Condition:
        """What a UNet is told of `count` pictures."""
        return {
            "prompt_embeds": torch.randn(count, self.tokens, self.width, generator=draw),
            "pooled": torch.randn(count, self.pooled, generator=draw),
            "time_ids": time_ids(self.side, self.side, batch=count),
        }

    def batch(
        self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool
    ) -> tuple[Tensor, Condition]:
        """As `train.source.Source`."""
        draw = torch.Generator().manual_seed(images)
        latents = torch.randn(count, *self.shapes[0], generator=draw)
        return latents[share], {name: rows[share] for name, rows in self.condition(count, draw).items()}


@dataclass
class Ground:
    """What both loops start from: two UNets with random weights, data, and the recipe's 4-step LoRA phase against D."""

    config: LightningConfig
    base: Any
    teacher: Any
    source: RandomSource

    @classmethod
    def lay(cls, *settings: str) -> Ground:
        """Of the embedded recipe with overrides."""
        config, teacher = load_recipe("emoji_lightning", ["device=cpu", *settings]), load_recipe("emoji_teacher")
        assert isinstance(config, LightningConfig) and isinstance(teacher, TeacherConfig)
        torch.manual_seed(0)
        base, other = (build_unet(teacher.pipeline).requires_grad_(False) for _ in range(2))
        return cls(config, base, other, RandomSource(teacher))

    @property
    def phase(self) -> AdversarialPhase:
        """In which the student learns from the first step on."""
        found = next(stage for stage in self.config.stages if stage.name == STAGE).phases[0]
        return found.model_copy(update={"d_warmup": 0})

    @property
    def side(self) -> int:
        """Of the discriminator's feature maps."""
        return int(self.source.shapes[0][1] >> (len(self.base.config.down_block_types) - 1))

    def ours(self) -> AdversarialTask:
        """The networks as the trainer assembles them."""
        config, base = self.config, self.base.to(memory_format=torch.channels_last)
        one = self.source.condition(1, torch.Generator().manual_seed(1))
        bench: Bench[LightningConfig] = Bench(
            **{"config": config, "base": base, "vae": None, "source": self.source, "previews": one, "prompts": one},
            **{"prediction_type": "epsilon", "alphas_cumprod": schedule.alphas_cumprod()},
        )
        network, taught = bench.frozen_base(), bench.froze(self.teacher.to(memory_format=torch.channels_last))
        add_lora(network, config)
        d = LightningDiscriminator(UNetEncoder(base), conditional=True, side=self.side)
        for unet in (network, taught, d.encoder.unet):
            fuse(unet)
        student = Student(bench, network, "epsilon", STEPS, tuple(schedule.trailing_timesteps(STEPS)))
        stride = schedule.NUM_TRAIN_TIMESTEPS / TEACHER_STEPS
        return AdversarialTask(student, Teacher(bench, taught, stride), TEACHER_STEPS // STEPS, d, self.phase)

    def plain(self, *, channels_last: bool) -> PlainLoop:
        """The peer, with copies of the networks."""
        config, phase, total = self.config, self.phase, schedule.NUM_TRAIN_TIMESTEPS
        rate, d_rate = config.adversarial_optimizer, config.discriminator_optimizer
        setting = Setting(
            **{"rank": config.lora_rank, "targets": list(config.lora_targets), "bf16": config.precision == "bf16"},
            **{"stride": total // STEPS, "teacher_stride": total // TEACHER_STEPS},
            **{"lr": phase.lr or rate.lr, "d_lr": phase.d_lr or d_rate.lr, "max_grad_norm": rate.max_grad_norm},
        )
        alphas = schedule.alphas_cumprod()
        return PlainLoop(self.base, self.teacher, alphas, setting, channels_last=channels_last, side=self.side)


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


def gate() -> dict[str, Verdict]:
    """Both losses and their gradients in float32 from the same weights and batches; ours is the measure of each peer.

    The LoRA is given values, without which half of its gradients are zero.
    """
    ground = Ground.lay("precision=fp32", "batch=4")
    other = copy.deepcopy(ground)  # ours fuses and lays out the very networks
    task = ground.ours()
    with torch.no_grad():
        draw = torch.Generator().manual_seed(2)
        for name, parameter in task.student.unet.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=draw))
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


def child(name: str, steps: int, batch: int, threads: int) -> dict[str, Any]:
    """Times one contestant in this process: seconds of each pair of steps, and the peak of memory over the imports."""
    torch.set_num_threads(threads)
    before = peak_bytes()
    ground = Ground.lay(f"batch={batch}")
    source = ground.source
    attention: Any = contextlib.nullcontext()
    run: Callable[[int], Any]
    if name == OURS:
        attention = sdpa_kernel(SDPBackend.MATH)  # as `trainer.fit` has it on a CPU
        run = ground.ours().step
    else:
        loop = ground.plain(channels_last=PLAIN[name])
        grid, alphas, images_seen = torch.tensor(schedule.trailing_timesteps(STEPS)), loop.alphas, itertools.count()
        del ground

        def draw() -> Start:
            latents, text = source.batch(batch, slice(None), ("plain",), next(images_seen), text_of_next=False)
            t = grid[torch.randint(len(grid), (batch,))]
            a, noise = alphas[t][:, None, None, None], torch.randn_like(latents)
            pure = (t == len(alphas) - 1)[:, None, None, None]
            return Start(torch.where(pure, noise, a.sqrt() * latents + (1 - a).sqrt() * noise), t, text)

        def run(images: int) -> Any:
            loop.step(draw)

    seconds = []
    with attention:
        for index in range(steps + 2):
            started = time.perf_counter()
            run(index * batch)
            seconds.append(time.perf_counter() - started)
    return {"seconds": seconds[2:], "peak_bytes": peak_bytes() - before}


def _in_a_process(name: str, steps: int, batch: int, threads: int) -> dict[str, Any]:
    arguments = ["--child", name, "--steps", str(steps), "--batch", str(batch), "--threads", str(threads)]
    done = subprocess.run([sys.executable, "-m", "benchmarks.training", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} ended with {done.returncode}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(*, rounds: int, steps: int, batch: int, threads: int) -> dict[str, Any]:
    """The row of the results file: seconds per pair of steps and peak of memory of each contestant.

    Args:
        rounds: processes of each contestant, which take turns.
        steps: timed in each, after two that are not.
        batch: pictures per step.
        threads: of each process.
    """
    verdicts = gate()
    seconds: dict[str, list[float]] = {name: [] for name in NAMES}
    peaks: dict[str, list[int]] = {name: [] for name in NAMES}
    for _ in range(rounds):
        for name in NAMES:
            if verdicts[name].passed:
                found = _in_a_process(name, steps, batch, threads)
                seconds[name] += found["seconds"]
                peaks[name].append(found["peak_bytes"])
    contestants: dict[str, Any] = {}
    for name, verdict in verdicts.items():
        contestants[name] = {"stages": {}, "gate": verdict.detail, "refused": f"{GATE_FAILED}: {verdict.detail}"}
        if verdict.passed:
            stages = {TIMED: summarise(seconds[name]).as_dict()}
            contestants[name] = {"stages": stages, "gate": verdict.detail, "peak_bytes": max(peaks[name])}
    return {
        **{"model": "embedded architecture, random weights", "case": f"batch {batch}", "dtype": "bfloat16 autocast"},
        **{"mode": "SDXL-Lightning, LoRA, D", "about": about(contestants), "contestants": contestants},
    }


def about(contestants: dict[str, Any]) -> str:
    """What the numbers come to: against the faster and against the leaner plain layout."""
    timed = {name: found for name, found in contestants.items() if "peak_bytes" in found}
    peers = [found for name, found in timed.items() if name != OURS]
    if OURS not in timed or not peers:
        return "Nothing to compare: a gate failed."
    mine = timed[OURS]
    best = min(found["stages"][TIMED]["best"] for found in peers)
    lean = min(found["peak_bytes"] for found in peers)
    speed = best / mine["stages"][TIMED]["best"]
    memory = ", ".join(f"{name} {found['peak_bytes'] / MIB:.0f} MiB" for name, found in timed.items())
    return (
        f"Best of the plain layouts over ours, by best samples: {speed:.2f} in time. Peaks of memory over the imports: "
        f"{memory}; ours over the leaner plain one {mine['peak_bytes'] / lean:.2f}. Ours also averages the weights."
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Times training on the CPU."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = command.parser("benchmarks.training", "Time the training steps of SDXL-Lightning on the CPU.")
    parser.add_argument("--batch", type=int, default=48, help="pictures per step; the recipe's by default")
    parser.add_argument("--steps", type=int, default=8, help="timed in each process")
    parser.add_argument("--child", choices=NAMES, help=argparse.SUPPRESS)
    parser.set_defaults(rounds=4)
    arguments = parser.parse_args(given)
    command.check(parser, arguments)
    if arguments.child:
        print(json.dumps(child(arguments.child, arguments.steps, arguments.batch, arguments.threads)))
        return
    machine.restart_with_warm_allocator("benchmarks.training", given, arguments.threads)
    torch.set_num_threads(arguments.threads)
    results = command.start(arguments.out, "cpu", clock_for("cpu", quick=arguments.quick), quick=arguments.quick)
    rounds, steps, batch = (1, 1, 4) if arguments.quick else (arguments.rounds, arguments.steps, arguments.batch)
    write(results, measure(rounds=rounds, steps=steps, batch=batch, threads=arguments.threads))
    raise SystemExit(command.finish(results))


def write(results: ResultsFile, row: dict[str, Any]) -> None:
    """Puts the row into the file and on the terminal."""
    results.put("end_to_end", row)
    command.say(report.model_text(row) + "\n")


if __name__ == "__main__":
    main()
