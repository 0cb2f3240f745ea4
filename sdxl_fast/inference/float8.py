"""float8 for the UNet's layers: scales from the user's prompts, measured errors, and the file they are kept in.

A product's inputs and weights are divided by one fixed scale each, rounded to e4m3, and multiplied with float32 sums
(`ops.linear`, `ops.linear_geglu`, `ops.conv2d`): the linear layers' and the residual blocks' two convolutions. The
inputs' scales come from a run over prompts (`calibrate`), the weights' from the weights. A layer whose result is
further from the unrounded one than `MAX_ERROR` on those prompts stays in bfloat16, and so do what is computed once a
prompt or once a timestep, the other convolutions, and the VAE. An input that a norm or a gate makes for one product
alone is written in float8 by that operation (`scale_y`), with the same numbers; the others, of attention and of the
residual stream, are rounded in a pass of their own.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .. import ops
from ..errors import ModelError
from ..files import replacing
from ..reference.linear import FLOAT8, quantise

MAX_ERROR = 0.06
"""Largest relative L2 error of a layer's result. Rounding to three bits of mantissa makes 0.026 of each operand's norm
if all its numbers are above e4m3's subnormal ones, so 0.037 of the result's; more means that outliers push the rest
below."""
_LARGEST = torch.finfo(FLOAT8).max
_FORMAT = "sdxl_fast float8 scales 1"
_MULTIPLE = 16  # of both feature or channel counts, for the library's products and the CUDA kernel's


@dataclass(slots=True)
class Scales:
    """What calibration found.

    Attributes:
        model: fingerprint of the weights it was found for; see `fingerprint`.
        inputs: largest magnitude of every layer's input divided by 448 and rounded up to a power of two, by layer.
        errors: relative L2 error of every layer's result with these scales, excluded ones too.
        excluded: layers that stay as they are.
        prompts: how many were drawn.
        psnr: of their pictures against those in bfloat16, in dB, one for each; infinite for identical ones.
    """

    model: str
    inputs: dict[str, float]
    errors: dict[str, float] = field(default_factory=dict)
    excluded: tuple[str, ...] = ()
    prompts: int = 0
    psnr: tuple[float, ...] = ()

    @property
    def used(self) -> dict[str, float]:
        """The inputs' scales of the layers that are put into float8."""
        return {name: scale for name, scale in self.inputs.items() if name not in self.excluded}

    def __str__(self) -> str:
        lines = [f"float8: {len(self.used)} of {len(self.inputs)} layers, calibrated on {self.prompts} prompts"]
        if self.psnr:
            mean = sum(self.psnr) / len(self.psnr)
            lines.append(f"pictures against bfloat16: PSNR {mean:.1f} dB, worst {min(self.psnr):.1f} dB")
        lines += [f"kept in bfloat16: {name}, error {self.errors[name]:.1%}" for name in self.excluded]
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all."""
        about = {"excluded": list(self.excluded), "errors": self.errors, "prompts": self.prompts, "psnr": self.psnr}
        metadata = {"format": _FORMAT, "model": self.model, "about": json.dumps(about)}
        with replacing(path) as temporary:
            save_file({name: torch.tensor([scale]) for name, scale in self.inputs.items()}, temporary, metadata)

    @classmethod
    def load(cls, path: str | Path) -> Scales:
        """Read what `save` wrote.

        Raises:
            ModelError: no such file, or not one of scales.
        """
        try:
            with safe_open(Path(path), "pt") as file:
                metadata = file.metadata() or {}
                inputs = {name: float(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            if metadata.get("format") != _FORMAT:
                raise ModelError(f"{path}: not a file of float8 scales")
            about = json.loads(metadata["about"])
            found = cls(metadata["model"], inputs, about["errors"], tuple(about["excluded"]), about["prompts"])
            found.psnr = tuple(about["psnr"])
        except ModelError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ModelError(f"{path}: cannot be read as float8 scales: {error}") from None
        if not all(math.isfinite(scale) and scale > 0 for scale in inputs.values()):
            raise ModelError(f"{path}: holds scales that are not positive numbers")
        return found


class Float8Product:
    """x·Wᵀ + b [+ residual] in float8, with W rounded once.

    Args:
        weight: [N, K]; read again by `refresh`.
        scale: of the inputs.
    """

    def __init__(self, weight: Tensor, scale: float) -> None:
        self._source = weight
        self._inverse = 1.0 / scale
        self.scale_x = torch.tensor([scale], device=weight.device)
        self.scale_w = weight_scale(weight)
        self.weight = quantise(weight.detach(), self.scale_w)

    @property
    def nbytes(self) -> int:
        """Bytes of the rounded weight."""
        return self.weight.nbytes

    def refresh(self) -> None:
        """Round the weight again, in place: a CUDA graph reads it where it is."""
        self.scale_w.copy_(weight_scale(self._source))
        self.weight.copy_(quantise(self._source.detach(), self.scale_w))

    def round(self, x: Tensor) -> Tensor:
        """x in float8: `quantise` without its float32 copies. By a power of two, a product in bfloat16 is exact."""
        return (x * self._inverse).clamp_(-_LARGEST, _LARGEST).to(FLOAT8)

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """Of x [..., K] in bfloat16, or in float8 where what made it has rounded it with `scale_x`."""
        scales = {"scale_x": self.scale_x, "scale_w": self.scale_w}
        return ops.linear(self._rounded(x), self.weight, bias, residual=residual, **scales)

    def geglu(self, x: Tensor, bias: Tensor | None, scale_y: Tensor | None) -> Tensor:
        """value·GELU(gate) of the product's two halves; in float8 where there is a `scale_y`."""
        return ops.linear_geglu(
            self._rounded(x), self.weight, bias, scale_x=self.scale_x, scale_w=self.scale_w, scale_y=scale_y
        )

    def _rounded(self, x: Tensor) -> Tensor:
        return x if x.dtype == FLOAT8 else self.round(x)


class Float8Convolution(Float8Product):
    """A convolution of stride 1 of a channels-last map [+ residual] in float8.

    Args:
        weight: [C_out, C_in, k, k]; read again by `refresh`.
        scale: of the inputs.
        padding: of the map, with zeros.
    """

    def __init__(self, weight: Tensor, scale: float, padding: int) -> None:
        super().__init__(weight, scale)
        self.weight = self.weight.contiguous(memory_format=torch.channels_last)
        self._padding = padding

    def __call__(self, x: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """Of x [N, C_in, H, W] in bfloat16, or in float8 where what made it has rounded it with `scale_x`."""
        return ops.conv2d(
            self._rounded(x),
            self.weight,
            bias,
            padding=self._padding,
            residual=residual,
            scale_x=self.scale_x,
            scale_w=self.scale_w,
        )


def weight_scale(weight: Tensor) -> Tensor:
    """float32 [1]: the largest magnitude, divided by e4m3's; 1 for a weight of zeros."""
    largest = weight.detach().abs().amax().float().reshape(1)
    return torch.where(largest > 0, largest / _LARGEST, torch.ones_like(largest))


def fingerprint(products: Iterable[Any]) -> str:
    """Tells models apart by their layers' names, shapes and some numbers of every weight; one in float32 and its
    bfloat16 copy are the same model."""
    digest = hashlib.sha256()
    for product in products:
        flat = product.matrix.detach().flatten()
        sample = flat[:: max(len(flat) // 64, 1)].to(torch.bfloat16).float().cpu()
        digest.update(f"{product.name}{list(product.matrix.shape)}".encode() + sample.numpy().tobytes())
    return digest.hexdigest()


def suits(product: Any) -> bool:
    """Whether a layer's feature or channel counts are multiples of 16, which float8 products ask for."""
    return all(side % _MULTIPLE == 0 for side in product.matrix.shape[:2])


@contextmanager
def observing(products: Sequence[Any], note: Any) -> Any:
    """Within the block, `note(product, x)` is called with every input of the layers."""
    for product in products:
        product.observer = note
    try:
        yield
    finally:
        for product in products:
            product.observer = None


class Magnitudes:
    """The largest magnitude of every layer's input."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}

    def __call__(self, product: Any, x: Tensor) -> None:
        largest = x.detach().abs().amax().float()
        before = self.found.get(product.name)
        self.found[product.name] = largest if before is None else torch.maximum(before, largest)

    def scales(self) -> dict[str, float]:
        """By layer; 1 for one that saw nothing but zeros. Raises ValueError for inputs that are not finite."""
        largest = {name: float(value) for name, value in self.found.items()}
        wrong = [name for name, value in largest.items() if not math.isfinite(value)]
        if wrong:
            raise ValueError(f"the inputs of {wrong[0]} are not finite on these prompts")
        # a power of two costs one bit of e4m3's range, none of its precision, and scaling by it rounds nothing
        return {name: 2.0 ** math.ceil(math.log2(v / _LARGEST)) if v > 0 else 1.0 for name, v in largest.items()}


class Errors:
    """How far every layer's float8 result is from its own, relative, over all its inputs."""

    def __init__(self, scales: dict[str, float]) -> None:
        self._scales = scales
        self._float8: dict[str, Float8Product] = {}
        self._sums: dict[str, list[float]] = {}

    def __call__(self, product: Any, x: Tensor) -> None:
        name = product.name
        if name not in self._float8:
            self._float8[name] = product.in_float8(self._scales[name])
        wanted = product.exact(x)
        error = self._float8[name](x, None).float() - wanted
        sums = self._sums.setdefault(name, [0.0, 0.0])
        sums[0] += float(error.double().square().sum())
        sums[1] += float(wanted.double().square().sum())

    def relative(self) -> dict[str, float]:
        """By layer, 0 where there was nothing but zeros."""
        return {name: math.sqrt(e / w) if w else 0.0 for name, (e, w) in self._sums.items()}


def psnr(pictures: Tensor, wanted: Tensor) -> tuple[float, ...]:
    """Peak signal-to-noise ratio in dB of pictures [N, 3, H, W] in 0..1, one for each."""
    mean = (pictures.double() - wanted.double()).square().flatten(1).mean(1)
    return tuple(math.inf if m == 0 else -10.0 * math.log10(m) for m in mean.tolist())
