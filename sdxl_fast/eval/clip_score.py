# SPDX-License-Identifier: Apache-2.0
"""CLIP score: the cosine of a picture's and its prompt's embedding, times 100 (SDXL-Lightning table 2, ADD table 1).

Neither paper's number can be compared without its backbone: ADD's is ViT-g-14 trained on LAION-2B and says so,
SDXL-Lightning's is not stated, so a report names the one it used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sdxl_fast.eval.features import check_images
from sdxl_fast.eval.patches import PATCH, centre_patch, resized

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP and its heirs


class Clip:
    """A CLIP model through transformers, for CLIP scores and as a feature network of pictures.

    Args:
        source: local folder or hub id of a `CLIPModel` with its tokenizer.
        device: where it runs, in float32.
        batch_size: pictures or texts per pass.

    Raises:
        OSError: no such folder or hub id.
    """

    def __init__(self, source: str, *, device: torch.device | str = "cpu", batch_size: int = 16) -> None:
        from transformers import AutoTokenizer, CLIPModel

        model: Any = CLIPModel.from_pretrained(source, use_safetensors=True)
        self.model = model.to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(source)
        self.source, self.device, self.batch_size = source, torch.device(device), batch_size
        self.size = int(model.config.vision_config.image_size)
        self.length = int(model.config.text_config.max_position_embeddings)

    def provenance(self) -> dict[str, str | int]:
        """What decides the features' values, for reports."""
        return {"network": f"CLIP {self.source}", "input_size": self.size}

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Embeddings of pictures.

        Args:
            images: float [N, 3, H, W] in 0..1; the shorter side is resized (bicubic, antialiased), the middle cut out.

        Returns:
            float32 [N, D] on the CPU.
        """
        check_images(images)
        return torch.cat([self._pictures(part) for part in images.split(self.batch_size)])

    @property
    def patch_side(self) -> int:
        """The side of its input, but not more than FID-Patch's 299 pixels."""
        return min(PATCH, self.size)

    def patches(self, images: Tensor) -> Tensor:
        """Embeddings of the middle `patch_side` pixels as they are; smaller pictures are resized as whole ones."""
        return self(centre_patch(images, self.patch_side))

    def _pictures(self, images: Tensor) -> Tensor:
        x = images.to(self.device, torch.float32)
        height, width = x.shape[-2:]
        scale = self.size / min(height, width)
        size = (max(self.size, round(height * scale)), max(self.size, round(width * scale)))
        if size != (height, width):
            x = resized(x, size).clamp(0, 1)
        top, left = (size[0] - self.size) // 2, (size[1] - self.size) // 2
        x = x[..., top : top + self.size, left : left + self.size]
        mean, std = (torch.tensor(value, device=self.device).reshape(3, 1, 1) for value in (MEAN, STD))
        pooled = self.model.vision_model(pixel_values=(x - mean) / std).pooler_output
        found: Tensor = self.model.visual_projection(pooled)
        return found.cpu()

    @torch.inference_mode()
    def texts(self, prompts: Sequence[str]) -> Tensor:
        """Embeddings of texts, cut to the model's length: float32 [N, D] on the CPU."""
        found = []
        for start in range(0, len(prompts), self.batch_size):
            tokens = self.tokenizer(
                list(prompts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(self.device)
            pooled = self.model.text_model(tokens.input_ids, attention_mask=tokens.attention_mask).pooler_output
            found.append(self.model.text_projection(pooled).cpu())
        return torch.cat(found)


def clip_scores(pictures: Tensor, texts: Tensor) -> Tensor:
    """100 times the cosine of each pair of embeddings, not below 0.

    Args:
        pictures, texts: [N, D], the picture's and its own prompt's.

    Returns:
        float64 [N].

    Raises:
        ValueError: shapes that do not fit.
    """
    if pictures.shape != texts.shape or pictures.ndim != 2:
        raise ValueError(f"pictures and texts are {list(pictures.shape)} and {list(texts.shape)}; allowed: [N, D] both")
    return 100.0 * functional.cosine_similarity(pictures.double(), texts.double(), dim=1).clamp_min(0.0)
