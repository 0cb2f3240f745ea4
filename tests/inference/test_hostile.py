"""Files and arguments that are broken or meant to harm: a clear error each, nothing run, everything usable after."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_fast import OneStepPipeline
from sdxl_fast.errors import ModelError
from sdxl_fast.testing.toy import toy_pipeline

WEIGHTS = "unet/diffusion_pytorch_model.safetensors"


class Bomb:
    """What a pickle can do: it makes a file when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return Path.touch, (Path(self.path),)


def _pickle(file: Path, fuse: Path) -> None:
    file.write_bytes(pickle.dumps(Bomb(fuse)))


def _torch_save(file: Path, fuse: Path) -> None:
    torch.save({"weight": Bomb(fuse)}, file)


def _only_a_pickle(file: Path, fuse: Path) -> None:
    file.unlink()
    torch.save({"weight": Bomb(fuse)}, file.with_suffix(".bin"))


def _truncated(file: Path, fuse: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def _flipped_length(file: Path, fuse: Path) -> None:
    data = bytearray(file.read_bytes())
    data[6] ^= 0x40
    file.write_bytes(data)


def _flipped_header(file: Path, fuse: Path) -> None:
    data = bytearray(file.read_bytes())
    data[12] ^= 0xFF
    file.write_bytes(data)


def _overlapping(file: Path, fuse: Path) -> None:
    """A header whose tensors reach beyond the file."""
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name != "__metadata__")
    header[name]["data_offsets"][1] += 10**12
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _mislabelled(file: Path, fuse: Path) -> None:
    shutil.copy(file.parent.parent / "vae" / file.name, file)


def _text(file: Path, fuse: Path) -> None:
    file.write_text("<html>404: not found</html>" * 100)


def _empty(file: Path, fuse: Path) -> None:
    file.write_bytes(b"")


def _other_widths(file: Path, fuse: Path) -> None:
    config = json.loads((file.parent / "config.json").read_text())
    config["block_out_channels"] = [64, 64]
    (file.parent / "config.json").write_text(json.dumps(config))


DAMAGE: dict[str, tuple[Callable[[Path, Path], None], str]] = {
    "pickle": (_pickle, "corrupt or truncated|pickled"),
    "torch.save": (_torch_save, "in disguise"),
    "only a pickle": (_only_a_pickle, "pickled weight file, which could run code"),
    "truncated": (_truncated, "truncated"),
    "bit flip in the length": (_flipped_length, "corrupt or truncated"),
    "bit flip in the header": (_flipped_header, "corrupt"),
    "beyond its end": (_overlapping, "truncated or corrupt"),
    "mislabelled": (_mislabelled, "do not fit its config|cannot be loaded"),
    "a web page": (_text, "corrupt or truncated"),
    "empty": (_empty, "corrupt or truncated"),
    "other widths": (_other_widths, "do not fit|cannot be loaded"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damaged_weights_are_refused_and_nothing_in_them_runs(toy_folder: Path, tmp_path: Path, case: str) -> None:
    damage, message = DAMAGE[case]
    folder = Path(shutil.copytree(toy_folder, tmp_path / "toy", ignore=shutil.ignore_patterns("unet_base", "*lora*")))
    fuse = tmp_path / "executed"
    damage(folder / WEIGHTS, fuse)
    with pytest.raises(ModelError, match=message):
        OneStepPipeline.from_pretrained(folder, device="cpu")
    assert not fuse.exists()


def test_any_flipped_byte_of_a_header_is_an_error_or_harmless(toy_folder: Path, tmp_path: Path) -> None:
    """Never anything but a ModelError, wherever the flip is."""
    from sdxl_fast.models.safetensors_check import check_safetensors

    data = (toy_folder / WEIGHTS).read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    file = tmp_path / "x.safetensors"
    generator = torch.Generator().manual_seed(0)
    for _ in range(300):
        place = int(torch.randint(end, (1,), generator=generator))
        flipped = bytearray(data)
        flipped[place] ^= 1 << int(torch.randint(8, (1,), generator=generator))
        file.write_bytes(flipped)
        try:
            check_safetensors(file)
        except ModelError:
            continue


@pytest.fixture(scope="module")
def pipe(toy_folder: Path) -> OneStepPipeline:
    return OneStepPipeline.from_pretrained(toy_folder, device="cpu")


CALLS: dict[str, dict[str, Any]] = {
    "NaN latents": {"latents": torch.full((1, 4, 8, 8), torch.nan)},
    "infinite latents": {"latents": torch.full((1, 4, 8, 8), torch.inf)},
    "three dimensions": {"latents": torch.zeros(4, 8, 8)},
    "no pixels": {"height": 0},
    "negative": {"height": -32},
    "enormous": {"width": 1 << 20},
    "half a pixel": {"height": 32.5},
    "no pictures": {"num_images_per_prompt": 0},
    "text for a seed": {"seed": "1"},
    "seed too large": {"seed": 2**63},
    "seed and generator": {"seed": 1, "generator": torch.Generator()},
    "bytes": {"prompt": [b"cat"]},
    "unknown output": {"output_type": "exe"},
    "a picture that is text": {"image": "cat.png", "strength": 0.5},
    "strength NaN": {"image": torch.zeros(3, 32, 32), "strength": float("nan")},
    "embeddings of another width": {"prompt": None, "prompt_embeds": torch.zeros(1, 7, 3),
                                    "pooled_prompt_embeds": torch.zeros(1, 32)},
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_impossible_calls_are_refused_and_the_next_draws_the_same(pipe: OneStepPipeline, case: str) -> None:
    before = pipe("cat", seed=1, output_type="np").images
    with pytest.raises(ValueError):  # what it says is tested where it is said
        pipe(**{"prompt": "cat", **CALLS[case]})
    assert np.array_equal(pipe("cat", seed=1, output_type="np").images, before)


PROMPTS = {
    "100 kB": "red apple " * 10_000,
    "one long word": "a" * 100_000,
    "empty": "",
    "null bytes": "\x00\x01\x02" * 100,
    "emoji": "🍎" * 500,
    "right to left": "تفاحة حمراء",
    "markup": "<|endoftext|><script>alert(1)</script>{}%s%n",
}


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.filterwarnings("ignore:the prompt beginning")
def test_any_text_draws_a_picture(pipe: OneStepPipeline, case: str) -> None:
    picture = pipe(PROMPTS[case], seed=1, output_type="np").images
    assert np.isfinite(picture).all()
    assert pipe("cat", seed=1).images[0].size == (32, 32)


def test_weights_of_nan_do_not_stay(tmp_path: Path) -> None:
    """A picture of NaN comes out black, and the caches hold nothing of it once the weights are good again."""
    pipe = OneStepPipeline.from_pretrained(toy_pipeline(tmp_path / "toy", few_steps=()), device="cpu")
    before = pipe("cat", seed=1, output_type="np").images
    weight = pipe.text_encoder.get_input_embeddings().weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        assert np.isnan(pipe("cat", seed=1, output_type="np").images).any()
        weight.copy_(kept)
    assert np.array_equal(pipe("cat", seed=1, output_type="np").images, before)
