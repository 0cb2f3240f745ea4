"""`sdxl-fast data prepare`: an image-text set into shards of latents and embeddings."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer
from typer import Option

from .errors import DataError

_NATIVE = "by default the model's native size"
Source = Annotated[
    str, typer.Argument(help="Folder with metadata.jsonl, tars ('data/{000..099}.tar'), or a data set's id.")
]
Out = Annotated[Path, Option(help="Folder to write; the same command again goes on where it was stopped.")]
Model = Annotated[str | None, Option(help="Pipeline whose VAE and text encoders to use; the embedded one if left out.")]
Resolution = Annotated[int | None, Option(help=f"Side of the square bucket in pixels, {_NATIVE}.")]
Buckets = Annotated[
    str, Option(help="sdxl (the published list, scaled), square, or height x width: '1024x1024,832x1216'.")
]
MinSide = Annotated[
    int | None, Option(help=f"The shorter side must have more pixels, {_NATIVE} whatever --resolution.")
]
MinAesthetic = Annotated[float, Option(help="Where there is a score, it must be higher.")]
AestheticColumn = Annotated[str | None, Option(help="Name of that score; usual ones are found.")]
MinSharpness = Annotated[float, Option(help="Least variance of the Laplacian; 0 keeps all.")]
KeepDuplicates = Annotated[bool, Option("--keep-duplicates", help="Keep pictures with equal pixels.")]
Crop = Annotated[str, Option(help="center or random.")]
Seed = Annotated[int, Option(help="Of random crops.")]
CaptionColumn = Annotated[
    str, Option(help="Where the caption is. A tar's .txt comes before the default, after one named.")
]
ImageColumn = Annotated[str, Option(help="Where the picture is, in a Hugging Face data set.")]
Split = Annotated[str, Option(help="Of a Hugging Face data set.")]
RowsPerShard = Annotated[int, Option(help="Rows in a shard; but a tar becomes one shard.")]
Batch = Annotated[int, Option(help="Pictures through the encoders at a time.")]
Workers = Annotated[int, Option(help="Threads that read, decode and resize.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1, ...; a GPU of its own for every rank if there is one.")]
Precision = Annotated[str | None, Option(help="bf16 or fp32; by default bf16 on a GPU.")]

Retry = Annotated[bool, Option("--retry", help="Make parts with damaged files or missing pictures again.")]


def prepare(
    source: Source,
    out: Out,
    model: Model = None,
    resolution: Resolution = None,
    buckets: Buckets = "sdxl",
    min_side: MinSide = None,
    min_aesthetic: MinAesthetic = 5.5,
    aesthetic_column: AestheticColumn = None,
    min_sharpness: MinSharpness = 50.0,
    keep_duplicates: KeepDuplicates = False,
    crop: Crop = "center",
    seed: Seed = 0,
    caption_column: CaptionColumn = "text",
    image_column: ImageColumn = "image",
    split: Split = "train",
    rows_per_shard: RowsPerShard = 2048,
    batch: Batch = 4,
    workers: Workers = 4,
    device: Device = None,
    precision: Precision = None,
    retry: Retry = False,
) -> None:
    """Filter, crop and encode pictures with captions into shards for training; under torchrun, on many GPUs."""
    values = dict(locals())  # before anything else is one
    import torch

    from .data.config import PrepareConfig
    from .data.encoders import facts_of
    from .data.precompute import prepare as run

    names = (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))  # torchrun's
    rank, world_size, local_rank = (int(os.environ.get(name, default)) for name, default in names)
    device = device or (f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    native, _ = facts_of(model)
    filters = {name: values.pop(name) for name in ("min_aesthetic", "aesthetic_column", "min_sharpness")}
    filters |= {"min_side": native if min_side is None else min_side, "deduplicate": not values.pop("keep_duplicates")}
    del values["min_side"]
    values |= {"filters": filters, "device": device}
    values["precision"] = precision or ("bf16" if device.startswith("cuda") else "fp32")
    again = values.pop("retry")
    report = run(PrepareConfig.model_validate(values), rank=rank, world_size=world_size, retry=again)
    if report is not None:
        print(report.text())
        print(f"wrote {out}; report.md and dropped.jsonl there say what was left out and why")
        if not report.kept:
            unread = f" and {len(report.damaged)} damaged input files" if report.damaged else ""
            raise DataError(f"{out}: none of {report.input} pictures{unread} was kept; {out}/report.md says why")
