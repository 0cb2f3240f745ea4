# SPDX-License-Identifier: Apache-2.0
"""Measures sets of pictures of the same prompts against real ones, as SDXL-Lightning §4 does.

FID-Whole is the Fréchet distance of whole pictures, which the feature network resizes; FID-Patch that of their middle
at native resolution, 299 pixels or as many of them as the network takes, which sees texture that resizing hides. Both
are called so only with Inception's features, else "Fréchet"; a report names the network. Sets with no more pictures
than features have no covariance: the unbiased kernel distance stands beside it for any size.

Retrieval is text-to-image: how often a picture's own prompt is the nearest of all prompts to it, by CLIP (R-precision,
Park et al. 2021). Diversity is the distance within a prompt that has several pictures, in content and in layout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdxl_fast.eval import kid, retrieval
from sdxl_fast.eval.clip_score import Clip, clip_scores
from sdxl_fast.eval.diversity import LAYOUT_SIZE, within_prompt_diversity
from sdxl_fast.eval.features import PatchExtractor
from sdxl_fast.eval.frechet import frechet_distance
from sdxl_fast.eval.inception import NETWORK as INCEPTION
from sdxl_fast.eval.patches import enlarged
from sdxl_fast.eval.prompt_set import batches, read_picture
from sdxl_fast.eval.report import environment, write
from sdxl_fast.eval.sharpness import laplacian_variance
from sdxl_fast.eval.sheets import contact_sheet, to_pil
from sdxl_fast.files import file_sha256

SHEET_ROWS = 8
_COLUMNS = (
    ("frechet_whole", "{}-Whole", 2),
    ("frechet_patch", "{}-Patch", 2),
    ("kid_whole", "KID ×10³", 2),
    ("kid_patch", "KID-Patch ×10³", 2),
    ("clip_score", "CLIP score", 2),
    ("retrieval", "retrieval", 3),
    ("sharpness", "sharpness", 2),
    ("content_diversity", "diversity", 3),
    ("layout_diversity", "of layout", 3),
)


@dataclass
class Measured:
    """Features of a set: of whole pictures, of their middles, CLIP's; each picture's edges, and itself at 16 x 16.

    `sizes` are the heights and widths that occur, in pixels.
    """

    whole: Tensor
    patch: Tensor
    clip: Tensor | None
    edges: Tensor
    layouts: Tensor
    sizes: frozenset[tuple[int, int]]
    count: int = field(init=False)

    def __post_init__(self) -> None:
        self.count = len(self.whole)


def measure(
    files: Sequence[Path], extract: PatchExtractor, clip: Clip | None = None, *, patch_from: int | None = None
) -> Measured:
    """Reads a set once, batch by batch; pictures may differ in size.

    Those smaller than `patch_from` pixels are enlarged to them before their middle is cut out.
    """
    whole, patch, seen, edges, layouts, sizes = [], [], [], [], [], set()
    for images in batches(files):
        whole.append(extract(images))
        patch.append(extract.patches(enlarged(images, patch_from)))
        sizes.add((images.shape[2], images.shape[3]))
        edges.append(laplacian_variance(images))
        layouts.append(functional.adaptive_avg_pool2d(images, LAYOUT_SIZE))
        if clip is not None:
            seen.append(clip(images))
    return Measured(
        torch.cat(whole),
        torch.cat(patch),
        torch.cat(seen) if seen else None,
        torch.cat(edges),
        torch.cat(layouts),
        frozenset(sizes),
    )


def compare(
    found: Measured, real: Measured | None, texts: Tensor | None, asked: Tensor | None = None
) -> dict[str, Any]:
    """A row of the report; what cannot be said of these sets is None.

    Args:
        found: the set.
        real: of real pictures.
        texts: CLIP's embedding of each picture's prompt, [N, D].
        asked: int64 [N], which of the distinct prompts each picture is of; None: of all different ones.
    """
    row: dict[str, Any] = {"images": found.count, "laplacian_variance": found.edges.mean().item()}
    row["size"] = list(*found.sizes) if len(found.sizes) == 1 else None
    row.update(dict.fromkeys((name for name, _, _ in _COLUMNS)))
    if texts is not None and found.clip is not None:
        scores = clip_scores(found.clip, texts)
        row["clip_score"] = scores.mean().item()
        row["clip_score_error"] = (scores.std() / len(scores) ** 0.5).item() if len(scores) > 1 else None
        row["retrieval"] = _retrieval(found.clip, texts, asked)
    if asked is not None and asked.bincount().max() > 1:
        diversity = within_prompt_diversity(found.layouts, found.whole, asked)
        row["content_diversity"], row["layout_diversity"] = diversity.content, diversity.layout
    if real is None:
        return row
    base = real.edges.mean().item()
    if found.sizes == real.sizes and len(real.sizes) == 1 and base > 0:  # the Laplacian is per pixel
        row["sharpness"] = row["laplacian_variance"] / base
    for name in ("whole", "patch"):
        ours, theirs = getattr(found, name), getattr(real, name)
        smaller = min(len(ours), len(theirs))
        if smaller > ours.shape[1]:
            row[f"frechet_{name}"] = frechet_distance(ours, theirs)
        if smaller >= 4:
            distance = kid.kernel_distance(ours, theirs, blocks=min(kid.BLOCKS, smaller // 2))
            row[f"kid_{name}"], row[f"kid_{name}_error"] = distance.value, distance.standard_error
    return row


def _retrieval(pictures: Tensor, texts: Tensor, asked: Tensor | None) -> float | None:
    """Share of pictures to which no other prompt is as near as their own; None of a single prompt."""
    targets = torch.arange(len(texts)) if asked is None else asked
    first = [int((targets == index).nonzero()[0, 0]) for index in range(int(targets.max()) + 1)]
    if len(first) < 2:
        return None
    return retrieval.accuracy(retrieval.ranks(pictures, texts[first], targets), 1)


def _cell(row: Mapping[str, Any], name: str, digits: int) -> str:
    value, error = row.get(name), row.get(f"{name}_error")
    if value is None:
        return "–"
    factor = 1000.0 if name.startswith("kid") else 1.0
    return f"{factor * value:.{digits}f}" + (f" ± {factor * error:.{digits}f}" if error is not None else "")


def to_markdown(report: Mapping[str, Any]) -> str:
    """The table and what its numbers are."""
    inputs = report["inputs"]
    distance = "FID" if inputs["features"]["network"] == INCEPTION else "Fréchet"
    header = ["", "images", *(title.format(distance) for _, title, _ in _COLUMNS)]
    lines = ["| " + " | ".join(header) + " |", "|" + "|".join(["---"] + ["---:"] * (len(header) - 1)) + "|"]
    for name, row in report["rows"].items():
        cells = [name, str(row["images"]), *(_cell(row, key, digits) for key, _, digits in _COLUMNS)]
        lines.append("| " + " | ".join(cells) + " |")
    origins = [_origin(name, row) for name, row in report["rows"].items() if "settings" in row]
    return "\n".join([*lines, "", *origins, *([""] if origins else []), *_notes(inputs)]) + "\n"


def _origin(name: str, row: Mapping[str, Any]) -> str:
    """What drew a row, and how."""
    how = row["settings"]
    weights = {part: f"sha256 {digest[:12]}" for part, digest in how["weights_sha256"].items()}
    model = f"{how['model']} ({weights.pop('model')})"
    if how["base"] is not None:
        model += f" on {how['base']} ({weights.pop('base')})"
    vae = "" if how["vae"] is None else f", VAE {how['vae']} ({weights['VAE']})"
    loras = "".join(f", LoRA {lora} at {weight:g} ({weights[f'LoRA {lora}']})" for lora, weight in how["loras"].items())
    guidance = f"guidance {how['guidance']:g}" if how["guidance"] else "no guidance"
    size = "several sizes" if row["size"] is None else "{} x {} px (height x width)".format(*row["size"])
    facts = (how["source"], guidance, how["scheduler"], f"{how['dtype']} on {how['device']}", size)
    return f"- {name}: {model}{vae}{loras}, {', '.join(facts)}"


def _notes(inputs: Mapping[str, Any]) -> list[str]:
    """What the columns are."""
    features, patch = (
        inputs["features"],
        f"the middle {inputs['patch']['side']} px at native resolution, smaller pictures whole",
    )
    if inputs["patch"]["from"] is not None:
        patch += f", of all pictures below {inputs['patch']['from']} px after enlarging them to it (bicubic)"
    given, real = inputs["reference"], "no real pictures"
    if given is not None:
        real = f"{given['pictures']} real pictures of {given['folder']}"
    source = ""
    if inputs["prompts_file"] is not None:
        source = f" of {inputs['prompts_file']} (sha256 {inputs['prompts_sha256'][:12]})"
    resize = f"Whole: resized to {features['input_size']} px ({features.get('resize', 'bicubic, antialiased')})"
    return [
        f"{inputs['prompts']} prompts{source}, seed {inputs['seed']}. Fréchet and kernel distances on the features of "
        f"{features['network']} to {real}. {resize}; Patch: {patch}. CLIP score: "
        f"100 times the cosine, of {inputs['clip'] or 'no network'}; retrieval: how often a picture's own prompt is "
        "the nearest by it. Sharpness: the Laplacian's variance over that of the real pictures, where all have one "
        "size. Diversity: 1 - cosine of the features, and root mean square difference at 16 x 16, between pictures of "
        "one prompt. –: not measured, too few pictures for a covariance, or one picture a prompt.",
    ]


def write_report(
    out: Path,
    sets: Mapping[str, Sequence[Path]],
    prompts: Sequence[str],
    *,
    extract: PatchExtractor,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    source: Path | None = None,
    reference: Sequence[Path] = (),
    clip: Clip | None = None,
    patch_from: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Measures sets of pictures of the same prompts and writes `report.json`, `report.md` and `contact_sheet.png`.

    Args:
        out: folder of the report.
        sets: name to files, one per prompt.
        prompts: what they show; one that comes several times is drawn with as many seeds.
        extract: the feature network of the distances.
        about: name to what drew a set and how, with the keys of `settings` of `cli_eval_rows.Row`.
        source: file of the prompts.
        reference: real pictures, of one folder.
        clip: of the CLIP score.
        patch_from: shorter side in pixels to which smaller pictures are enlarged before their middle is cut out.
        seed: which the sets were drawn with.

    Returns:
        the report, as written.
    """
    real = measure(reference, extract, patch_from=patch_from) if reference else None
    texts = None if clip is None else clip.texts(prompts)
    index = {prompt: number for number, prompt in enumerate(dict.fromkeys(prompts))}
    asked = torch.tensor([index[prompt] for prompt in prompts])
    found = {name: measure(files, extract, clip, patch_from=patch_from) for name, files in sets.items()}
    rows = {name: compare(one, real, texts, asked) for name, one in found.items()}
    for name, settings in (about or {}).items():
        rows[name]["settings"] = dict(settings)
    report: dict[str, Any] = {
        "rows": rows,
        "inputs": {
            "prompts": len(index),
            "prompts_file": None if source is None else str(source),
            "prompts_sha256": None if source is None else file_sha256(source),
            "pictures_per_row": len(prompts),
            "seed": seed,
            "features": extract.provenance(),
            "patch": {"side": extract.patch_side, "from": patch_from},
            "clip": None if clip is None else clip.source,
            "reference": {"folder": str(reference[0].parent), "pictures": len(reference)} if reference else None,
        },
        "environment": environment(),
    }
    write(report, out, to_markdown)
    shown = {name: [to_pil(read_picture(file)[None])[0] for file in files[:SHEET_ROWS]] for name, files in sets.items()}
    sizes = {picture.size for column in shown.values() for picture in column}
    smallest = min(sizes)
    contact = {name: [picture.resize(smallest) for picture in column] for name, column in shown.items()}
    contact_sheet(contact, list(prompts[:SHEET_ROWS]), out / "contact_sheet.png")
    return report
