"""Recipes: what a training run does, as validated data. An unknown key is an error that names the nearest known one."""

from __future__ import annotations

import difflib
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import torch
import yaml
from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from ..models.feature_nets import DINOV2_PATCH, EFFICIENTNET
from ..models.lora import LORA_TARGETS
from . import losses
from .distributed import Parallel
from .settings import (
    Config,
    DataConfig,
    OptimizerConfig,
    RunConfig,
    TeacherConfig,
    VaeConfig,
    cache_folder,
)
from .stage_settings import AdversarialPhase, StageConfig, Trains, check_chain

__all__ = [
    "RECIPES",
    "AddConfig",
    "AdversarialPhase",
    "AnyConfig",
    "DataConfig",
    "DiscriminatorConfig",
    "DistillationConfig",
    "LcmConfig",
    "LightningConfig",
    "OptimizerConfig",
    "RunConfig",
    "StageConfig",
    "TeacherConfig",
    "Trains",
    "VaeConfig",
    "cache_folder",
    "load_recipe",
]

RECIPES = Path(__file__).parent / "recipes"
Precision = Literal["fp32", "bf16"]
Backbone = Literal["unet", "pixels", "conv"]


class DistillationConfig(RunConfig):
    """What every distillation starts from, and how it is laid out on the machine."""

    accumulate: int = Field(1, ge=1, description="micro-batches per step; `batch` counts all, over all processes")
    parallel: Parallel = Field("ddp", description="ddp: every process holds everything; fsdp: shards of it (FSDP2)")
    gradient_checkpointing: bool = Field(False, description="recompute the UNets' blocks in backward to save memory")
    compile: bool = Field(False, description="torch.compile the UNets of student and teacher")
    frozen: Precision = Field("fp32", description="of the weights of UNets that do not train")
    trained: Precision = Field(
        "fp32", description="of the weights that train; bf16 needs optimisers of kind adamw_lean"
    )
    lora_rank: int = Field(64, ge=1)
    lora_alpha: int | None = Field(None, description="None: equal to the rank")
    lora_targets: tuple[str, ...] = LORA_TARGETS
    teacher: str = Field(description="run, folder or hub id of the teacher; embedded: the package's own base model")
    vae: str | None = Field(None, description="run or folder of a VAE with the same latents to draw and export with")
    data: DataConfig = DataConfig()
    draws: int = Field(128, ge=1, description="random pictures per name, as in the teacher's recipe")
    data_seed: int | None = Field(None, description="of the pictures drawn; None: `seed`, from which all else derives")
    shards: str | None = Field(None, description="folder made by `sdxl-fast data prepare`, in place of `data`")
    resolution: int | None = Field(None, description="side of the shards' pictures, pixels; None: the UNet's own")
    preview_prompts: tuple[str, ...] = Field((), description="of the contact sheets; () takes them from `data`")

    @property
    def frozen_dtype(self) -> torch.dtype:
        """Of UNets that do not train."""
        return self.dtype if self.precision == "fp64" or self.frozen == "fp32" else torch.bfloat16

    @property
    def trained_dtype(self) -> torch.dtype:
        """Of the student and the discriminator."""
        return self.dtype if self.precision == "fp64" or self.trained == "fp32" else torch.bfloat16

    @property
    def computed_in(self) -> torch.dtype | None:
        """What spread networks (FSDP2) are put together in; None: as they are."""
        return torch.bfloat16 if self.precision == "bf16" else None

    def drawing(self) -> AbstractContextManager[Any]:
        """What previews are drawn in: autocast where weights are not of the data's precision."""
        plain = self.frozen_dtype == self.trained_dtype == self.dtype
        if self.parallel == "fsdp":
            plain = plain and self.computed_in is None
        return nullcontext() if plain else self.autocast()

    @property
    def alpha(self) -> int:
        """Of the LoRA: its product is multiplied by alpha / rank."""
        return self.lora_alpha or self.lora_rank

    @model_validator(mode="after")
    def _optimizes_shards(self) -> DistillationConfig:
        for name, value in self:
            if isinstance(value, OptimizerConfig) and self.parallel == "fsdp" and value.kind == "adamw8bit":
                raise ValueError(
                    f"{name}.kind is adamw8bit, whose kernels take no shards of parallel fsdp; set it to adamw_lean"
                )
        return self

    @model_validator(mode="after")
    def _rounds_well(self) -> DistillationConfig:
        for name, value in self:
            if isinstance(value, OptimizerConfig) and self.trained == "bf16" and value.kind != "adamw_lean":
                raise ValueError(
                    f"trained is bf16, to which small steps round to nothing; set {name}.kind to adamw_lean, which "
                    "rounds stochastically"
                )
        if "bf16" in (self.frozen, self.trained) and self.precision == "fp32":
            raise ValueError("frozen or trained is bf16 but precision is fp32; set precision to bf16")
        return self


class DiscriminatorConfig(Config):
    """SDXL-Lightning's discriminator. The defaults are the paper's: wholly trained, with no penalty."""

    backbone: Backbone = Field(
        "unet", description="what it looks with; pixels: image features of decoded latents; conv: a small new network"
    )
    head_channels: int | None = Field(None, description="width of the head; None: that of the mid block")
    freeze_backbone: bool = Field(False, description="train the head alone")
    r1: float = Field(0.0, ge=0, description="weight of the squared gradient norm by the real latents (slow)")
    approximate_r1: float = Field(0.0, ge=0, description="weight of the squared change of the logit under noise")
    approximate_r1_std: float = Field(0.1, gt=0, description="standard deviation of that noise")
    misaligned_text: float = Field(0.0, ge=0, description="weight of real latents under another text, judged fake")


class LightningConfig(DistillationConfig):
    """SDXL-Lightning's progressive adversarial distillation: stage after stage, one run (§2-3, §3.6)."""

    kind: Literal["lightning"]
    images: int = Field(0, description="ignored: each stage and phase has its own length")
    guidance_scale: float = Field(6.0, description="of the teacher, in the MSE stage only; no negative prompt")
    export_name: str = Field("lightning", description="stem of the exported LoRA files")
    distance: losses.Distance = Field("mse", description="of the regression stages, and of regression in phases")
    hand_on_average: bool = Field(False, description="a stage hands on its averaged weights; the paper mentions none")
    pure_noise: bool = Field(True, description="inputs at the last timestep are pure noise, as when drawing (§3.5)")
    teach_average: bool = Field(False, description="a stage's averaged weights teach, though its last ones go on")
    initial: str | None = Field(None, description="LoRA file to start from, to distil a fine-tuned teacher anew")
    bases: tuple[str, ...] = Field(
        (),
        description="runs, folders or hub ids of further UNets, frozen, that share the LoRA; micro-batches take turns. "
        "Texts are encoded by the teacher's encoders (AnimateDiff-Lightning, arXiv 2403.12706, §3.3)",
    )
    discriminator: DiscriminatorConfig = DiscriminatorConfig()
    optimizer: OptimizerConfig
    adversarial_optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig
    stages: tuple[StageConfig, ...]

    def optimizers_of(self, phase: AdversarialPhase) -> tuple[OptimizerConfig, OptimizerConfig]:
        """The student's and the discriminator's in a phase, with the rates that it has of its own."""
        mine = self.adversarial_optimizer if phase.adversarial_weight else self.optimizer
        pairs = ((mine, phase.lr), (self.discriminator_optimizer, phase.d_lr))
        own, judges = (o if lr is None else o.model_copy(update={"lr": lr}) for o, lr in pairs)
        return own, judges

    def averages(self, trains: Trains) -> bool:
        """Whether anything reads the average of a student: it is handed on, or that of a LoRA teaches."""
        return self.hand_on_average or (self.teach_average and trains == "lora")

    @model_validator(mode="after")
    def _repeats_whole_batches(self) -> LightningConfig:
        for phase in (phase for stage in self.stages for phase in stage.phases):
            if phase.repeat % self.batch:
                raise ValueError(f"repeat {phase.repeat} of {phase.name} must be a multiple of batch, {self.batch}")
        return self

    @model_validator(mode="after")
    def _train_their_students(self) -> LightningConfig:
        for stage in self.stages:
            for phase in stage.phases:
                _check_warmup(f" of phase {phase.name} of stage {stage.name}", phase, self.batch)
        return self

    @model_validator(mode="after")
    def _has_another_text(self) -> LightningConfig:
        if self.discriminator.misaligned_text and self.batch == 1:
            raise ValueError("discriminator.misaligned_text takes another picture's text; set batch to at least 2")
        return self

    @model_validator(mode="after")
    def _shares_a_lora(self) -> LightningConfig:
        full = [
            stage.name for stage in self.stages if stage.convert_images or any(p.trains == "full" for p in stage.phases)
        ]
        if self.bases and full:
            raise ValueError(f"bases share a LoRA, but {', '.join(full)} trains full UNets; leave these phases out")
        if self.discriminator.backbone != "unet" and (self.bases or self.parallel == "fsdp"):
            raise ValueError(f"backbone {self.discriminator.backbone} takes one base and parallel ddp")
        if self.discriminator.r1 and self.parallel == "fsdp":
            raise ValueError(
                f"discriminator.r1 is {self.discriminator.r1:g}, but shards of parallel fsdp cannot be differentiated "
                "twice; set discriminator.approximate_r1 instead"
            )
        if self.bases and self.parallel == "fsdp":
            raise ValueError("bases share weights, which spread networks cannot; set parallel to ddp")
        return self

    @model_validator(mode="after")
    def _is_a_chain(self) -> LightningConfig:
        check_chain(self.stages)
        return self


def _check_warmup(where: str, trained: AdversarialPhase | AddConfig, batch: int) -> None:
    """That a batch is left for the student once the discriminator has warmed up."""
    first = -(-trained.d_warmup // batch) * batch
    if first >= trained.images:
        raise ValueError(
            f"d_warmup{where} is {trained.d_warmup}, after which no batch of {batch} is left of {trained.images} images"
            " for the student; lower d_warmup or raise images"
        )


class AddConfig(DistillationConfig):
    """Adversarial diffusion distillation, the recipe of SDXL-Turbo (arXiv 2311.17042); defaults as published."""

    kind: Literal["add"]
    trains: Trains = Field("full", description="of the student; full as published, lora fits one GPU")
    student: Literal["teacher", "random"] = Field("teacher", description="where it starts; random: untrained weights")
    student_width: float = Field(1.0, gt=0, description="channels of a random student over the teacher's")
    student_text_time: bool = Field(True, description="False: a random student is told no size and no pooled text")
    export_name: str = Field("add", description="stem of the exported LoRA file")
    timesteps: tuple[int, ...] = Field((249, 499, 749, 999), description="student's levels, 0-based; only the last is")
    distillation: Literal["exponential", "sds", "nfsd"] = Field("nfsd", description="c(t), §3.3")
    distillation_weight: float = Field(2.5, ge=0, description="λ of eq. 1; 0 is the adversarial loss alone")
    adversarial_weight: float = Field(1.0, ge=0, description="of the adversarial loss, 1 in eq. 1")
    conditions: tuple[Literal["text", "image"], ...] = Field(("text", "image"), description="what the heads are told")
    space: Literal["pixel", "latent"] = Field("pixel", description="where student and teacher are compared")
    checkpoint_decoder: bool = Field(False, description="recompute the VAE's decoder in backward to save memory")
    guidance_scale: float = Field(7.5, description="of the teacher; not published, NFSD's own")
    negative_prompt: str = Field("", description="of NFSD above t = 200")
    teacher_steps: int = Field(1, ge=1, description="deterministic steps of the teacher's estimate (table 1f: 1)")
    r1: float = Field(1e-5, ge=0, description="γ of eq. 3")
    feature_network: str = Field(EFFICIENTNET, description="or a DINOv2, folder or hub id (paper: ViT-S)")
    feature_size: int | None = Field(None, description="side, px, that a DINOv2 sees pictures at; None: 224")
    image_encoder: str | None = Field(None, description="of the condition c_img (paper: DINOv2 ViT-L); None: the same")
    d_warmup: int = Field(0, ge=0, description="images on which D alone trains at the start")
    optimizer: OptimizerConfig
    discriminator_optimizer: OptimizerConfig

    @model_validator(mode="after")
    def _starts_somewhere(self) -> AddConfig:
        if self.student == "random" and self.trains != "full":
            raise ValueError("a random student has nothing to put a LoRA on; set trains to full")
        if self.student != "random" and (self.student_width != 1.0 or not self.student_text_time):
            raise ValueError("a student of another shape cannot start from the teacher; set student to random")
        return self

    @model_validator(mode="after")
    def _trains_its_student(self) -> AddConfig:
        _check_warmup("", self, self.batch)
        return self

    @model_validator(mode="after")
    def _walks_only_to_an_estimate(self) -> AddConfig:
        if self.distillation == "nfsd" and self.teacher_steps != 1:
            raise ValueError(
                f"teacher_steps is {self.teacher_steps}, but nfsd takes a direction at one level and no walk; leave it "
                "out, or set distillation to exponential or sds"
            )
        return self

    @model_validator(mode="after")
    def _sees_whole_patches(self) -> AddConfig:
        if self.feature_size is not None and self.feature_network == EFFICIENTNET:
            raise ValueError(
                f"feature_size is of a DINOv2, but {EFFICIENTNET} takes pictures as they are; leave it out"
            )
        if self.feature_size is not None and (self.feature_size < 1 or self.feature_size % DINOV2_PATCH):
            raise ValueError(f"feature_size is {self.feature_size}; allowed: multiples of the patch, {DINOV2_PATCH}")
        return self

    @field_validator("timesteps")
    @classmethod
    def _levels(cls, timesteps: tuple[int, ...]) -> tuple[int, ...]:
        if not timesteps or min(timesteps) < 0 or max(timesteps) != 999:
            raise ValueError(f"{timesteps} must be indices from 0 to 999 and hold 999, where one step begins")
        return timesteps


class LcmConfig(DistillationConfig):
    """Latent consistency distillation (arXiv 2310.04378, 2311.05556), the regression baseline; no discriminator."""

    kind: Literal["lcm"]
    trains: Trains = "lora"
    export_name: str = Field("lcm", description="stem of the exported LoRA file")
    levels: int = Field(50, ge=1, le=1000, description="of the teacher's DDIM grid; a jump is from one to the next")
    guidance_range: tuple[float, float] = Field(
        (4.0, 16.0), description="the teacher's scale is uniform in it; 1 + w of the authors' cond + w (cond - uncond)"
    )
    distance: losses.Distance = "huber"
    target_half_life: float = Field(0.0, ge=0, description="of the network that makes targets, images; 0: the student")
    optimizer: OptimizerConfig


AnyConfig = VaeConfig | TeacherConfig | LightningConfig | AddConfig | LcmConfig
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
        where = ".".join(str(part) for part in issue["loc"][1:]) or ("" if issue["loc"] else "kind")
        text = ": ".join(filter(None, (source, where, issue["msg"].removeprefix("Value error, "))))
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
