"""What `sdxl-fast data prepare` is asked to make."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from .filters import Filters
from .rows import CAPTION


class PrepareConfig(BaseModel):
    """What to make of which source."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    out: Path
    model: str | None = None
    resolution: int | None = Field(None, ge=8, description="side of the square bucket; None: the model's native side")
    buckets: str = "sdxl"
    crop: Literal["center", "random"] = "center"
    seed: int = Field(0, description="of random crops")
    filters: Filters = Filters()
    caption_column: str = Field(CAPTION, description="a tar's .txt comes before the default column, after another")
    image_column: str = "image"
    split: str = "train"
    rows_per_shard: int = Field(2048, ge=1, description="where the source is not divided into tars")
    batch: int = Field(4, ge=1, description="pictures through the encoders at a time")
    workers: int = Field(4, ge=1, description="threads that read, decode and resize")
    device: str = "cpu"
    precision: Literal["fp32", "bf16"] = "fp32"
