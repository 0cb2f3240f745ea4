"""One discriminator and one student step of a recipe on SDXL at full width, with random weights, on this machine.

    python -m sdxl_fast.testing.sdxl_scale sdxl_lightning_80gb
    python -m sdxl_fast.testing.sdxl_scale sdxl_add_80gb

256 px, bf16, one picture; prints one line of JSON: what the steps logged, the peak of resident memory and seconds.
Everything that trains is in bf16 here, to fit 24 GiB: the discriminator of SDXL-Lightning alone has 1.4 billion
parameters, which take 16 GB in float32 with gradients and one moment.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..diffusion import schedule
from ..models.conditioning import time_ids
from ..models.config import SDXL
from ..models.networks import skeleton
from ..train import stages
from ..train.add import AddTask
from ..train.bench import Bench
from ..train.config import AddConfig, LightningConfig, load_recipe
from ..train.lightning import AdversarialTask
from ..train.source import Condition

SIDE = 256
TOKENS, WIDTH, POOLED = 77, 2048, 1280
OVERRIDES = ["batch=1", "accumulate=1", "device=cpu", "frozen=bf16", "trained=bf16", "optimizer.kind=adamw_lean"]


@torch.no_grad()
def random_network(component: str, dtype: torch.dtype) -> Any:
    """A network of SDXL's shape: weights of variance 1 / fan-in, cut from one block of noise, for speed."""
    network = skeleton(component, SDXL.unet_arguments() if component == "unet" else SDXL.vae_arguments())
    network = network.to(dtype).to_empty(device="cpu")
    noise = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(dtype)
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim < 2:
                parameter.fill_(float(name == "weight"))
                continue
            flat = parameter.view(-1)
            for start in range(0, len(flat), len(noise)):
                part = flat[start : start + len(noise)]
                part.copy_(noise[: len(part)])
            flat.mul_(math.prod(parameter.shape[1:]) ** -0.5)
    return network.eval().requires_grad_(False)


class RandomSource:
    """Latents and conditions of the right shapes."""

    shapes = [(4, SIDE // 8, SIDE // 8)]  # noqa: RUF012

    def batch(
        self, count: int, share: slice, key: tuple[int | str, ...], images: int, *, text_of_next: bool
    ) -> tuple[Tensor, Condition]:
        draw = torch.Generator().manual_seed(images)
        latents = torch.randn(count, *self.shapes[0], generator=draw)
        return latents[share], {name: rows[share] for name, rows in condition(count, draw).items()}


def condition(count: int, draw: torch.Generator) -> Condition:
    """What the UNet is told of `count` pictures."""
    return {
        "prompt_embeds": torch.randn(count, TOKENS, WIDTH, generator=draw),
        "pooled": torch.randn(count, POOLED, generator=draw),
        "time_ids": time_ids(SIDE, SIDE, batch=count),
    }


def make_bench(config: Any) -> Bench[Any]:
    """What `train.bench.make_bench` loads, with random weights and no files."""
    base = random_network("unet", config.frozen_dtype)
    if config.gradient_checkpointing:
        base.enable_gradient_checkpointing()
    one = condition(1, torch.Generator().manual_seed(1))
    return Bench(
        config=config,
        base=base,
        vae=random_network("vae", torch.float32),
        source=RandomSource(),
        previews=one,
        prompts=one,
        prediction_type="epsilon",
        alphas_cumprod=schedule.alphas_cumprod(),
    )


def lightning_task(recipe: str, folder: Path) -> AdversarialTask:
    """The recipe's first phase against the conditional discriminator; the untrained base teaches, as a 32-step one."""
    lean = [f"{name}.kind=adamw_lean" for name in ("adversarial_optimizer", "discriminator_optimizer")]
    config = load_recipe(recipe, [*OVERRIDES, *lean])
    assert isinstance(config, LightningConfig)
    config = config.model_copy(update={"stages": config.stages[1:2], "guidance_scale": 1.0})
    bench = make_bench(config)
    lineage = stages.Lineage(bench, folder)
    stages.BASE_STEPS = 32
    task = stages.make_task(lineage.units[0], bench, lineage)
    assert isinstance(task, AdversarialTask)
    return task


def dinov2(folder: Path, width: int, layers: int, heads: int) -> str:
    """A DINOv2 of published shape with random weights."""
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, image_size=518, patch_size=14
    )
    Dinov2Model(config).save_pretrained(folder)
    return str(folder)


def add_task(recipe: str, folder: Path) -> AddTask:
    """The recipe with DINOv2 ViT-S as features and ViT-L as image encoder."""
    small, large = dinov2(folder / "small", 384, 12, 6), dinov2(folder / "large", 1024, 24, 16)
    networks = [f"feature_network={small}", f"image_encoder={large}", "discriminator_optimizer.kind=adamw_lean"]
    config = load_recipe(recipe, [*OVERRIDES, *networks])
    assert isinstance(config, AddConfig)
    return AddTask(config, folder, make_bench(config))


def _fingerprint(module: nn.Module) -> list[float]:
    """Of what trains."""
    return [p.detach().float().norm().item() for p in module.parameters() if p.requires_grad]


def main(recipe: str) -> dict[str, Any]:
    """Two steps, in which the LoRA's and the discriminator's weights must move, and the peak of memory."""
    with tempfile.TemporaryDirectory() as place:
        started = time.perf_counter()
        task: AdversarialTask | AddTask
        if "lightning" in recipe:
            task = lightning_task(recipe, Path(place))
            student: nn.Module = task.student.unet
        else:
            task = add_task(recipe, Path(place))
            student = task.student
        judge: nn.Module = task.discriminator
        built = time.perf_counter()
        before = _fingerprint(student), _fingerprint(judge)
        logged = {name: float(value) for name, value in task.step(0).items()}
        stepped = time.perf_counter()
        moved = [a != b for a, b in zip(before, (_fingerprint(student), _fingerprint(judge)), strict=True)]
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "recipe": recipe,
        "student_parameters": sum(p.numel() for p in student.parameters() if p.requires_grad),
        "discriminator_parameters": sum(p.numel() for p in judge.parameters() if p.requires_grad),
        "moved": moved,
        "logged": logged,
        "peak_gib": round(kilobytes / 2**20, 2),
        "seconds_to_build": round(built - started, 1),
        "seconds_of_the_steps": round(stepped - built, 1),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    print(json.dumps(main(sys.argv[1])))
