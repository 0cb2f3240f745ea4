# SPDX-License-Identifier: Apache-2.0
"""SDXL-Lightning's two steps as one would write them with diffusers and peft alone: the peer of `benchmarks.training`.

Stock modules, the formulas of the paper one by one, torch's AdamW with its defaults, autocast. The discriminator is
called once for a real and once for a fake latent, each time with x_t.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from torch import Tensor, nn

BETAS = (0.0, 0.99)


class Start(NamedTuple):
    """Where a move begins: x_t [N, C, h, w], t int64 [N], and prompt_embeds, pooled, time_ids."""

    x_t: Tensor
    t: Tensor
    text: dict[str, Tensor]


@dataclass(frozen=True)
class Setting:
    """What both loops share: rank and modules of the LoRA, strides of student and teacher, rates, precision, place.

    `frozen` is of the weights that do not train; `recompute` is diffusers' gradient checkpointing.
    """

    rank: int
    targets: list[str]
    stride: int
    teacher_stride: int
    lr: float
    d_lr: float
    max_grad_norm: float
    bf16: bool
    frozen: torch.dtype = torch.float32
    device: str = "cpu"
    recompute: bool = False


def call(unet: Any, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
    """The UNet's output."""
    added = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
    found: Tensor = unet(x, t, text["prompt_embeds"], added_cond_kwargs=added, return_dict=False)[0]
    return found


class Discriminator(nn.Module):
    """The UNet's encoder and middle with a head of strided convolutions, GroupNorm and SiLU."""

    def __init__(self, unet: Any, side: int) -> None:
        super().__init__()
        self.unet = copy.deepcopy(unet, {id(unet.up_blocks): nn.ModuleList()})
        self.unet.conv_norm_out = self.unet.conv_out = None
        self.unet.requires_grad_(True)
        channels, groups = unet.config.block_out_channels[-1], unet.config.norm_num_groups
        blocks = []
        for index in range(int(math.log2(side))):
            convolution = nn.Conv2d(2 * channels if index == 0 else channels, channels, 4, stride=2, padding=1)
            blocks.append(nn.Sequential(convolution, nn.GroupNorm(groups, channels), nn.SiLU()))
        self.blocks, self.projection = nn.Sequential(*blocks), nn.Conv2d(channels, 1, 1)

    def features(self, x: Tensor, t: Tensor, text: dict[str, Tensor]) -> Tensor:
        """The middle block's output."""
        unet, told = self.unet, text["prompt_embeds"]
        added = {"text_embeds": text["pooled"], "time_ids": text["time_ids"]}
        embedding = unet.time_embedding(unet.get_time_embed(sample=x, timestep=t))
        embedding = embedding + unet.get_aug_embed(emb=embedding, encoder_hidden_states=told, added_cond_kwargs=added)
        x = unet.conv_in(x)
        for block in [*unet.down_blocks, unet.mid_block]:
            arguments = {"encoder_hidden_states": told} if getattr(block, "has_cross_attention", False) else {}
            x = block(x, embedding, **arguments)
            x = x[0] if isinstance(x, tuple) else x
        return x

    def forward(self, start: Start, x: Tensor, then: Tensor) -> Tensor:
        """Logits [N] of x at `then`, given where the step began."""
        text = start.text
        found = torch.cat([self.features(x, then.clamp(min=0), text), self.features(start.x_t, start.t, text)], dim=1)
        logits: Tensor = self.projection(self.blocks(found)).float().mean((1, 2, 3))
        return logits


class PlainLoop:
    """The alternating steps.

    Args:
        base: UNet of the base model; it is left as it is.
        teacher: a UNet of weights of its own, frozen.
        alphas_cumprod: the schedule, float [1000].
        setting: numbers.
        channels_last: memory format of networks and latents.
        side: shortest of the discriminator's feature maps.
    """

    def __init__(
        self,
        base: Any,
        teacher: Any,
        alphas_cumprod: Tensor,
        setting: Setting,
        *,
        channels_last: bool,
        side: int,
    ) -> None:
        self.setting, self.alphas = setting, alphas_cumprod.to(setting.device)
        self.layout = torch.channels_last if channels_last else torch.contiguous_format
        self.discriminator = Discriminator(base, side).to(setting.device)
        self.student = copy.deepcopy(base).to(setting.device, setting.frozen).requires_grad_(False)
        lora = LoraConfig(r=setting.rank, lora_alpha=setting.rank, target_modules=setting.targets)
        self.student.add_adapter(lora, adapter_name="distilled")
        self.teacher = copy.deepcopy(teacher).to(setting.device, setting.frozen).requires_grad_(False)
        for network in (self.student, self.teacher, self.discriminator):
            network.to(memory_format=self.layout)
        if setting.recompute:
            for unet in (self.student, self.discriminator.unet):
                unet.enable_gradient_checkpointing()
                unet.train()
        trained = [p for p in self.student.parameters() if p.requires_grad]
        for parameter in trained:
            parameter.data = parameter.data.float()
        self.optimizer = torch.optim.AdamW(trained, lr=setting.lr, betas=BETAS, weight_decay=0.0)
        judging = list(self.discriminator.parameters())
        self.d_optimizer = torch.optim.AdamW(judging, lr=setting.d_lr, betas=BETAS, weight_decay=0.0)

    def autocast(self) -> torch.autocast:
        """bf16 where asked for."""
        return torch.autocast(self.alphas.device.type, torch.bfloat16, enabled=self.setting.bf16)

    def _move(self, x: Tensor, epsilon: Tensor, t: Tensor, then: Tensor) -> Tensor:
        now = self.alphas[t][:, None, None, None]
        to = torch.where(then < 0, torch.ones_like(self.alphas[then]), self.alphas[then])[:, None, None, None]
        x0 = (x - (1 - now).sqrt() * epsilon.float()) / now.sqrt()
        return to.sqrt() * x0 + (1 - to).sqrt() * epsilon.float()

    def real(self, start: Start) -> Tensor:
        """Where the teacher gets to."""
        x, t = start.x_t, start.t
        for _ in range(self.setting.stride // self.setting.teacher_stride):
            then = t - self.setting.teacher_stride
            with torch.no_grad(), self.autocast():
                output = call(self.teacher, x, t, start.text)
            x, t = self._move(x, output, t, then), then
        return x

    def fake(self, start: Start) -> Tensor:
        """Where the student gets to in one step."""
        with self.autocast():
            output = call(self.student, start.x_t, start.t, start.text)
        return self._move(start.x_t, output, start.t, start.t - self.setting.stride)

    def d_loss(self, start: Start) -> Tensor:
        """Of the discriminator; the student gets no gradient."""
        with torch.no_grad():
            real, fake = self.real(start), self.fake(start)
        then = start.t - self.setting.stride
        with self.autocast():
            real_logits, fake_logits = (self.discriminator(start, x, then) for x in (real, fake))
        return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()

    def g_loss(self, start: Start) -> Tensor:
        """Of the student."""
        fake = self.fake(start)
        with self.autocast():
            logits = self.discriminator(start, fake, start.t - self.setting.stride)
        return F.softplus(-logits).mean()

    def step(self, draw: Callable[[], Start]) -> None:
        """One step of each, on a batch of its own."""
        self.discriminator.requires_grad_(True)
        self._descend(self.d_loss(self._laid_out(draw())), self.d_optimizer)
        self.discriminator.requires_grad_(False)
        self._descend(self.g_loss(self._laid_out(draw())), self.optimizer)

    def _laid_out(self, start: Start) -> Start:
        return start._replace(x_t=start.x_t.contiguous(memory_format=self.layout))

    def _descend(self, loss: Tensor, optimizer: torch.optim.Optimizer) -> None:
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], self.setting.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
