"""Recipes: what a training run does, as validated data. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from ..data.render import SCALE
from ..models.config import PipelineConfig
from ..models.lora import LORA_TARGETS
from . import losses
from .distributed import Parallel

RECIPES = Path(__file__).parent / "recipes"
CPU = torch.device("cpu")


def cache_folder() -> Path:
    """Where runs and data sets live: $SDXL_FAST_CACHE, else ~/.cache/sdxl_fast."""
    return Path(os.environ.get("SDXL_FAST_CACHE", Path.home() / ".cache" / "sdxl_fast"))


class Config(BaseModel):
    """Base of every part of a recipe."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DataConfig(Config):
    """The picture–caption folder and how a picture is drawn from it."""

    folder: str | None = Field(None, description="image folder; None is the emoji set in the cache, built when missing")
    style: str = "fluent-3d"
    resolution: int = Field(64, ge=8, description="side of a training picture, pixels")
    art_size: int = Field(128, ge=16, description="side the cut-out art is kept at, pixels")
    scale_range: tuple[float, float] = Field(SCALE, description="least and greatest side of the art over the picture's")
    category_share: float = Field(0.3, ge=0, le=1, description="share of captions that name only the category")


class OptimizerConfig(Config):
    """AdamW and its learning-rate schedule: linear warm-up, constant, linear decay; lengths in images."""

    lr: float = Field(gt=0)
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    decay: int = Field(0, ge=0, description="images before the end over which the rate falls linearly to `final`")
    final: float = Field(0.05, ge=0, le=1, description="share of the rate left at the very end")
    max_grad_norm: float = Field(1.0, gt=0)
    kind: Literal["adamw", "adamw8bit"] = Field("adamw", description="adamw8bit keeps moments in 8 bits (bitsandbytes)")


class RunConfig(Config):
    """What every run has."""

    run: str = Field(description="name of the run's folder")
    seed: int = 0
    batch: int = Field(gt=0)
    images: int = Field(gt=0, description="training length")
    precision: Literal["fp64", "fp32", "bf16"] = Field("bf16", description="bf16 is mixed, with float32 weights")
    device: str = Field("auto", description="auto is the GPU where there is one; else a torch device")
    deterministic: bool = Field(False, description="refuse CUDA kernels whose result depends on timing")
    loggers: tuple[Literal["tensorboard", "wandb"], ...] = Field((), description="beside metrics.jsonl")
    checkpoint_every: int = Field(20_000, gt=0, description="images between checkpoints")
    keep_checkpoints: int = Field(2, ge=1)
    log_every: int = Field(1_000, gt=0, description="images between metric lines")
    ema_half_life: float = Field(5_000, gt=0, description="images")
    fuse: bool = Field(True, description="run the networks on this package's fused modules")

    @property
    def torch_device(self) -> torch.device:
        """Where the run computes."""
        if self.device != "auto":
            return torch.device(self.device)
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else CPU

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float64 if self.precision == "fp64" else torch.float32

    def autocast(self) -> torch.autocast:
        """bfloat16 mixed precision when the recipe asks for it."""
        return torch.autocast(self.torch_device.type, torch.bfloat16, enabled=self.precision == "bf16")


class VaeConfig(RunConfig):
    """An AutoencoderKL trained by L1, a perceptual distance on frozen EfficientNet-Lite0 features, and a light KL."""

    kind: Literal["vae"]
    data: DataConfig = DataConfig()
    model: dict[str, Any] = Field(description="AutoencoderKL's configuration")
    optimizer: OptimizerConfig
    l1: float = 1.0
    perceptual: float = 0.5
    kl: float = 1e-6
    freeze_encoder: bool = Field(False, description="train the decoder alone, so that latents stay what they were")
    adversarial: float = Field(0.0, ge=0, description="weight of a patch discriminator's hinge loss; 0 trains none")
    discriminator_optimizer: OptimizerConfig | None = None
    initial: str | None = Field(None, description="run to start from, a folder or a name in the cache")


class TeacherConfig(RunConfig):
    """A text-to-image model of SDXL's architecture trained from scratch: UNet and both text encoders."""

    kind: Literal["teacher"]
    data: DataConfig = DataConfig()
    vae: str = Field(description="run or folder of the VAE")
    initial: str | None = Field(None, description="run or pipeline folder whose weights to start from")
    draws: int = Field(128, ge=1, description="random pictures per name whose latents are computed beforehand")
    vocabulary: int = Field(1024, ge=514, le=4096)
    pipeline: PipelineConfig = Field(description="shapes of the networks; the VAE's must be those of `vae`")
    prediction_type: Literal["epsilon", "v_prediction"] = "epsilon"
    caption_dropout: float = Field(0.1, ge=0, le=1)
    optimizer: OptimizerConfig
    preview_guidance: float = 3.0


class AdversarialPhase(Config):
    """One phase of an adversarial stage: which discriminator judges, and what of the student trains."""

    name: str
    condition: bool = Field(description="True: D judges (x_t, x_{t-ns}); False: the relaxed D' sees x_{t-ns} alone")
    trains: Literal["lora", "full"]
    images: int = Field(gt=0)
    teacher: str | None = Field(None, description="stage that teaches this phase; None is the stage before")
    d_warmup: int = Field(0, ge=0, description="images on which D alone trains at the start of the phase")
    regression_weight: float = Field(0.0, ge=0, description="of the MSE to the teacher beside the adversarial loss")
    renoise: tuple[int, ...] = Field((), description="D's re-noising timesteps t*; empty: D sees x_{t-ns} as it is")
    renoise_weights: tuple[float, ...] = ()
    lr: float | None = Field(None, description="the student's rate in this phase")


class StageConfig(Config):
    """One step-halving stage."""

    name: str
    steps: int = Field(ge=1, description="the student's step count; its stride is 1000 / steps")
    loss: Literal["mse", "adversarial"]
    images: int = Field(0, ge=0, description="length of an MSE stage")
    convert_images: int = Field(0, ge=0, description="length of the conversion to x0-prediction before the phases")
    timesteps: tuple[int, ...] | None = Field(None, description="0-based; None is the trailing grid of `steps`")
    phases: tuple[AdversarialPhase, ...] = ()


class DistillationConfig(RunConfig):
    """What every distillation starts from, and how it is laid out on the machine."""

    accumulate: int = Field(1, ge=1, description="micro-batches per step; `batch` counts all, over all processes")
    parallel: Parallel = Field("ddp", description="ddp: every process holds everything; fsdp: shards of it (FSDP2)")
    gradient_checkpointing: bool = Field(False, description="recompute the UNets' blocks in backward to save memory")
    compile: bool = Field(False, description="torch.compile the UNets of student and teacher")
    teacher: str = Field(description="run or folder of the teacher")
    vae: str | None = Field(None, description="run or folder of a VAE with the same latents to draw and export with")
    data: DataConfig = DataConfig()
    draws: int = Field(128, ge=1, description="random pictures per name, as in the teacher's recipe")
    shards: str | None = Field(None, description="folder made by `sdxl-fast data prepare`, in place of `data`")
    preview_prompts: tuple[str, ...] = Field((), description="of the contact sheets; () takes them from `data`")


class DiscriminatorConfig(Config):
    """SDXL-Lightning's discriminator. The defaults are the paper's: wholly trained, with no penalty."""

    head_channels: int | None = Field(None, description="width of the head; None: that of the mid block")
    freeze_backbone: bool = Field(False, description="train the head alone")
    r1: float = Field(0.0, ge=0, description="weight of the squared gradient norm by the real latents (slow)")
    approximate_r1: float = Field(0.0, ge=0, description="weight of the squared change of the logit under noise")
    approximate_r1_std: float = Field(0.1, gt=0, description="standard deviation of that noise")
    misaligned_text: float = Field(0.0, ge=0, description="weight of real latents under another's text, judged fake")


class LightningConfig(DistillationConfig):
    """SDXL-Lightning's progressive adversarial distillation: stage after stage, one run (§2-3, §3.6)."""

    kind: Literal["lightning"]
    images: int = Field(0, description="ignored: each stage and phase has its own length")
    guidance_scale: float = Field(6.0, description="of the teacher, in the MSE stage only; no negative prompt")
    export_name: str = Field("lightning", description="stem of the exported LoRA files")
    lora_rank: int = Field(64, ge=1)
    lora_alpha: int | None = Field(None, description="None: equal to the rank")
    lora_targets: tuple[str, ...] = LORA_TARGETS
    distance: losses.Distance = Field("mse", description="of the regression stages")
    hand_on_average: bool = Field(True, description="a stage hands on its averaged weights; the paper mentions none")
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig
    adversarial_optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig
    stages: tuple[StageConfig, ...]


class AddConfig(DistillationConfig):
    """Adversarial diffusion distillation, the recipe of SDXL-Turbo (arXiv 2311.17042); defaults as published."""

    kind: Literal["add"]
    timesteps: tuple[int, ...] = Field((249, 499, 749, 999), description="student's levels, 0-based; only the last is")
    distillation: Literal["exponential", "sds", "nfsd"] = Field("nfsd", description="c(t), §3.3")
    distillation_weight: float = Field(2.5, ge=0, description="λ of eq. 1")
    space: Literal["pixel", "latent"] = Field("pixel", description="where student and teacher are compared")
    checkpoint_decoder: bool = Field(False, description="recompute the VAE's decoder in backward to save memory")
    guidance_scale: float = Field(7.5, description="of the teacher; not published, NFSD's own")
    negative_prompt: str = Field("", description="of NFSD above t = 200")
    teacher_steps: int = Field(1, ge=1, description="deterministic steps of the teacher's estimate (table 1f: 1)")
    r1: float = Field(1e-5, ge=0, description="γ of eq. 3")
    feature_network: str = Field("efficientnet-lite0", description="or a DINOv2, folder or hub id (paper: ViT-S)")
    image_encoder: str | None = Field(None, description="of the condition c_img (paper: DINOv2 ViT-L); None: the same")
    d_warmup: int = Field(0, ge=0, description="images on which D alone trains at the start")
    optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig

    @field_validator("timesteps")
    @classmethod
    def _levels(cls, timesteps: tuple[int, ...]) -> tuple[int, ...]:
        if not timesteps or min(timesteps) < 0 or max(timesteps) != 999:
            raise ValueError(f"{timesteps} must be indices from 0 to 999 and hold 999, where one step begins")
        return timesteps


AnyConfig = VaeConfig | TeacherConfig | LightningConfig | AddConfig
Recipe = Annotated[AnyConfig, Field(discriminator="kind")]


def _known_keys(location: tuple[str | int, ...]) -> list[str]:
    models: tuple[Any, ...] = get_args(AnyConfig)
    known = [m for m in models if m.model_fields["kind"].annotation.__args__[0] == location[0]]
    node: Any = known[0] if known else None
    for part in location[1:-1]:
        if isinstance(part, int) or node is None:
            continue
        annotation = node.model_fields[part].annotation if part in node.model_fields else None
        inner = [a for a in getattr(annotation, "__args__", (annotation,)) if hasattr(a, "model_fields")]
        node = inner[0] if inner else None
    return list(node.model_fields) if node is not None else []


def _explain(error: ValidationError, source: str) -> str:
    lines = []
    for issue in error.errors():
        where = ".".join(str(part) for part in issue["loc"][1:]) or "kind"
        text = f"{source}: {where}: {issue['msg']}"
        if issue["type"] == "extra_forbidden":
            near = difflib.get_close_matches(str(issue["loc"][-1]), _known_keys(issue["loc"]), n=1, cutoff=0.4)
            text = f"{source}: {where} is not a setting" + (f"; did you mean {near[0]}?" if near else "")
        lines.append(text)
    return "\n".join(lines)


def _override(tree: dict[str, Any], assignment: str) -> None:
    path, equals, text = assignment.partition("=")
    if not equals:
        raise ValueError(f"--set {assignment!r} is not of the form a.b=value")
    *parents, last = path.split(".")
    node: Any = tree
    for part in parents:
        node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
    value = yaml.safe_load(text)
    if isinstance(node, list):
        node[int(last)] = value
    else:
        node[last] = value


def load_recipe(source: str | Path, overrides: list[str] | None = None) -> AnyConfig:
    """Reads a YAML recipe (a path, or the name of one of the package's), applies `a.b=value` overrides, validates.

    Raises:
        ValueError: no such recipe, not YAML, an unknown key (the nearest is named) or a value out of range.
    """
    path = Path(source)
    if not path.is_file():
        path = RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in RECIPES.glob("*.yaml")))
        raise ValueError(f"recipe {str(source)!r} is neither a file nor one of: {known}")
    try:
        tree = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(tree, dict):
        raise ValueError(f"{path} holds {type(tree).__name__}, expected a mapping of settings")
    for assignment in overrides or []:
        _override(tree, assignment)
    try:
        return TypeAdapter(Recipe).validate_python(tree)  # type: ignore[no-any-return]
    except ValidationError as error:
        raise ValueError(_explain(error, path.name)) from None
