# SPDX-License-Identifier: Apache-2.0
"""Trains, draws and measures one variant with one seed; what is done already is read back."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
import yaml
from diffusers import StableDiffusionXLPipeline
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.claims import page
from benchmarks.claims.draw import Drawer, Remembering, RememberingExtractor, draw_all, keep, kept, reconstruct
from benchmarks.claims.logs import d_accuracy
from benchmarks.claims.measures import measure
from benchmarks.claims.start import (
    COMMITTED,
    NotRunError,
    StoppedError,
    committed_run,
    link,
    regressed_unit,
    regressions,
)
from benchmarks.claims.turns import alone
from benchmarks.claims.variants import LIGHTNING, TUNED, VARIANTS, Variant
from sdxl_fast.data import emoji
from sdxl_fast.diffusion.prediction import PredictionType
from sdxl_fast.eval import report
from sdxl_fast.eval.dataset import Questions, emoji_questions
from sdxl_fast.eval.features import Extractor, FeatureExtractor
from sdxl_fast.eval.tables import TEACHER
from sdxl_fast.files import file_sha256, replacing
from sdxl_fast.models.lora import merge_lora, read_lora
from sdxl_fast.train.base import base_folder, open_pipeline, run_folder, unet_folder
from sdxl_fast.train.config import LightningConfig, StageConfig, cache_folder, load_recipe
from sdxl_fast.train.stages import STUDENT, Unit, units_of
from sdxl_fast.train.trainer import run

GUIDED_STEPS = 32


@dataclass(frozen=True)
class Options:
    """How to run.

    Attributes:
        start: run of the Lightning recipe, a name or folder, whose stages all variants go on from; "embedded" is made
            of what the repository holds.
        out: gets `results/`.
        pictures: drawn per row.
        scale: of every length.
        settings: `a.b=value` overrides of that run's recipe, such as where its teacher lies.
        extractor: feature network; None is EfficientNet-Lite0.
    """

    start: str
    out: Path
    pictures: int = 1000
    scale: float = 1.0
    settings: tuple[str, ...] = ()
    extractor: Extractor | None = None


class Workshop:
    """Everything that variants share: the run they start from, the questions, the teacher's pictures."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.source = committed_run() if options.start == COMMITTED else run_folder(options.start)
        recipe = self.source / "recipe.yaml"
        config = load_recipe(recipe, list(options.settings)) if recipe.is_file() else None
        if not isinstance(config, LightningConfig):
            raise NotRunError(f"{self.source} holds no run of kind lightning; train it first, or name it by --start")
        self.config = config
        self.extractor = RememberingExtractor(options.extractor or FeatureExtractor())
        self._questions: dict[str, Questions] = {}
        self._reconstruct: Remembering | None = None

    # ---- training ----

    def length(self, images: int, *, least: int = 1) -> int:
        """Images as scaled, a whole number of batches, not less than `least`; none stay none."""
        batch = self.config.batch
        return max(least, round(self.options.scale * images / batch)) * batch if images else 0

    def recipe(self, variant: Variant, seed: int) -> dict[str, Any]:
        """The whole recipe of one variant, as data."""
        if variant.recipe == LIGHTNING:
            tree = self.config.model_dump(mode="json")
            tree["stages"] = [*self._before(variant), self._stage(variant)]
            tree["data_seed"] = self.config.seed if self.config.data_seed is None else self.config.data_seed
        elif variant.recipe == TUNED:
            own = run_folder(self.config.teacher) / "recipe.yaml"
            tree = load_recipe(own if own.is_file() else "emoji_teacher").model_dump(mode="json")
            tree |= {"initial": self.config.teacher, "vae": self.config.vae or self.config.teacher}
            kept = self.config.model_dump(mode="json", include={"data", "precision", "device", "fuse"})
            tree |= {**kept, "ema_half_life": 4000}
        else:
            tree = load_recipe(str(variant.recipe)).model_dump(mode="json")
            shared = ("teacher", "vae", "data", "draws", "precision", "device", "fuse")
            tree |= {key: value for key, value in self.config.model_dump(mode="json").items() if key in shared}
            tree["data_seed"] = self.config.seed
        return tree | {"seed": seed, "checkpoint_every": self.length(4_800), "log_every": self.length(960)}

    def _scaled(self, stage: dict[str, Any]) -> dict[str, Any]:
        least = {"images": 1, "convert_images": 1, "d_warmup": 0}
        found = {key: self.length(value, least=least[key]) if key in least else value for key, value in stage.items()}
        if "phases" in found:
            found["phases"] = [self._scaled(phase) for phase in found["phases"]]
        return found

    def _before(self, variant: Variant) -> list[dict[str, Any]]:
        """The stages up to the one that the variant starts from."""
        names = [stage.name for stage in self.config.stages]
        if variant.start not in names:
            raise NotRunError(f"{self.source} has no stage {variant.start!r} (it has {', '.join(names)})")
        stages = self.config.model_dump(mode="json")["stages"]
        return list(stages[: names.index(variant.start) + 1])

    def _stage(self, variant: Variant) -> dict[str, Any]:
        """The variant's own stage, behind what it goes on from inside the same one."""
        own = self._scaled(dict(variant.stage or {}))
        if not variant.regressed:
            return own
        begun = self._begun(variant)
        whole = begun.model_dump(mode="json")
        before = whole["phases"][: regressions(begun)]
        return own | {"convert_images": begun.convert_images, "phases": [*before, *own["phases"]]}

    def _begun(self, variant: Variant) -> StageConfig:
        """The source's own stage that the variant goes on inside of."""
        after = len(self._before(variant))
        found = self.config.stages[after] if after < len(self.config.stages) else None
        if found is None or found.name != (variant.stage or {})["name"] or not regressions(found):
            raise NotRunError(f"{self.source} has no {variant.stage and variant.stage['name']} stage with regression")
        return found

    def _start_unit(self, variant: Variant) -> Unit:
        """The unit whose student the variant starts from: the stage's last LoRA, or the end of regression."""
        if variant.regressed or variant.start == "1-step":
            found = [regressed_unit(self.config)]
        else:
            found = [u for u in units_of(self.config) if u.stage.name == variant.start and u.trains == "lora"][-1:]
        if not found or found[0] is None or not (found[0].folder(self.source) / STUDENT).is_file():
            raise NotRunError(f"{self.source} has no finished student of stage {variant.start!r} to start from")
        return found[0]

    def key(self, variant: Variant, seed: int) -> str:
        """A digest of all that the result depends on, training and drawing."""
        tree = None if variant.recipe is None else self.recipe(variant, seed)
        weights = "" if variant.start is None else file_sha256(self._start_unit(variant).folder(self.source) / STUDENT)
        base = None if variant.base is None else self.key(VARIANTS[variant.base], seed)
        told = [asdict(variant), tree, weights, base, self._base_sha256, self.options.pictures, self.options.scale]
        return hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()[:12]

    @cached_property
    def _base_sha256(self) -> str:
        """Of the base model's UNet, which every result depends on."""
        return file_sha256(min(unet_folder(base_folder(self.config.teacher)).glob("*.safetensors")))

    def folder(self, variant: Variant, seed: int) -> Path:
        """Where the variant is trained and its pictures kept."""
        return cache_folder() / "runs" / "claims" / f"{variant.name}-{seed}-{self.key(variant, seed)}"

    def train(self, variant: Variant, seed: int) -> float:
        """Trains by the package's own trainer, or goes on with it; the seconds it has taken.

        Raises:
            StoppedError: it was told to stop.
        """
        folder = self.folder(variant, seed)
        folder.mkdir(parents=True, exist_ok=True)
        clock = folder / "clock.json"
        before = json.loads(clock.read_text()) if clock.is_file() else {"seconds": 0.0, "finished": False}
        if before["finished"]:
            return float(before["seconds"])
        path = Path(f"{folder}.yaml")
        path.write_text(yaml.safe_dump(self.recipe(variant, seed)))
        settings = [*variant.settings, f"run={folder.relative_to(cache_folder() / 'runs').as_posix()}"]
        if variant.recipe == LIGHTNING:
            self._lay_ground(variant, folder)
        else:
            settings += self._lengths(variant)
        # A teacher that is a mere folder has no room for the latents encoded for its students.
        shared, own = folder.parent / "latents.safetensors", folder / "latents.safetensors"
        if variant.recipe != TUNED:
            link(shared, own)
        started = time.perf_counter()
        run(path, settings, resume="latest")
        seconds = before["seconds"] + time.perf_counter() - started
        finished = self._is_trained(variant, folder)
        with replacing(clock) as writing:
            writing.write_text(json.dumps({"seconds": seconds, "finished": finished}))
        if variant.recipe != TUNED:
            link(own, shared)
        if not finished:
            raise StoppedError(f"{variant.name}, seed {seed}, was stopped; the same command goes on")
        return float(seconds)

    def _lengths(self, variant: Variant) -> list[str]:
        """The scaled lengths among the variant's own settings."""
        given = dict(setting.partition("=")[::2] for setting in variant.settings)
        least = {"images": 1, "d_warmup": 0, "optimizer.warmup": 0, "optimizer.decay": 0}
        return [f"{name}={self.length(int(given[name]), least=n)}" for name, n in least.items() if name in given]

    def _lay_ground(self, variant: Variant, folder: Path) -> None:
        """Begins a run that has finished what it starts from: the same LoRA files and the lines that say so."""
        if (folder / "chain.jsonl").is_file():
            return
        self._start_unit(variant)
        lines = (self.source / "chain.jsonl").read_text().splitlines()
        kept = {u.folder(Path()).name: u for u in units_of(self.config)[: self._units_before(variant)]}
        for name, unit in kept.items():
            if unit.trains == "lora" or unit == self._start_unit(variant):
                link(self.source / name / STUDENT, folder / name / STUDENT)
        with replacing(folder / "chain.jsonl") as writing:
            writing.write_text("".join(line + "\n" for line in lines if json.loads(line)["unit"] in kept))

    def _units_before(self, variant: Variant) -> int:
        if variant.regressed:
            return self._start_unit(variant).index + 1
        first = self.config.stages[: len(self._before(variant))]
        return sum(unit.stage in first for unit in units_of(self.config))

    def _images_before(self, variant: Variant) -> int:
        """Images that trained what the variant starts from, since the base model; side branches do not count."""
        if variant.start is None:
            return 0
        last = self._start_unit(variant)
        line = [u for u in units_of(self.config)[: last.index + 1] if u.trains == "lora" or u.stage is last.stage]
        return sum(unit.images for unit in line)

    def _is_trained(self, variant: Variant, folder: Path) -> bool:
        if variant.recipe != LIGHTNING:
            return (folder / "export" / "model_index.json").is_file()
        done = {json.loads(line)["unit"] for line in (folder / "chain.jsonl").read_text().splitlines()}
        return self._last_unit(folder).folder(Path()).name in done

    def _last_unit(self, folder: Path) -> Unit:
        config = load_recipe(folder / "recipe.yaml")
        assert isinstance(config, LightningConfig)
        return units_of(config)[-1]

    # ---- drawing ----

    def pipeline(self, variant: Variant, seed: int) -> tuple[Any, PredictionType]:
        """The pipeline that the variant draws with, and what its UNet predicts."""
        folder = self.folder(variant, seed)
        if variant.recipe not in (LIGHTNING, None):
            return self._open(folder / "export")
        if variant.base is None:
            pipe = open_pipeline(self.config.teacher, self.config.vae).to(self.config.torch_device)
            kind = cast(PredictionType, pipe.scheduler.config.prediction_type)
        else:
            pipe, kind = self._open(self.folder(VARIANTS[variant.base], seed) / "export")
        unit, place = self._start_unit(variant), self.source
        if variant.recipe == LIGHTNING:
            unit, place = self._last_unit(folder), folder
        kind = "sample" if unit.stage.convert_images else kind
        weights = unit.folder(place) / STUDENT
        if unit.trains == "lora":
            merge_lora(pipe.unet, read_lora(weights, pipe.unet))
        else:
            pipe.unet.load_state_dict(load_file(weights))
        return pipe, kind

    def _open(self, folder: Path) -> tuple[Any, PredictionType]:
        pipe: Any = StableDiffusionXLPipeline.from_pretrained(folder, use_safetensors=True, torch_dtype=torch.float32)
        return pipe.to(self.config.torch_device), pipe.scheduler.config.prediction_type

    def questions(self, style: str) -> Questions:
        """Prompts, seeds and real pictures of a style, the same for every variant."""
        if style not in self._questions:
            data = self.config.data
            folder = Path(data.folder) if data.folder else emoji.build(cache_folder() / "data" / "emoji")
            found = emoji_questions(folder, num_images=self.options.pictures, resolution=data.resolution, style=style)
            # other styles say so in their captions, a word that no student has learnt
            self._questions[style] = replace(
                found, prompts=[prompt.removesuffix(f", {style} style") for prompt in found.prompts]
            )
        return self._questions[style]

    def teachers_pictures(self, questions: Questions) -> Tensor:
        """Those of the base model with guidance in many steps, drawn once and kept."""
        path = cache_folder() / "runs" / "claims" / f"teacher-{self._teachers_key(questions)}.safetensors"
        if not path.is_file():
            pipe = open_pipeline(self.config.teacher, self.config.vae).to(self.config.torch_device)
            kind = cast(PredictionType, pipe.scheduler.config.prediction_type)
            draw = Drawer(pipe, kind, GUIDED_STEPS, guidance=self.config.guidance_scale)
            keep(path, draw_all(draw, questions))
        return kept(path)

    def _teachers_key(self, questions: Questions) -> str:
        told = [self.config.teacher, self.config.vae, self.config.guidance_scale, questions.prompts, questions.seeds]
        return hashlib.sha256(json.dumps([*told, self._base_sha256]).encode()).hexdigest()[:12]

    # ---- all of it ----

    def result(self, variant: Variant, seed: int) -> dict[str, Any]:
        """The numbers of one variant and seed, from its file if it was measured as asked for.

        Raises:
            BusyError: another process is at it.
        """
        path = self.options.out / "results" / f"{variant.name}-{seed}.json"
        key = self.key(variant, seed)
        if path.is_file():
            found: dict[str, Any] = json.loads(path.read_text())
            if found["key"] == key:
                return found
        if variant.base is not None:
            self.result(VARIANTS[variant.base], seed)
        with alone(self.folder(variant, seed)):
            found = self._found(variant, seed, key)
            with replacing(path) as writing:
                writing.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return found

    def _found(self, variant: Variant, seed: int, key: str) -> dict[str, Any]:
        seconds = 0.0 if variant.recipe is None else self.train(variant, seed)
        return {
            **{"variant": variant.name, "seed": seed, "key": key, "about": variant.about},
            **{"images": self._images(variant, seed), "seconds": round(seconds, 1), "scale": self.options.scale},
            **{"images_before": self._images_before(variant), "d_accuracy": d_accuracy(self.folder(variant, seed))},
            "rows": self._measured(variant, seed),
            "shown": self._shown(variant)[0],
            "environment": report.environment(),
        }

    def _images(self, variant: Variant, seed: int) -> int:
        """Trained on, without what came before."""
        if variant.recipe is None:
            return 0
        config = load_recipe(self.folder(variant, seed) / "recipe.yaml")
        if not isinstance(config, LightningConfig):
            return config.images
        return sum(unit.images for unit in units_of(config)[self._units_before(variant) :])

    def _measured(self, variant: Variant, seed: int) -> dict[str, Any]:
        pipe, kind = self.pipeline(variant, seed)
        style = variant.style or self.config.data.style
        questions = self.questions(style)
        teacher = {TEACHER: self.teachers_pictures(questions)} if variant.style is None else {}
        ends = self._teachers_ends(variant)
        self._reconstruct = self._reconstruct or Remembering(reconstruct(pipe.vae))  # all have the base model's VAE
        rows = {}
        for steps in variant.steps:
            path = self.pictures_file(variant, seed, steps)
            if not path.is_file():
                keep(path, draw_all(Drawer(pipe, kind, steps, variant.sampler), questions))
            pictures = kept(path)
            found = report.evaluate(
                {**teacher, "student": pictures},
                questions,
                reconstruct=self._reconstruct,
                extractor=self.extractor,
            )
            row = found["rows"]["student"]
            del row["seconds"]  # of reading them
            rows[str(steps)] = {**row, **measure(pictures, row, questions, self.extractor, ends)}
            strip = page.strip_file(self.options.out / "results", variant.name, seed, steps)
            page.write_strip(strip, pictures[self._shown(variant)[1]])
        return rows

    def _shown(self, variant: Variant) -> tuple[list[str], Tensor]:
        """What the contact sheets show of a variant's pictures: the prompts, and which pictures."""
        questions = self.questions(variant.style or self.config.data.style)
        chosen = report.first_of_each(questions.targets, page.SHEET_ROWS)
        return [questions.prompts[index] for index in chosen.tolist()], chosen

    def _teachers_ends(self, variant: Variant) -> Tensor | None:
        """Pictures of the checkpoint that taught the variant; None where it is not a stage's."""
        if variant.recipe != LIGHTNING:
            return None
        phases = (variant.stage or {}).get("phases") or [{}]
        taught = VARIANTS[f"start-{phases[-1].get('teacher') or variant.start}"]
        self.result(taught, 0)
        if not self.pictures_file(taught, 0, taught.steps[0]).is_file():  # of another machine are only the numbers here
            self._measured(taught, 0)
        return self.pictures(taught, 0, taught.steps[0])

    def pictures_file(self, variant: Variant, seed: int, steps: int) -> Path:
        """Where the pictures of a row are kept."""
        return self.folder(variant, seed) / f"pictures-{steps}.safetensors"

    def pictures(self, variant: Variant, seed: int, steps: int) -> Tensor:
        """The pictures of a row, float [N, 3, H, W] in 0..1."""
        return kept(self.pictures_file(variant, seed, steps))
