"""The two runs before distillation: they learn, they export what stock diffusers reads, and they resume bitwise."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import AutoencoderKL, StableDiffusionXLPipeline

from sdxl_fast.models.config import TOY
from sdxl_fast.train import checkpoint
from sdxl_fast.train.config import TeacherConfig, load_recipe
from sdxl_fast.train.teacher import TeacherTask
from sdxl_fast.train.trainer import run

pytest.importorskip("efficientnet_lite_pytorch", reason="extra `eval` is missing")


def _write(path: Path, tree: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(tree))
    return path


@pytest.fixture(scope="module")
def vae_recipe(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = {key: list(v) if isinstance(v, tuple) else v for key, v in TOY.vae_arguments().items()}
    common = {"kind": "vae", "run": "vae", "batch": 4, "images": 16, "precision": "fp32", "checkpoint_every": 8}
    data = {"folder": str(pictures), "resolution": 32, "art_size": 64}
    rest = {"model": model, "data": data, "optimizer": {"lr": 1e-3}, "perceptual": 0.1, "log_every": 4}
    return _write(tmp_path_factory.mktemp("recipe") / "vae.yaml", {**common, **rest})


@pytest.fixture(scope="module")
def teacher_recipe(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    data = {"folder": str(pictures), "resolution": 32, "art_size": 64}
    tree = {
        **{"kind": "teacher", "run": "teacher", "vae": "vae", "batch": 4, "images": 16, "precision": "fp32"},
        **{"data": data, "draws": 2, "vocabulary": 560, "optimizer": {"lr": 1e-3}, "log_every": 4},
        **{"checkpoint_every": 8, "prediction_type": "v_prediction"},
        "pipeline": yaml.safe_load(yaml.safe_dump(_plain(dataclasses.asdict(TOY)))),
    }
    return _write(tmp_path_factory.mktemp("recipe") / "teacher.yaml", tree)


@pytest.fixture(scope="module")
def vae_run(vae_recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the VAE, in a cache of its own that no test writes to."""
    return _finished(vae_recipe, tmp_path_factory.mktemp("trained") / "cache")


@pytest.fixture(scope="module")
def teacher_run(vae_run: Path, teacher_recipe: Path) -> Path:
    """A finished run of the teacher, beside that of the VAE."""
    return _finished(teacher_recipe, vae_run.parent.parent)


def _finished(recipe: Path, cache: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SDXL_FAST_CACHE", str(cache))
        return run(recipe, []).parent


@pytest.fixture
def own_vae(vae_run: Path, cache: Path) -> Path:
    """A copy of the VAE's run in the test's own cache."""
    return Path(shutil.copytree(vae_run, cache / "runs" / "vae"))


def _plain(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return list(tree) if isinstance(tree, tuple) else tree


def test_exported_latents_have_unit_statistics(vae_recipe: Path, vae_run: Path) -> None:
    vae = AutoencoderKL.from_pretrained(vae_run / "export")
    assert vae.config.scaling_factor == 1.0
    from sdxl_fast.train.config import load_recipe
    from sdxl_fast.train.vae import VaeTask

    task = VaeTask(load_recipe(vae_recipe))  # type: ignore[arg-type]
    with torch.no_grad():
        latents = vae.encode(task._pictures(256, "test")).latent_dist.mode()
    assert latents.mean((0, 2, 3)).abs().max() < 0.15
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.15


def test_normalising_the_latents_does_not_change_the_pictures() -> None:
    from sdxl_fast.models.config import build_vae
    from sdxl_fast.train.vae import normalise_latents

    torch.manual_seed(0)
    vae = build_vae(TOY).eval()
    with torch.no_grad():
        vae.quant_conv.bias += 0.7
        pictures = torch.randn(8, 3, 32, 32).clamp(-1, 1)
        before = vae.encode(pictures).latent_dist
        picture, std = vae.decode(before.mode()).sample, before.std
        normalise_latents(vae, pictures)
        after = vae.encode(pictures).latent_dist
        torch.testing.assert_close(vae.decode(after.mode()).sample, picture, rtol=1e-3, atol=1e-4)
        ratio = (std / after.std).mean((0, 2, 3))
    torch.testing.assert_close(ratio, before.mode().std((0, 2, 3)), rtol=1e-3, atol=1e-4)


def test_a_decoder_trains_alone_and_adversarially(vae_recipe: Path, own_vae: Path, cache: Path) -> None:
    first = AutoencoderKL.from_pretrained(own_vae / "export").state_dict()
    adversarial = ["adversarial=0.1", "discriminator_optimizer.lr=0.001"]
    out = run(vae_recipe, ["run=decoder", "initial=vae", "freeze_encoder=true", *adversarial])
    decoder = AutoencoderKL.from_pretrained(out)
    assert decoder.config.scaling_factor == 1.0
    second = decoder.state_dict()
    moved = {key.split(".")[0] for key in first if not torch.equal(first[key], second[key])}
    assert moved == {"decoder", "post_quant_conv"}
    line = (cache / "runs" / "decoder" / "metrics.jsonl").read_text().splitlines()[0]
    assert "d_accuracy" in line


def test_the_teacher_exports_a_pipeline_that_stock_diffusers_runs(teacher_run: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(teacher_run / "export")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    image = pipe("red square", num_inference_steps=2, guidance_scale=3.0, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


@pytest.mark.usefixtures("own_vae")
def test_the_teacher_resumes_bitwise(teacher_recipe: Path, teacher_run: Path, cache: Path) -> None:
    run(teacher_recipe, ["run=halves", "images=8"])
    run(teacher_recipe, ["run=halves"], resume="latest")
    whole, halves = (checkpoint.latest(folder) for folder in (teacher_run, cache / "runs" / "halves"))
    assert whole is not None and halves is not None and whole.name == halves.name
    for path in sorted(whole.glob("*.safetensors")):
        assert path.read_bytes() == (halves / path.name).read_bytes(), path.name


@pytest.mark.usefixtures("own_vae")
def test_a_teacher_starts_from_another_ones_weights(teacher_recipe: Path, teacher_run: Path, cache: Path) -> None:
    shutil.copytree(teacher_run, cache / "runs" / "teacher")
    first = StableDiffusionXLPipeline.from_pretrained(teacher_run / "export")
    still = ["optimizer.lr=1.0e-30", "images=4"]
    second = StableDiffusionXLPipeline.from_pretrained(
        run(teacher_recipe, ["run=second", "initial=teacher", "seed=1", *still])
    )
    for part in ("unet", "text_encoder", "text_encoder_2"):
        expected = getattr(first, part).state_dict()
        for name, value in getattr(second, part).state_dict().items():
            torch.testing.assert_close(value, expected[name])


def test_a_run_reads_captions_by_the_tokenizer_it_began_with(
    vae_run: Path, teacher_recipe: Path, teacher_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Learnt anew, equally frequent merges may change places: of a run's own, and of one to start from."""
    config = load_recipe(teacher_recipe, [f"vae={vae_run}"])
    assert isinstance(config, TeacherConfig)
    first = TeacherTask(config, tmp_path)
    monkeypatch.setattr("sdxl_fast.train.teacher.train_tokenizer", None)  # whoever learns one now fails
    assert torch.equal(TeacherTask(config, tmp_path).ids, first.ids)
    initial = config.model_copy(update={"initial": str(teacher_run)})
    assert TeacherTask(initial, tmp_path / "other").ids.shape == first.ids.shape


def test_the_learning_rate_warms_up_and_decays() -> None:
    from sdxl_fast.train.config import OptimizerConfig
    from sdxl_fast.train.trainer import learning_rate

    config = OptimizerConfig(lr=1.0, warmup=10, decay=20, final=0.1)
    assert learning_rate(config, 4, 100) == pytest.approx(0.5)
    assert learning_rate(config, 50, 100) == 1.0
    assert learning_rate(config, 90, 100) == pytest.approx(0.5)
    assert learning_rate(config, 100, 100) == pytest.approx(0.1)


def test_a_loss_that_is_not_finite_stops_before_it_reaches_the_weights(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    from sdxl_fast.train.config import OptimizerConfig, load_recipe
    from sdxl_fast.train.trainer import Task, Update, fit

    class Diverging(Task):
        def __init__(self) -> None:
            self.layer, self.batch = torch.nn.Linear(2, 1), 4
            self.update = Update(OptimizerConfig(lr=1.0), self.layer.parameters(), 100)
            self.parts = {"layer": self.layer}

        def step(self, images: int) -> dict[str, float]:
            self.seen = {0: {"inputs": torch.tensor([[1.0, float("nan") if images == 8 else 1.0]])}}
            self.layer(self.seen[0]["inputs"]).sum().backward()
            self.before = self.layer.weight.detach().clone()
            return {"grad_norm": self.update.step(images)}

        def preview(self, path: Path) -> None: ...

        def export(self, folder: Path) -> None: ...

    task = Diverging()
    config = load_recipe("emoji_teacher")
    with pytest.raises(
        FloatingPointError, match=r"after 8 images; nothing was updated, the batch is kept in .*000000008-rank0"
    ):
        fit(task, config, 100, tmp_path, resume=False, label="test")
    assert torch.equal(task.layer.weight, task.before)
    kept = load_file(tmp_path / "not-finite-000000008-rank0.safetensors")["inputs"]
    assert kept.isnan().any() and kept[0, 0] == 1.0


def test_a_run_leaves_its_recipe_metrics_curves_and_sheets(vae_run: Path) -> None:
    from PIL import Image

    assert sorted(p.name for p in vae_run.iterdir()) == [
        *("checkpoint-000000008", "checkpoint-000000016", "export", "losses.png", "metrics.jsonl", "recipe.yaml"),
        *("sheet-000000000.png", "sheet-000000008.png", "sheet-000000016.png"),
    ]
    for name in ("losses.png", "sheet-000000000.png", "sheet-000000016.png"):
        with Image.open(vae_run / name) as picture:
            assert len(picture.convert("RGB").getcolors(maxcolors=1 << 20)) > 16, f"{name} is blank"
