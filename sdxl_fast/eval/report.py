# SPDX-License-Identifier: Apache-2.0
"""Measures several ways of drawing the same prompts from the same seeds, and writes what was found.

`evaluate` takes anything that draws; `run` evaluates a pipeline folder on the emoji set and writes `report.json` (with
all inputs and their hashes), `report.md` and `contact_sheet.png`.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor
from tqdm import tqdm

import sdxl_fast
from sdxl_fast.errors import ModelError
from sdxl_fast.eval import dataset, kid, retrieval, sources, tables
from sdxl_fast.eval.diversity import Diversity, within_prompt_diversity
from sdxl_fast.eval.features import Extractor, FeatureExtractor, check_images
from sdxl_fast.eval.sharpness import laplacian_variance
from sdxl_fast.eval.sheets import contact_sheet, to_pil
from sdxl_fast.eval.tables import REAL, RECONSTRUCTIONS, TEACHER, student_row
from sdxl_fast.files import file_sha256, replacing
from sdxl_fast.models import loading
from sdxl_fast.models.lora import find_loras
from sdxl_fast.models.source import TOKENIZERS

BATCH = 64
SHEET_ROWS = 12


def _collect(source: sources.Source, questions: dataset.Questions, title: str) -> Tensor:
    """All pictures of a source in the prompts' order, rounded as a file would round them."""
    if isinstance(source, Tensor):
        images = source
    elif isinstance(source, Path):
        images = sources.read_folder(source, questions.prompts)
    else:
        parts = []
        starts = range(0, len(questions.prompts), BATCH)
        for start in tqdm(starts, desc=title, unit="batch", mininterval=5.0):
            chosen = slice(start, start + BATCH)
            parts.append(source(questions.prompts[chosen], questions.seeds[chosen]).cpu())
        images = torch.cat(parts)
    if len(images) != len(questions.prompts):
        raise ValueError(f"{title}: {len(images)} pictures for {len(questions.prompts)} prompts; allowed: one each")
    if images.shape[-2:] != questions.placed.shape[-2:]:
        raise ValueError(
            f"{title}: pictures of {list(images.shape[-2:])} px, real ones of {list(questions.placed.shape[-2:])}; "
            "allowed: the same size"
        )
    return dataset.quantise(check_images(images, title))


def _sha256(images: Tensor) -> str:
    return hashlib.sha256((images * 255.0).round().byte().contiguous().numpy().tobytes()).hexdigest()


class _Judge:
    """The real pictures' features, computed once, and the rows measured against them."""

    def __init__(self, questions: dataset.Questions, extract: Extractor) -> None:
        self.questions, self.extract = questions, extract
        self.database = extract(questions.database)
        self.reference = extract(questions.reference)
        views = extract(questions.views)
        self.whitening = retrieval.Whitening.fit(views.reshape(len(self.database), -1, views.shape[1]))
        self.distances: dict[str, kid.KernelDistance] = {}
        self.diversities: dict[str, Diversity] = {}
        self.repeated = bool((questions.targets.bincount() > 1).any())

    def measure(self, name: str, images: Tensor) -> dict[str, Any]:
        """What can be said about a row by itself."""
        questions, features = self.questions, self.extract(images)
        found = retrieval.ranks(features, self.database, questions.targets)
        white = retrieval.ranks(
            self.whitening.queries(features), self.whitening.database(self.database), questions.targets
        )
        blocks = min(kid.BLOCKS, len(images) // 2)
        distance = self.distances[name] = kid.kernel_distance(features, self.reference, blocks=blocks)
        row: dict[str, Any] = {
            "images": len(images),
            "sha256": _sha256(images),
            "top1": retrieval.accuracy(found, 1),
            "top5": retrieval.accuracy(found, 5),
            "top1_whitened": retrieval.accuracy(white, 1),
            "top5_whitened": retrieval.accuracy(white, 5),
            "kid": distance.value,
            "kid_error": distance.standard_error,
            "laplacian_variance": laplacian_variance(images).mean().item(),
        }
        if self.repeated:
            diversity = self.diversities[name] = within_prompt_diversity(images, features, questions.targets)
            row.update(content_diversity=diversity.content, layout_diversity=diversity.layout)
        return row

    def compare(self, rows: dict[str, dict[str, Any]], baseline: str) -> None:
        """Adds what is said relative to the baseline and to the teacher."""
        teacher = rows.get(TEACHER)
        edges = rows[baseline]["laplacian_variance"]
        for name, row in rows.items():
            row.update(kid_excess=None, kid_excess_error=None, top5_of_teacher=None, diversity=None)
            row["sharpness"] = row["laplacian_variance"] / edges if edges else None
            if name != baseline:
                excess, error = kid.excess(self.distances[name], self.distances[baseline])
                row.update(kid_excess=excess, kid_excess_error=error)
            if teacher is None:
                continue
            # A teacher that never hits or draws one picture per prompt leaves nothing to be relative to.
            row["top5_of_teacher"] = row["top5"] / teacher["top5"] if teacher["top5"] else None
            if self.repeated and min(teacher["content_diversity"], teacher["layout_diversity"]) > 0:
                row["diversity"] = self.diversities[name].relative_to(self.diversities[TEACHER])


def evaluate(
    rows: Mapping[str, sources.Source],
    questions: dataset.Questions,
    *,
    reconstruct: Callable[[Tensor], Tensor] | None = None,
    extractor: Extractor | None = None,
    pictures: dict[str, Tensor] | None = None,
) -> dict[str, Any]:
    """Measures each row on the same prompts and seeds, between real pictures and, with `reconstruct`, the VAE's.

    Args:
        rows: name to a function (prompts, seeds) -> pictures, to pictures [N, 3, H, W] in 0..1, or to a folder of them.
            What top-5 and diversity are relative to is named "teacher"; `tables.student_row` names the others.
        questions: prompts, seeds and real pictures.
        reconstruct: real pictures in 0..1 to the VAE's; sharpness and the distance's excess are relative to these (to
            real pictures without it).
        extractor: the feature network; None is EfficientNet-Lite0.
        pictures: filled with each row's pictures, uint8 [N, 3, H, W], for contact sheets.

    Returns:
        plain data: `rows` (name to numbers), `baseline`, `targets`, `settings`, `inputs`.

    Raises:
        ValueError: pictures of another number or size than asked for, or values outside 0..1.
    """
    extractor = extractor or FeatureExtractor()
    judge = _Judge(questions, extractor)
    every: dict[str, sources.Source] = {REAL: questions.placed}
    if reconstruct is not None:
        every[RECONSTRUCTIONS] = torch.cat([reconstruct(part).cpu() for part in questions.placed.split(BATCH)])
    every.update(rows)
    measured = {}
    for name, source in every.items():
        started = time.perf_counter()
        images = _collect(source, questions, name)
        seconds = time.perf_counter() - started
        measured[name] = {
            **(_label(source) if name == TEACHER else {}),
            **judge.measure(name, images),
            "seconds": round(seconds, 3),
        }
        if pictures is not None:
            pictures[name] = (images * 255.0).round().byte()
    baseline = RECONSTRUCTIONS if reconstruct is not None else REAL
    judge.compare(measured, baseline)
    prompts = "\n".join(f"{seed}\t{prompt}" for seed, prompt in zip(questions.seeds, questions.prompts, strict=True))
    return {
        "rows": measured,
        "baseline": baseline,
        "targets": tables.targets_as_json(measured),
        "settings": {"num_images": len(questions.prompts), "names": len(questions.database), "seed": questions.seed},
        "inputs": {
            "features": extractor.provenance(),
            "metadata_sha256": questions.metadata_sha256,
            "prompts_and_seeds_sha256": hashlib.sha256(prompts.encode()).hexdigest(),
            "reference_sha256": _sha256(questions.reference),
        },
    }


def _label(source: sources.Source) -> dict[str, str]:
    """The name a source gives its own row, if it has one."""
    label = getattr(source, "label", None)
    return {"label": label} if isinstance(label, str) else {}


def model_files(folder: str | Path) -> list[Path]:
    """Every weight, tokenizer and config file of a model folder, sorted."""
    kept = (".safetensors", ".json", ".txt")
    return sorted(path for path in Path(folder).rglob("*") if path.suffix in kept and path.is_file())


def hash_files(folder: str | Path) -> dict[str, str]:
    """sha256 of every weight, tokenizer and config file of a model folder, by path in it."""
    folder = Path(folder)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in model_files(folder)}


def model_digest(path: str | Path) -> str:
    """sha256 of all that a model is loaded from: a file's, or that of the list of a folder's files and theirs.

    Of a pipeline these are its networks, tokenizers, configurations and few-step LoRAs, not what else lies there.
    Content, because size and time change with a copy and stay with a file restored. SDXL's 7 GB take 12 s on one core
    (575 MiB/s), about as long as it takes to load them.

    Raises:
        ModelError: no such file, or a folder without a model.
    """
    path = Path(path)
    if path.is_file():
        return file_sha256(path)
    index, files = path / "model_index.json", model_files(path)
    if index.is_file():
        parts = (*loading.NETWORKS, "unet_base", *TOKENIZERS, "scheduler")
        files = [index, *find_loras(path).values(), *(file for name in parts for file in model_files(path / name))]
    if not files:
        raise ModelError(f"{path}: no such file, or a folder without a model")
    lines = [f"{file_sha256(file)}  {file.relative_to(path).as_posix()}\n" for file in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def environment() -> dict[str, str | int]:
    """Versions and machine, as far as they can change a number or a duration."""
    return {
        "sdxl_fast": sdxl_fast.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
    }


def run(
    model_dir: str | Path,
    data_dir: str | Path,
    out_dir: str | Path,
    *,
    generate: Callable[[Sequence[str], Sequence[int], int], Tensor],
    num_images: int = 2000,
    seed: int = 0,
    steps: Sequence[int] = (1, 2, 4, 8),
    teacher: sources.Generate | None = None,
) -> dict[str, Any]:
    """Evaluates a pipeline folder on the emoji set.

    Args:
        model_dir: diffusers SDXL folder; its VAE makes the baseline, its files are hashed.
        data_dir: folder made by `sdxl-fast data emoji`.
        out_dir: gets `report.json`, `report.md` and `contact_sheet.png`.
        generate: (prompts, seeds, number of steps) -> pictures, float [N, 3, H, W] in 0..1.
        num_images: per row.
        seed: prompts, seeds and real pictures derive from it.
        steps: step counts to evaluate.
        teacher: (prompts, seeds) -> pictures, e.g. a `sources.Teacher`; what retrieval and diversity are relative to.
            None leaves those columns empty.

    Returns:
        the report, as written.
    """
    out_dir = Path(out_dir)
    questions = dataset.emoji_questions(
        data_dir, num_images=num_images, seed=seed, resolution=sources.native_size(model_dir)
    )
    rows: dict[str, sources.Source] = {} if teacher is None else {TEACHER: teacher}
    for count in sorted(steps, reverse=True):
        rows[student_row(count)] = _in_steps(generate, count)
    pictures: dict[str, Tensor] = {}
    report = evaluate(rows, questions, reconstruct=sources.Reconstruction(model_dir), pictures=pictures)
    report["inputs"]["model_files_sha256"] = hash_files(model_dir)
    report["environment"] = environment()
    write(report, out_dir)
    chosen = first_of_each(questions.targets, SHEET_ROWS)
    drawn = {report["rows"][name].get("label", name): to_pil(pictures[name][chosen] / 255.0) for name in rows}
    contact_sheet(drawn, [questions.prompts[index] for index in chosen.tolist()], out_dir / "contact_sheet.png")
    return report


def _in_steps(generate: Callable[[Sequence[str], Sequence[int], int], Tensor], count: int) -> sources.Generate:
    return lambda prompts, seeds: generate(prompts, seeds, count)


def first_of_each(targets: Tensor, count: int) -> Tensor:
    """Indices of the first picture of the first `count` different prompts: drawn at random already, and not chosen."""
    seen: dict[int, int] = {}
    for index, target in enumerate(targets.tolist()):
        seen.setdefault(target, index)
    return torch.tensor(list(seen.values())[:count])


def write(
    report: Mapping[str, Any], out_dir: str | Path, to_markdown: Callable[[Mapping[str, Any]], str] = tables.to_markdown
) -> None:
    """Writes `report.json` and `report.md`, each whole or not at all."""
    out_dir = Path(out_dir)
    with replacing(out_dir / "report.json") as temporary:
        temporary.write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    with replacing(out_dir / "report.md") as temporary:
        temporary.write_text(to_markdown(report))
