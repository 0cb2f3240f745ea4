"""Random calls one after the other: no wrong picture, no growth of memory, nothing stale.

The default run makes a few dozen, the slow one as many as `--soak-calls` says.
"""

from __future__ import annotations

import gc
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_fast import OneStepPipeline
from sdxl_fast.models.lora_file import LoraFile, Pair, write_lora_file
from sdxl_fast.models.weights import Lazy
from sdxl_fast.testing.toy import random_lora

PROMPTS = ("cat", "red apple", "guitar, music", "sun behind cloud", "a house with a garden", "sailboat " * 60)
SIDES = (16, 24, 32, 40, 48)


def _lora(path: Path, unet: Any, seed: int) -> Path:
    torch.manual_seed(seed)
    pairs = {f"unet.{n}": Pair(Lazy.of(d), Lazy.of(u), 4.0) for n, (d, u) in random_lora(unet, rank=4).items()}
    write_lora_file(path, LoraFile(pairs, {}), "peft")
    return path


def _call(draw: random.Random) -> dict[str, Any]:
    """Arguments of one call; the same ones always draw the same picture."""
    prompts = draw.sample(PROMPTS, draw.choice((1, 1, 1, 2, 3)))
    call: dict[str, Any] = {
        "prompt": prompts,
        "seed": [draw.randrange(5) for _ in prompts],
        "num_inference_steps": draw.choice((1, 1, 2, 4)),
        "height": draw.choice(SIDES),
        "width": draw.choice(SIDES),
        "output_type": "np",
    }
    if draw.random() < 0.2:
        call |= {"image": torch.full((1, 3, 32, 32), draw.random()), "strength": draw.choice((0.3, 1.0))}
    return call


def _live_tensors() -> int:
    gc.collect()
    return sum(t.numel() * t.element_size() for t in gc.get_objects() if type(t) in (torch.Tensor, torch.nn.Parameter))


def _soak(folder: Path, loras: dict[str, Path], calls: int) -> None:
    pipe = OneStepPipeline.from_pretrained(folder, device="cpu")
    for name, path in loras.items():
        pipe.load_lora_weights(path, name, weight=0.0)
    draw, known = random.Random(0), {}
    mixtures = ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.5, 0.5))
    mixture, level = mixtures[0], 0
    for index in range(calls):
        what = draw.random()
        if what < 0.1:
            mixture = draw.choice(mixtures)
            pipe.set_adapters(list(loras), list(mixture))
        elif what < 0.15:
            with pytest.raises(ValueError, match="multiples of 4"):
                pipe("cat", height=33)
        elif what < 0.2:
            pipe("cat", seed=0, num_inference_steps=4, callback_on_step_end=_stop_at(draw.randrange(4)))
        call = _call(draw)
        key = (str(call), mixture)
        picture = pipe(**call).images
        assert np.isfinite(picture).all()
        if key in known:
            assert np.abs(picture - known[key]).max() < 0.25 / 255, f"call {index} differs from an earlier one like it"
        known[key] = picture.copy()  # the array shows a tensor, which would count as held
        if index == min(100, calls // 2):
            level = _live_tensors() - pipe.memory_report()["prompts"]
    assert _live_tensors() - pipe.memory_report()["prompts"] <= 1.02 * level + (1 << 18)
    fresh = OneStepPipeline.from_pretrained(folder, device="cpu")
    pipe.unload_lora_weights()
    last = {**_call(draw), "output_type": "np"}
    assert np.abs(pipe(**last).images - fresh(**last).images).max() < 0.25 / 255


def _stop_at(step: int) -> Any:
    def stop(pipe: Any, index: int, timestep: int, tensors: Any) -> Any:
        pipe._interrupt = index == step
        return tensors

    return stop


@pytest.fixture(scope="module")
def loras(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    unet = OneStepPipeline.from_pretrained(toy_folder, device="cpu").unet
    folder = tmp_path_factory.mktemp("loras")
    return {name: _lora(folder / f"{name}.safetensors", unet, seed) for seed, name in enumerate(("a", "b"))}


@pytest.mark.filterwarnings("ignore:the prompt beginning")
def test_a_few_random_calls(toy_folder: Path, loras: dict[str, Path]) -> None:
    _soak(toy_folder, loras, 30)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the prompt beginning")
def test_many_random_calls(toy_folder: Path, loras: dict[str, Path], pytestconfig: pytest.Config) -> None:
    _soak(toy_folder, loras, pytestconfig.getoption("soak_calls"))
