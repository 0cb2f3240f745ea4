"""Pieces of a packed network: layers that call operations on a module's own parameters, checked to be what they seem.

Nothing is copied that need not be. Where several weights are used as one (query, key and value; the keys and values of
all layers; the time projections of all blocks), the parameters become views of one tensor: names, values and state
dicts stay, a LoRA merged in place reaches both, and the memory is the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import dispatch, ops
from ..ops._kept import KeptWeight
from ..reference.upsample_conv2d import phase_weights
from .float8 import Float8Convolution, Float8Product


class NotPackableError(Exception):
    """A network that packed code would compute otherwise than its modules; the message says which part and why."""


def pack(parameters: Sequence[Any]) -> Tensor:
    """One tensor of all the parameters, joined along the first dimension, of which they become views.

    Parameters that already are just that are left as they are.
    """
    first = parameters[0]
    for parameter in parameters:
        if parameter.dtype != first.dtype or parameter.device != first.device or parameter.is_meta:
            raise NotPackableError("its weights are of several dtypes or devices, or not in memory")
    rows = [len(parameter) for parameter in parameters]
    if _consecutive(parameters):
        size = (sum(rows), *first.shape[1:])
        return first.data.as_strided(size, first.stride(), first.storage_offset())
    whole = torch.cat([parameter.data for parameter in parameters])
    for parameter, part in zip(parameters, whole.split(rows), strict=True):
        parameter.data = part
    return whole


def unpack(network: nn.Module) -> None:
    """Give every parameter that is a view memory of its own again."""
    for parameter in network.parameters():
        if parameter.untyped_storage().nbytes() != parameter.numel() * parameter.element_size():
            parameter.data = parameter.data.clone()


def _consecutive(parameters: Sequence[nn.Parameter]) -> bool:
    storage = parameters[0].untyped_storage().data_ptr()
    address = parameters[0].data_ptr()
    for parameter in parameters:
        same = parameter.untyped_storage().data_ptr() == storage and parameter.data_ptr() == address
        if not same or not parameter.is_contiguous():
            return False
        address += parameter.numel() * parameter.element_size()
    return True


def plain(module: Any, kind: type[nn.Module], name: str) -> Any:
    """`module`, if it is a `kind` that does no more than that class does.

    Raises:
        NotPackableError: it is another class (LoRA layers of peft are), or has hooks or a forward of its own.
    """
    home = type(module).__module__.partition(".")[0]
    if not isinstance(module, kind) or (type(module) is not kind and home not in ("diffusers", "sdxl_fast")):
        raise NotPackableError(f"{name} is a {type(module).__module__}.{type(module).__name__}, not a {kind.__name__}")
    if module._forward_hooks or module._forward_pre_hooks:
        raise NotPackableError(f"{name} has forward hooks")
    if "forward" in module.__dict__:
        raise NotPackableError(f"{name} has a forward of its own (offloading?)")
    return module


def nothing_set(module: Any, name: str, *attributes: str) -> None:
    """Raises NotPackableError if one of the attributes is there and neither None nor False."""
    for attribute in attributes:
        value = getattr(module, attribute, None)
        if value is not None and value is not False:
            raise NotPackableError(f"{name}.{attribute} is set")


def _by_library(x: Tensor) -> bool:
    """Whether matrix operations call PyTorch's library at once, which is their only backend on a CPU.

    Measured on one core of a Zen 4 EPYC, embedded UNet, batch 1, processor time: the 100 products and convolutions
    take 11.3 ms at once and 13.9 ms through the registry. In a CUDA graph the registry costs nothing.
    """
    return x.is_cpu and dispatch.forced_backend() is None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, residual: Tensor | None = None) -> Tensor:
    """`ops.linear`."""
    if not _by_library(x):
        return ops.linear(x, weight, bias, residual=residual)
    y = F.linear(x, weight, bias)
    return y if residual is None else y.add_(residual)


def refresh_parts(program: Any) -> None:
    """Calls `refresh` of every part of a program, at any depth, once: those that make something of their weights."""
    done = {id(program)}

    def go_through(values: Iterable[Any]) -> None:
        for value in values:
            if isinstance(value, (list, tuple)):
                go_through(value)
            elif type(value).__module__.startswith(f"{__package__}.") and id(value) not in done:
                done.add(id(value))
                if hasattr(value, "refresh"):
                    value.refresh()
                go_through(getattr(value, "__dict__", {}).values())

    go_through(vars(program).values())


class Product:
    """A layer that multiplies its input by a weight, in float8 if that has been asked for."""

    def _take(self, weight: Tensor, bias: Tensor | None, name: str) -> None:
        self.weight, self.bias, self.name = weight, bias, name
        self.float8: Float8Product | None = None
        self.observer: Callable[[Product, Tensor], None] | None = None  # of calibration
        self._kept = KeptWeight()

    def refresh(self) -> None:
        """Have what was made of the weight made again."""
        self._kept.forget()

    def _observe(self, x: Tensor) -> None:
        if self.observer is not None:
            self.observer(self, x)

    @property
    def scale_x(self) -> Tensor | None:
        """What the operation that makes its input should write it in float8 with; None where it takes no float8."""
        return None if self.float8 is None or self.observer is not None else self.float8.scale_x

    @property
    def matrix(self) -> Tensor:
        """The weight as it is multiplied by."""
        return self.weight

    def in_float8(self, scale: float) -> Float8Product:
        """The same in float8, with this scale of the inputs."""
        raise NotImplementedError

    def exact(self, x: Tensor) -> Tensor:
        """The product alone, in float32."""
        raise NotImplementedError


class Linear(Product):
    """x·Wᵀ + b [+ residual]; a 1×1 convolution is one too, over the channels of a channels-last map."""

    def __init__(self, module: Any, name: str) -> None:
        if isinstance(module, nn.Conv2d):
            plain(module, nn.Conv2d, name)
            if module.kernel_size != (1, 1) or module.stride != (1, 1) or module.groups != 1:
                raise NotPackableError(f"{name} is not a 1×1 convolution")
        else:
            plain(module, nn.Linear, name)
        self._take(module.weight, module.bias, name)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._observe(x)
        if self.float8 is not None:
            return self.float8(x, self.bias, residual)
        if not _by_library(x):
            return ops.linear(x, self.matrix, self.bias, residual=residual)
        y = self._product(x)
        return y if residual is None else y.add_(residual)

    def _product(self, x: Tensor) -> Tensor:
        y = self._kept.linear(x, self.matrix, self.bias)
        return F.linear(x, self.matrix, self.bias) if y is None else y

    def geglu(self, x: Tensor, scale_y: Tensor | None = None) -> Tensor:
        """value·GELU(gate) of the product's two halves; in float8 where there is a `scale_y`."""
        self._observe(x)
        if self.float8 is not None:
            return self.float8.geglu(x, self.bias, scale_y)
        if not _by_library(x):
            return ops.linear_geglu(x, self.matrix, self.bias, scale_y=scale_y)
        return ops.geglu(self._product(x), scale_y=scale_y)

    @property
    def matrix(self) -> Tensor:
        """The weight as [out, in]."""
        return self.weight if self.weight.ndim == 2 else self.weight.flatten(1)

    def in_float8(self, scale: float) -> Float8Product:
        """The same in float8, with this scale of the inputs."""
        return Float8Product(self.matrix, scale)

    def exact(self, x: Tensor) -> Tensor:
        """The product alone, in float32."""
        return F.linear(x.float(), self.matrix.float())


class Joined(Linear):
    """Several linear layers of one input as one, whose weights `pack` has joined."""

    def __init__(self, parts: Sequence[Linear], name: str) -> None:
        biases = [part.bias for part in parts if part.bias is not None]
        if biases and len(biases) != len(parts):
            raise NotPackableError(f"{name} has biases for some of its parts only")
        self._take(pack([part.weight for part in parts]), pack(biases) if biases else None, name)


class Conv(Product):
    """A convolution of a channels-last map [+ residual]."""

    def __init__(self, module: Any, name: str) -> None:
        plain(module, nn.Conv2d, name)
        if module.groups != 1 or module.dilation != (1, 1) or module.padding_mode != "zeros":
            raise NotPackableError(f"{name} is grouped, dilated or padded otherwise than with zeros")
        shape = (module.kernel_size, module.stride, module.padding)
        if any(a != b for a, b in shape) or shape[0][0] not in (1, 3) or shape[1][0] not in (1, 2) or shape[2][0] > 1:
            raise NotPackableError(f"{name} is no 1×1 or 3×3 convolution of stride 1 or 2")
        self._take(module.weight, module.bias, name)
        self.stride, self.padding = module.stride[0], module.padding[0]

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        self._observe(x)
        if self.float8 is not None:
            return self.float8(x, self.bias, residual)
        if not _by_library(x):
            return ops.conv2d(x, self.weight, self.bias, stride=self.stride, padding=self.padding, residual=residual)
        y = self._kept.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        if y is None:
            y = F.conv2d(x, self.weight, self.bias, self.stride, self.padding)
        return y if residual is None else y.add_(residual)

    def in_float8(self, scale: float) -> Float8Product:
        """The same in float8, with this scale of the inputs; of stride 1."""
        return Float8Convolution(self.weight, scale, self.padding)

    def exact(self, x: Tensor) -> Tensor:
        """The product alone, in float32."""
        return F.conv2d(x.float(), self.weight.float(), None, self.stride, self.padding)


class UpsampledConv:
    """Nearest-neighbour upsampling by two and a 3×3 convolution: Winograd's, or four 2×2 ones of summed weights."""

    def __init__(self, module: Any, name: str) -> None:
        from diffusers.models.upsampling import Upsample2D

        plain(module, Upsample2D, name)
        nothing_set(module, name, "use_conv_transpose", "norm")
        if not module.use_conv or not module.interpolate or module.name != "conv":
            raise NotPackableError(f"{name} is no upsampling followed by a convolution")
        conv = Conv(module.conv, f"{name}.conv")
        if module.conv.kernel_size != (3, 3) or conv.stride != 1 or conv.padding != 1:
            raise NotPackableError(f"{name}.conv is not 3×3 with padding 1")
        self.weight, self.bias = conv.weight, conv.bias
        self._phases: Tensor | None = None
        self._kept = KeptWeight()

    def refresh(self) -> None:
        """Sum the weights again, in place: a CUDA graph reads them where they are."""
        if self._phases is not None:
            self._phases.copy_(phase_weights(self.weight.data))
        self._kept.forget()

    def _summed(self) -> Tensor:
        if self._phases is None:
            with torch.inference_mode(False), torch.no_grad():  # else `refresh` could not write to it
                self._phases = phase_weights(self.weight.data)
        return self._phases

    def __call__(self, x: Tensor) -> Tensor:
        y = self._kept.upsample_conv2d(x, self.weight, self.bias) if _by_library(x) else None
        return ops.upsample_conv2d(x, self.weight, self.bias, phases=self._summed()) if y is None else y


class Norm:
    """GroupNorm [with SiLU] of a map."""

    def __init__(self, module: Any, name: str, *, activation: str) -> None:
        plain(module, nn.GroupNorm, name)
        self.weight, self.bias = module.weight, module.bias
        self.groups, self.eps, self.activation = module.num_groups, module.eps, activation

    def __call__(
        self, x: Tensor, shift: Tensor | None = None, scale_y: Tensor | None = None, skip: Tensor | None = None
    ) -> Tensor:
        how: dict[str, Any] = {"num_groups": self.groups, "eps": self.eps, "activation": self.activation}
        return ops.group_norm_silu(x, self.weight, self.bias, shift=shift, scale_y=scale_y, skip=skip, **how)


def read_in_place(x: Tensor) -> bool:
    """Whether a residual block reads its map and a skip connection's where they lie, instead of a copy of both.

    Not on a CPU: the norm is faster so, but the shortcut slower as two products. Milliseconds of both, from a copy / in
    place, one core of a Zen 4 EPYC (the other busy), torch 2.13: bfloat16, 1280+1280 channels 32x32 69.9/71.3,
    1280+640 64x64 104/111, 640+640 64x64 66/73, 640+320 128x128 110/120, 320+320 128x128 72/82, of which the norm
    1.8/1.4, 10.3/8.5, 7.7/7.0, 16.7/15.8, 11.8/9.2; float32, 144+96 8x8 .284/.316, eight of them .68/.73.
    On a GPU nothing has been measured; there the copy would be written and read once more.
    """
    return not x.is_cpu


class Shortcut(Conv):
    """A residual block's 1×1 convolution, of one map or of two side by side."""

    def __init__(self, module: Any, name: str) -> None:
        super().__init__(module, name)
        if module.kernel_size != (1, 1) or self.stride != 1 or self.padding != 0:
            raise NotPackableError(f"{name} is not a 1×1 convolution")

    def of_both(self, x: Tensor, skip: Tensor) -> Tensor:
        """Of the channels of x and then those of skip: a product each, with their columns of the weight.

        The second is added to the first where that lies, which takes no further pass over it.
        """
        first, second = self.weight.flatten(1).split((x.shape[1], skip.shape[1]), 1)
        y = linear(tokens(x), first, self.bias)
        y.flatten(0, 1).addmm_(tokens(skip).flatten(0, 1), second.t())
        return mapped(y, x)


class Resnet:
    """diffusers' `ResnetBlock2D`; its part of the time embedding comes projected.

    On the way up a skip connection's map comes beside its own.
    """

    def __init__(self, module: Any, name: str) -> None:
        from diffusers.models.resnet import ResnetBlock2D

        plain(module, ResnetBlock2D, name)
        if not isinstance(module.nonlinearity, nn.SiLU):
            raise NotPackableError(f"{name} has another activation than SiLU")
        timeless = module.time_emb_proj is None
        if module.time_embedding_norm != "default" and not (timeless and module.time_embedding_norm == "group"):
            raise NotPackableError(f"{name} has time_embedding_norm {module.time_embedding_norm!r}")
        nothing_set(module, name, "upsample", "downsample", "skip_time_act")
        self.norm1 = Norm(module.norm1, f"{name}.norm1", activation="silu")
        self.norm2 = Norm(module.norm2, f"{name}.norm2", activation="silu")
        self.conv1, self.conv2 = Conv(module.conv1, f"{name}.conv1"), Conv(module.conv2, f"{name}.conv2")
        shortcut = module.conv_shortcut
        self.shortcut = None if shortcut is None else Shortcut(shortcut, f"{name}.conv_shortcut")
        self.divisor = module.output_scale_factor
        self.time = None if timeless else Linear(module.time_emb_proj, f"{name}.time_emb_proj")

    def convolutions(self) -> list[Conv]:
        """Its two, and the shortcut's if there is one."""
        return [self.conv1, self.conv2] if self.shortcut is None else [self.conv1, self.conv2, self.shortcut]

    def __call__(self, x: Tensor, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        if skip is not None and (self.shortcut is None or not read_in_place(x)):
            x, skip = torch.cat((x, skip), 1), None
        h = self.conv1(self.norm1(x, scale_y=self.conv1.scale_x, skip=skip))
        h = self.conv2(self.norm2(h, shift, self.conv2.scale_x), self._around(x, skip))
        return h if self.divisor == 1.0 else h / self.divisor

    def _around(self, x: Tensor, skip: Tensor | None) -> Tensor:
        """What is added to the block's own result."""
        if self.shortcut is None:
            return x
        return self.shortcut(x) if skip is None else self.shortcut.of_both(x, skip)


def tokens(x: Tensor) -> Tensor:
    """[N, C, H, W] as [N, H·W, C]: a view of a channels-last map."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(n, h * w, c)


def mapped(x: Tensor, like: Tensor) -> Tensor:
    """[N, H·W, C] as a channels-last map of the height and width of `like`."""
    n, _, c = x.shape
    return x.view(n, like.shape[2], like.shape[3], c).permute(0, 3, 1, 2)
