"""A LoRA out of the difference between two UNets: the best approximation of a rank, and what it leaves out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .lora import is_target
from .lora_file import LoraFile, Pair
from .networks import check_shapes
from .weights import Lazy

Progress = Callable[[list[str]], Iterable[str]]


@dataclass(frozen=True, slots=True)
class Residual:
    """What a LoRA lacks of the difference it was made of, in Frobenius norms.

    Attributes:
        total: of the whole difference.
        adapted: of the difference in the modules that a few-step LoRA adapts.
        missing: of what is left of that, after rounding to the file's dtype.
        modules: missing over adapted for each module.
        outside: norm of the difference in each parameter that such a LoRA does not reach, where there is one.
    """

    total: float
    adapted: float
    missing: float
    modules: dict[str, float]
    outside: dict[str, float]

    @property
    def fraction(self) -> float:
        """Of the whole difference, the share that the LoRA does not carry; 0 for equal models."""
        left = sum(norm**2 for norm in self.outside.values()) + self.missing**2
        return left**0.5 / self.total if self.total else 0.0


def extract_lora(
    unet: Mapping[str, Lazy],
    base: Mapping[str, Lazy],
    *,
    rank: int,
    dtype: torch.dtype = torch.float16,
    device: torch.device | str = "cpu",
    progress: Progress = iter,
) -> tuple[LoraFile, Residual]:
    """The LoRA of a rank that comes closest to turning `base` into `unet`, by singular values (Eckart and Young 1936).

    Linear layers and convolutions alike: a 3×3 kernel is the matrix [out, in · 9], its down half becomes a 3×3
    convolution to `rank` channels and its up half a 1×1. The square roots of the singular values go to either half.
    alpha is the rank.

    Args:
        unet, base: tensors of two UNets by diffusers' names, of the same shapes.
        rank: at most the smaller side of the smallest adapted matrix.
        dtype: of the matrices.
        device: where the decompositions run. On one core of a CPU they take about 2 s for a matrix of 1280 × 1280 and
            5 s for a 3×3 convolution of 1280 channels: SDXL's 788 modules, half an hour.
        progress: wraps the list of modules, as tqdm does.

    Raises:
        ModelError: the UNets differ in names or shapes.
        ValueError: a rank below 1 or too high.
    """
    check_shapes(unet, {name: tensor.shape for name, tensor in base.items()}, source="the UNet against its base")
    modules = [name.removesuffix(".weight") for name in base if name.endswith(".weight") and is_target(name[:-7])]
    _check_rank(rank, {module: base[f"{module}.weight"].shape for module in modules})
    pairs: dict[str, Pair] = {}
    squares: dict[str, tuple[float, float]] = {}
    for module in progress(modules):
        delta = _difference(unet, base, f"{module}.weight", device)
        matrix = delta.flatten(1)
        down, up = (half.to(dtype) for half in factors(matrix, rank))
        left = matrix - up.float() @ down.float()
        squares[module] = (_square(matrix), _square(left))
        down = down.reshape(rank, *delta.shape[1:]).cpu()
        up = up.reshape(*up.shape, *(1 for _ in delta.shape[2:])).cpu()
        pairs[f"unet.{module}"] = Pair(Lazy.of(down), Lazy.of(up), float(rank))
    adapted = {f"{module}.weight" for module in modules}
    outside = {name: _square(_difference(unet, base, name, device)) ** 0.5 for name in base if name not in adapted}
    whole = sum(square for square, _ in squares.values())
    residual = Residual(
        total=(whole + sum(norm**2 for norm in outside.values())) ** 0.5,
        adapted=whole**0.5,
        missing=sum(left for _, left in squares.values()) ** 0.5,
        modules={name: (left / square) ** 0.5 if square else 0.0 for name, (square, left) in squares.items()},
        outside={name: norm for name, norm in outside.items() if norm},
    )
    return LoraFile(pairs, {}), residual


def factors(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """down [rank, n] and up [m, rank], float32, whose product is the best of that rank for `matrix` [m, n].

    From the eigenvectors of the smaller Gram matrix in float64, which costs a tenth of a full decomposition where the
    sides differ much and loses only singular values below 1e-8 of the largest.
    """
    wide = matrix.double()
    tall = wide.shape[0] > wide.shape[1]
    gram = wide.T @ wide if tall else wide @ wide.T
    values, vectors = torch.linalg.eigh(gram)
    singular = values[-rank:].flip(0).clamp_min(0.0).sqrt()
    vectors = vectors[:, -rank:].flip(1)
    floor = 1e-8 * singular[0]
    root = singular.sqrt()
    inverse = torch.where(singular > floor, 1.0 / root, torch.zeros_like(root))
    if tall:
        up, down = (wide @ vectors) * inverse, (vectors * root).T
    else:
        up, down = vectors * root, (vectors * inverse).T @ wide
    dead = singular <= floor  # equal weights, or a rank above the difference's own
    up[:, dead] = 0.0
    down[dead] = 0.0
    return down.float(), up.float()


def _difference(unet: Mapping[str, Lazy], base: Mapping[str, Lazy], name: str, device: torch.device | str) -> Tensor:
    return unet[name].read().to(device, torch.float32) - base[name].read().to(device, torch.float32)


def _square(tensor: Tensor) -> float:
    return float(tensor.double().square().sum())


def _check_rank(rank: int, shapes: Mapping[str, tuple[int, ...]]) -> None:
    def side(shape: tuple[int, ...]) -> int:
        return min(shape[0], int(torch.Size(shape[1:]).numel()))

    smallest = min(shapes, key=lambda name: side(shapes[name]))
    if not 1 <= rank <= side(shapes[smallest]):
        raise ValueError(f"rank is {rank}; allowed: 1 to {side(shapes[smallest])}, the smaller side of {smallest}")
