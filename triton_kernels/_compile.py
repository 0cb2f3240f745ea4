# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel for any GPU, on a machine with none, and reports its resources.

What is compiled is what would run: the host launchers are called on meta tensors of real shapes while `JITFunction.run`
only takes down the kernel, its argument types, constexprs and warps. A kernel that no case reaches is named, so the
list of cases cannot silently fall behind the code.

    python -m sdxl_fast.triton_kernels._compile --arch 90 [--arch 80 ...] [--json FILE]
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import json
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ._attention_config import Target, assuming
from ._compile_attention import TARGETS, cross_attention_cases, self_attention_cases, vae_attention_cases
from ._compile_heads import disc_head_cases, token_head_cases
from ._compile_matrix import conv2d_cases, linear_cases, linear_geglu_cases, upsample_conv2d_cases

_POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8", torch.float8_e4m3fn: "*fp8e4nv",
}  # fmt: skip
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What Triton 3.6 spills and 3.9 does not, in bytes a thread.
_OLD = tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7)
ALLOWED_SPILLS = {"self_attention_bwd_kv_kernel": 16, "self_attention_fwd_kernel": 8} if _OLD else {}


@dataclass(frozen=True)
class Launch:
    """One kernel as a launcher launched it; hashable, so equal launches compile once."""

    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible_by_16: tuple[int, ...]
    options: tuple[tuple[str, Any], ...]


@dataclass(frozen=True)
class Resources:
    """What the assembler gave one compiled kernel; stack bytes are register spills (no kernel has local arrays)."""

    kernel: str
    variant: str
    arch: int
    threads: int
    registers: int
    stack_bytes: int
    shared_bytes: int


def entry_points() -> dict[str, JITFunction]:
    """Every jit function of the folder named `..._kernel`, by name."""
    package = importlib.import_module(__package__)
    found: dict[str, JITFunction] = {}
    for info in pkgutil.iter_modules(package.__path__):
        if info.name.startswith("_"):
            continue
        module = importlib.import_module(f"{__package__}.{info.name}")
        found.update({n: f for n, f in vars(module).items() if isinstance(f, JITFunction) and n.endswith("_kernel")})
    return found


def _describe(fn: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    options = tuple(sorted((k, kwargs.pop(k)) for k in list(kwargs) if k not in fn.arg_names))
    bound = dict(zip(fn.arg_names, args, strict=False)) | kwargs
    signature, constants, divisible = [], [], []
    for index, param in enumerate(fn.params):
        value = bound[param.name]
        specialize = not param.do_not_specialize
        if param.is_constexpr or value is None or (type(value) is int and value == 1 and specialize):
            signature.append((param.name, "constexpr"))
            constants.append((param.name, value))
        elif isinstance(value, torch.Tensor):
            signature.append((param.name, _POINTER[value.dtype]))
            divisible.append(index)  # torch's allocations are aligned to far more than 16 bytes
        elif isinstance(value, int):
            signature.append((param.name, "i32" if -(2**31) <= value < 2**31 else "i64"))
            if value % 16 == 0 and specialize:
                divisible.append(index)
        else:
            signature.append((param.name, "fp32"))
    return Launch(fn.__name__, tuple(signature), tuple(constants), tuple(divisible), options)


@contextmanager
def recording() -> Iterator[dict[Launch, JITFunction]]:
    """Inside the block a launch runs nothing and is added to the yielded dict."""
    launches: dict[Launch, JITFunction] = {}

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        if max((*grid, 0, 0)[1:3]) > 65535 or grid[0] >= 2**31:
            raise ValueError(f"{self.__name__}: grid {grid} exceeds what CUDA launches")
        launches.setdefault(_describe(self, args, kwargs), self)

    original = JITFunction.run
    JITFunction.run = run
    try:
        yield launches
    finally:
        JITFunction.run = original


def _group_norm_silu_cases(dtype: torch.dtype) -> None:
    from .group_norm_silu import group_norm_silu_bwd, group_norm_silu_fwd

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    # A map of SDXL's UNet with every flag; one of its VAE, ragged channels, and more than 2^31 elements with one each.
    full = [("silu", dtype, True), ("none", torch.float32, False), ("silu", None, True)]
    shapes = [(1, 320, 128, 128, 32, full), (2, 6, 5, 3, 3, full[:1])]
    if dtype == torch.bfloat16:
        shapes += [(1, 128, 1024, 1024, 32, full[:1]), (2, 1024, 1024, 1025, 32, full[:1])]
    for n, c, h, w, groups, flags in shapes:
        for channels_last, (activation, params, shifted) in itertools.product((True, False), flags):
            x = empty(n, c, h, w)
            x = x.to(memory_format=torch.channels_last) if channels_last else x
            weight = bias = None if params is None else empty(c, like=params)
            shift = empty(n, c) if shifted else None
            y, mean, rstd = group_norm_silu_fwd(x, weight, bias, shift, groups, 1e-5, activation)
            group_norm_silu_fwd(x, weight, bias, shift, groups, 1e-5, activation, mean.view(-1)[:1])
            needs = (True, params is not None, params is not None, shifted)
            group_norm_silu_bwd(y, x, weight, bias, shift, mean, rstd, groups, activation, needs)
    # Skip connections: tiles as wide as the map's own, and narrower ones.
    for x_channels, skip_channels in ((640, 320), (320, 320), (48, 16)):
        channels = x_channels + skip_channels
        x, skip = (empty(1, c, 64, 64).to(memory_format=torch.channels_last) for c in (x_channels, skip_channels))
        weight, mean = empty(channels), empty(1, like=torch.float32)
        for scale_y in (None, mean):
            group_norm_silu_fwd(x, weight, weight, None, 16, 1e-5, "silu", scale_y, skip)


def _layer_norm_cases(dtype: torch.dtype) -> None:
    from .layer_norm import layer_norm_bwd, layer_norm_fwd

    for shape in ((4096, 640), (1024, 1280), (77, 2048), (7, 33), (300, 1999), (300, 4095), (2**22, 1280)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        mean = torch.empty(shape[0], device="meta")
        for params, residual in ((dtype, None), (torch.float32, x), (None, x)):
            weight = None if params is None else torch.empty(shape[1], dtype=params, device="meta")
            layer_norm_fwd(x, weight, weight, residual, 1e-5)
            layer_norm_fwd(x, weight, weight, residual, 1e-5, mean[:1])
            layer_norm_bwd(x, residual, x, weight, mean, mean, (True, True, True))
            layer_norm_bwd(x, residual, x, weight, mean, mean, (True, False, False))


def _geglu_cases(dtype: torch.dtype) -> None:
    from .geglu import geglu_bwd, geglu_fwd

    for approximate in ("none", "tanh"):
        for shape in ((4096, 2 * 2560), (1024, 2 * 5120), (7, 2 * 33), (2**21, 2 * 1280)):
            x = torch.empty(shape, dtype=dtype, device="meta")
            geglu_bwd(geglu_fwd(x, approximate), x, approximate)
            geglu_fwd(x, approximate, torch.empty(1, device="meta"))


def _forward_diffusion_cases(dtype: torch.dtype) -> None:
    from .forward_diffusion import forward_diffusion_bwd, forward_diffusion_fwd

    alphas_cumprod = torch.empty(1000, device="meta")
    for shape in ((4, 4, 128, 128), (2, 3, 5, 7), (1, 1024, 1024, 2049)):
        for channels_last in (True, False):
            x0 = torch.empty(shape, dtype=dtype, device="meta")
            x0 = x0.to(memory_format=torch.channels_last) if channels_last else x0
            index = torch.empty(shape[0], dtype=torch.int64, device="meta")
            for stream in (0, 2**40):
                x_t, noise = forward_diffusion_fwd(x0, alphas_cumprod, index, index, stream, None, 999)
            forward_diffusion_fwd(x0, alphas_cumprod, index, None, 0, noise, None)
            forward_diffusion_bwd(x_t, alphas_cumprod, index, 999)


def _ddim_move_cases(dtype: torch.dtype) -> None:
    from .ddim_move import ddim_move_bwd, ddim_move_fwd

    alphas_cumprod = torch.empty(1000, device="meta")
    kinds = ("epsilon", "sample", "v_prediction")
    outputs = (dtype, torch.bfloat16) if dtype == torch.float32 else (dtype,)
    for shape, output, kind in itertools.product(((4, 4, 128, 128), (2, 3, 5, 7)), outputs, kinds):
        x_t = torch.empty(shape, dtype=dtype, device="meta").to(memory_format=torch.channels_last)
        said = torch.empty_like(x_t, dtype=output)
        at = torch.empty(shape[0], dtype=torch.int64, device="meta")
        levels = (alphas_cumprod, at, at, kind)
        ddim_move_fwd(x_t, said, *levels, None, None, 0)
        for x in (x_t, x_t.contiguous()):
            ddim_move_fwd(x, said, *levels, at, at, 2**40)
        ddim_move_bwd(said, x_t, None, *levels, None, (True, True))
        ddim_move_bwd(said, x_t, x_t, *levels, at, (False, True))
        ddim_move_bwd(said, None, x_t, *levels, at, (True, False))


def _to_uint8_cases(dtype: torch.dtype) -> None:
    from .to_uint8 import to_uint8_fwd

    for shape in ((1, 3, 1024, 1024), (2, 5, 7, 3), (1, 3, 32768, 32769)):
        x = torch.empty(shape, dtype=dtype, device="meta")
        to_uint8_fwd(x)
        to_uint8_fwd(x.to(memory_format=torch.channels_last))


def _lora_merge_cases(dtype: torch.dtype) -> None:
    from .lora_merge import lora_merge_fwd

    def empty(*shape: int, like: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=like, device="meta")

    # All of SDXL's modules, and one of ragged sizes.
    for count, rows, cols, rank in ((788, 1280, 1280, 64), (3, 7, 33, 5)):
        for factors in _DTYPES:
            weights = [empty(rows, cols)] * count
            down, up = empty(rank, cols, like=factors), empty(rows, rank, like=factors)
            lora_merge_fwd(weights, weights, [down] * count, [up] * count, [1.0] * count)


CASES: tuple[Callable[[torch.dtype], None], ...] = (
    _group_norm_silu_cases,
    _layer_norm_cases,
    _geglu_cases,
    _forward_diffusion_cases,
    _ddim_move_cases,
    self_attention_cases,
    cross_attention_cases,
    vae_attention_cases,
    disc_head_cases,
    token_head_cases,
    _to_uint8_cases,
    _lora_merge_cases,
    upsample_conv2d_cases,
    linear_cases,
    linear_geglu_cases,
    conv2d_cases,
)


def all_launches(dtypes: tuple[torch.dtype, ...] = _DTYPES, arch: int = 90) -> dict[Launch, JITFunction]:
    """Every distinct launch of the cases on sm_<arch>. Raises ValueError naming the kernels that no case reaches."""
    with assuming(TARGETS.get(arch, Target(arch, 100))), recording() as launches:
        for dtype in dtypes:
            for case in CASES:
                case(dtype)
    missed = sorted(set(entry_points()) - {launch.kernel for launch in launches})
    if missed:
        raise ValueError(f"no compile case reaches {missed}; add one to CASES in {__name__}")
    return launches


def _resource_usage(cubin: bytes) -> tuple[int, int, int]:
    """(registers, stack + local bytes, static shared bytes) of the one kernel in a cubin."""
    nvidia = importlib.import_module("triton.backends.nvidia")
    tool = Path(next(iter(nvidia.__path__))) / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump reported no kernel: {text}")
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def compile_launch(launch: Launch, fn: JITFunction, arch: int) -> Resources:
    """Compiles one launch for sm_<arch>; Triton's cache makes the second time quick."""
    source = ASTSource(
        fn,
        dict(launch.signature),
        constexprs=dict(launch.constants),
        attrs={(index,): [["tt.divisibility", 16]] for index in launch.divisible_by_16},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(launch.options))
    registers, stack, shared = _resource_usage(compiled.asm["cubin"])
    types = [kind for _, kind in launch.signature if kind != "constexpr"]
    flags = [f"{name}={value}" for name, value in launch.constants]
    # Shared memory of a Triton kernel is dynamic: it is in the metadata, not in the cubin.
    shared = max(shared, compiled.metadata.shared)
    threads = 32 * compiled.metadata.num_warps
    return Resources(launch.kernel, " ".join(types + flags), arch, threads, registers, stack, shared)


def main(argv: list[str] | None = None) -> int:
    """Compiles, prints a table of the worst case per kernel and arch; exit code 1 if anything spills that may not."""
    parser = argparse.ArgumentParser(description="Compile every Triton kernel without a GPU.")
    parser.add_argument("--arch", type=int, action="append", help="compute capability, as 90 (repeatable)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], action="append")
    parser.add_argument("--json", type=Path, help="write every result here")
    args = parser.parse_args(argv)
    dtypes = tuple(getattr(torch, name) for name in args.dtype) if args.dtype else _DTYPES
    results = [
        compile_launch(launch, fn, arch)
        for arch in args.arch or [90]
        for launch, fn in all_launches(dtypes, arch).items()
    ]
    if args.json:
        args.json.write_text(json.dumps([asdict(result) for result in results], indent=1))
    print(f"triton {triton.__version__}: {len(results)} kernels compiled")
    print(f"{'kernel':44} {'sm':>4} {'variants':>8} {'registers':>9} {'stack':>6} {'shared':>7}")
    for name in sorted({r.kernel for r in results}):
        for arch in sorted({r.arch for r in results}):
            of = [r for r in results if r.kernel == name and r.arch == arch]
            worst = (max(r.registers for r in of), max(r.stack_bytes for r in of), max(r.shared_bytes for r in of))
            print(f"{name:44} {arch:>4} {len(of):>8} {worst[0]:>9} {worst[1]:>6} {worst[2]:>7}")
    return int(any(r.stack_bytes > ALLOWED_SPILLS.get(r.kernel, 0) for r in results))


if __name__ == "__main__":
    sys.exit(main())
