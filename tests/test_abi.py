# SPDX-License-Identifier: Apache-2.0
"""The C library: its symbols are the header's, it opens without torch, its vector paths and threads agree."""

from __future__ import annotations

import ctypes
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from sdxl_fast import native, ops, use_backend
from sdxl_fast.dispatch import registry
from sdxl_fast.ops import _attention_cpu

ROOT = Path(__file__).parent.parent
HEADER = (ROOT / "csrc" / "include" / "sdxl_fast.h").read_text()
PROTOTYPES = dict(re.findall(r"SDXL_FAST_API [\w ]+\*? ?(sdxl_fast_\w+)\(([^)]*)\)", HEADER))
# To these come the matrix ops, whose derivative is the library's.
WITHOUT_DERIVATIVE = {"conv2d", "linear", "linear_geglu", "lora_merge", "to_uint8", "upsample_conv2d"}
KERNELS = sorted(p.stem for p in (ROOT / "csrc" / "cpu").glob("*.cpp") if "SDXL_FAST_ISA" in p.read_text())


def _symbols(*flags: str, path: Path) -> list[str]:
    """Lines of `nm`, which every machine with a compiler has."""
    nm = shutil.which("nm")
    if nm is None:
        pytest.skip("no nm")
    return subprocess.run([nm, *flags, str(path)], capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.fixture
def isa():
    """Forces a vector path for the test; yields the function that does it."""
    binding = native.load()

    def force(name: str) -> None:
        if binding.set_cpu_isa(name):
            pytest.skip(f"this CPU or build has no {name}")
        assert binding.cpu_isa() == name

    yield force
    assert binding.set_cpu_isa("auto") == 0


# ---- symbols ----


def test_the_header_was_understood():
    assert len(PROTOTYPES) == HEADER.count("SDXL_FAST_API") - HEADER.count("#define SDXL_FAST_API")
    assert len(PROTOTYPES) >= 20


def test_abi_numbers_agree():
    number = int(re.search(r"#define SDXL_FAST_ABI (\d+)", HEADER).group(1))
    assert native.load().abi() == native.load().HEADER_ABI == native.ABI == number
    assert native.build_info()["abi"] == number


@pytest.mark.skipif(sys.platform != "linux", reason="symbol tables are read as ELF")
def test_exports_are_the_header_and_nothing_else():
    exported = {line.split()[-1] for line in _symbols("-D", "--defined-only", path=native.library_path())}
    assert exported == set(PROTOTYPES)


@pytest.mark.skipif(sys.platform != "linux", reason="symbol tables are read as ELF")
def test_library_needs_neither_python_nor_torch():
    undefined = [line.split()[-1] for line in _symbols("-D", "--undefined-only", path=native.library_path())]
    foreign = [name for name in undefined if re.match(r"_?Py|.*(torch|c10|at6Tensor|pybind)", name)]
    assert undefined and not foreign


@pytest.mark.parametrize("op", sorted(registry()))
def test_every_op_has_its_functions(op):
    """On every device where the registry says the op is native; attention is one function for the three."""
    symbol = "attention" if op.endswith("_attention") else op
    for device, direction in itertools.product(("cpu", "cuda"), ("fwd", "bwd")):
        wanted = registry()[op].backend(device) is not None and (direction == "fwd" or op not in WITHOUT_DERIVATIVE)
        assert (f"sdxl_fast_{symbol}_{direction}_{device}" in PROTOTYPES) == wanted
        assert hasattr(native.load(), f"{symbol}_{direction}_{device}") == wanted


def test_the_binding_has_every_function_with_its_arguments():
    for name, arguments in PROTOTYPES.items():
        function = getattr(native.load(), name.removeprefix("sdxl_fast_"))
        count = 0 if arguments.strip() in ("", "void") else arguments.count(",") + 1
        signature = function.__doc__.splitlines()[0]
        assert len(re.findall(r"arg\d+:", signature)) == count, signature


@pytest.mark.skipif(sys.platform != "linux", reason="symbol tables are read as ELF")
@pytest.mark.parametrize("kernel", KERNELS)
def test_no_vector_code_leaks(kernel, tmp_path):
    """A function with external linkage outside its instruction set's namespace could replace its twin for old CPUs."""
    compiler = shutil.which("c++")
    if compiler is None or os.uname().machine != "x86_64":
        pytest.skip("needs an x86-64 C++ compiler")
    source, out = ROOT / "csrc" / "cpu" / f"{kernel}.cpp", tmp_path / "kernel.o"
    flags = ["-mavx2", "-mfma", "-mf16c", *(f"-mavx512{part}" for part in ("f", "bw", "dq", "vl"))]
    include = [f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'csrc' / 'include'}"]
    # -O0 keeps out of line whatever may be out of line.
    command = [compiler, "-std=c++17", "-O0", "-DSDXL_FAST_ISA=avx512", *flags, *include, "-c", source, "-o", out]
    subprocess.run(command, check=True, capture_output=True)
    defined = [line.split(maxsplit=2)[1:] for line in _symbols("-C", "--defined-only", "--extern-only", path=out)]
    names = [name for _, name in defined]
    assert names and all(name.startswith("sdxl_fast::avx512::") for name in names), names
    assert {kind for kind, _ in defined} == {"T"}, "weak symbols are merged by the linker"


# ---- without torch ----

# Opens the library by itself; `call` gives the C function with types from the header; arrays are ctypes'.
PRELUDE = """
import array, ctypes, json, os, sys, threading
library, prototypes = ctypes.CDLL(sys.argv[1]), json.loads(sys.argv[2])
TYPES = {"int32_t": ctypes.c_int32, "int64_t": ctypes.c_int64, "double": ctypes.c_double}
def call(name, *args):
    function = getattr(library, name)
    kinds = [a.split()[:-1] for a in prototypes[name].split(",")]
    function.argtypes = [ctypes.c_void_p if "*" in " ".join(k) else TYPES[k[-1]] for k in kinds]
    function.restype = ctypes.c_int64 if "workspace" in name else ctypes.c_int32
    return function(*args)
N, C, HW, G = 2, 64, 4096, 8
x = (ctypes.c_float * (N * C * HW))(*((i * 7919 % 1009) / 100.0 for i in range(N * C * HW)))
space = call("sdxl_fast_group_norm_silu_workspace_cpu", N, C, HW, G, 0, 0)
def norm(threads):
    y, work = (ctypes.c_float * len(x))(), (ctypes.c_double * (space // 8 + 8))()
    mean, rstd = (ctypes.c_float * (N * G))(), (ctypes.c_float * (N * G))()
    at = ctypes.addressof(work)
    status = call("sdxl_fast_group_norm_silu_fwd_cpu", x, None, None, None, None, y, mean, rstd, at + -at % 64,
                  N, C, 0, HW, G, 1e-5, 0, 1, 0, 0, threads)
    assert status == 0, status
    return bytes(y)
"""


def _alone(code: str, *, timeout: float = 120) -> str:
    """Runs code after PRELUDE in a fresh interpreter, where torch must stay out unless the code asks for it."""
    script = PRELUDE + textwrap.dedent(code)
    prototypes = json.dumps({k: re.sub(r"\s+", " ", v.replace("*", "* ")) for k, v in PROTOTYPES.items()})
    run = subprocess.run(
        [sys.executable, "-c", script, str(native.library_path()), prototypes],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_opens_and_computes_without_torch():
    out = _alone("""
        norm(1)
        library.sdxl_fast_cpu_threading.restype = ctypes.c_char_p
        print(library.sdxl_fast_abi(), library.sdxl_fast_cpu_threading().decode(), "torch" in sys.modules)
    """)
    assert out.split() == [str(native.ABI), "pool", "False"]


def test_own_threads_agree_with_one_survive_a_fork_and_serve_several_callers():
    """The pool that serves where no OpenMP runtime is loaded."""
    out = _alone("""
        one = norm(1)
        print(all(norm(4) == one for _ in range(20)))
        child = os.fork()
        if child == 0:
            os._exit(0 if norm(3) == one else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0)
        same = []
        several = lambda: same.append(all(norm(3) == one for _ in range(5)))
        callers = [threading.Thread(target=several) for _ in range(4)]
        [t.start() for t in callers]; [t.join() for t in callers]
        print(same == [True] * 4)
    """)
    assert out.split() == ["True"] * 3


def test_a_forked_child_of_a_torch_process_does_not_hang():
    """OpenMP's threads do not survive a fork, and its runtime would wait for them."""
    out = _alone("""
        import torch
        torch.set_num_threads(2)
        torch.ones(1 << 20).exp().sum()
        one = norm(1)
        library.sdxl_fast_cpu_threading.restype = ctypes.c_char_p
        before = library.sdxl_fast_cpu_threading().decode()
        assert norm(2) == one
        child = os.fork()
        if child == 0:
            os._exit(0 if norm(2) == one and library.sdxl_fast_cpu_threading() == b"pool" else 1)
        print(before, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    """)
    # torch is built with OpenMP on Linux; elsewhere the pool serves both.
    assert out.split()[1] == "0" and out.split()[0] == ("openmp" if sys.platform == "linux" else out.split()[0])


# ---- statuses ----


def test_bad_arguments_get_a_status_not_a_crash():
    binding, x = native.load(), torch.zeros(4, 8)
    p = x.data_ptr()
    assert binding.geglu_fwd_cpu(p, p, 1, 4, 0, 9, 1) == 2
    assert binding.geglu_fwd_cpu(p, p, -1, 4, 0, 0, 1) == 1
    assert binding.geglu_fwd_cpu(p, p, 1, 4, 7, 0, 1) == 1
    assert binding.geglu_fwd_cpu(0, 0, 1, 4, 0, 0, 1) == 1
    assert binding.geglu_fwd_cpu(0, 0, 0, 4, 0, 0, 1) == 0
    group_norm = (p, 0, 0, 0, 0, p, p, p, p)
    assert binding.group_norm_silu_fwd_cpu(*group_norm, 1, 6, 0, 1, 4, 1e-5, 0, 1, 0, 0, 1) == 1, "4 does not divide 6"
    assert binding.group_norm_silu_fwd_cpu(*group_norm, 1, 8, 0, 1, 4, -1.0, 0, 1, 0, 0, 1) == 1
    assert binding.group_norm_silu_fwd_cpu(*group_norm, 1, 8, 0, 1, 4, math.nan, 0, 1, 0, 0, 1) == 1
    assert binding.group_norm_silu_fwd_cpu(*group_norm, 1, 8, 0, 1, 4, 1e-5, 0, 1, 2, 3, 1) == 2
    two = (p, p, *group_norm[2:])
    for c, c_skip, layout in ((32, 8, 0), (32, 32, 0), (32, -16, 0), (40, 16, 0), (32, 16, 1), (32, 0, 0)):
        sizes = (1, c, c_skip, 1, 4, 1e-5, layout, 1, 0, 0, 1)
        assert binding.group_norm_silu_fwd_cpu(*two, *sizes) == 1, "no two tensors that the kernel reads together"
    assert binding.group_norm_silu_fwd_cpu(*group_norm, 1, 32, 16, 1, 4, 1e-5, 0, 1, 0, 0, 1) == 1, "no skip"
    assert binding.forward_diffusion_fwd_cpu(p, p, p, p, p, p, p, 1, 1, 1, 1, 1, 0, -1, 0, 0, 1) == 1
    assert binding.forward_diffusion_bwd_cpu(p, p, p, p, 0, 1, 1, -1, 0, 1) == 0
    assert binding.to_uint8_fwd_cpu(p, p, 1, 3, 1, 2, 0, 1) == binding.to_uint8_fwd_cpu(p, p, 1, -3, 1, 0, 0, 1) == 1
    assert binding.to_uint8_fwd_cpu(p, p, 1, 3, 1, 0, 4, 1) == 2
    norm = (p, 0, 0, 0, p, 0, p, p, 1, 8)
    assert binding.layer_norm_fwd_cpu(*norm, -1.0, 0, 0, 1) == binding.layer_norm_fwd_cpu(*norm, math.nan, 0, 0, 1) == 1
    assert binding.layer_norm_fwd_cpu(*norm, 1e-5, 2, 3, 1) == 2
    assert binding.layer_norm_fwd_cpu(p, p, *norm[2:], 1e-5, 0, 0, 1) == 1, "a residual without a sum"
    assert binding.layer_norm_bwd_cpu(p, 0, p, p, p, p, p, p, 0, 0, 1, 8, 0, 0, 1) == 1, "no workspace"
    move = (p, p, p, p, p, 0, 0, p, 0, 1, 1, 1, 1, 1, 0)
    assert binding.ddim_move_fwd_cpu(*move, 3, 0, 0, 0, 1) == 1, "no such prediction"
    assert binding.ddim_move_fwd_cpu(*move, 0, 0, 2, 0, 1) == 2, "an output wider than x_t"
    assert binding.ddim_move_fwd_cpu(*move[:6], p, *move[7:], 0, 0, 0, 0, 1) == 1, "seeds without timesteps"
    assert binding.ddim_move_bwd_cpu(0, 0, p, p, p, 0, p, p, 1, 1, 1, 0, 0, 0, 1) == 1, "no gradient comes in"

    attention = (p, p, p, p, 0, 1, 2, 2, 1, 8, *(16, 8, 8) * 3)
    assert binding.attention_fwd_cpu(*attention, 0.5, 0, 1) == 0
    assert binding.attention_fwd_cpu(*attention, math.nan, 0, 1) == 1
    assert binding.attention_fwd_cpu(*attention[:7], 257, *attention[8:], 0.5, 0, 1) == 1, "too many keys"
    assert binding.attention_fwd_cpu(*attention, 0.5, 4, 1) == 2
    convolution = (p, p, p, p, 1, 2, 2, 4, 4)
    assert binding.packed_conv2d_fwd_cpu(*convolution, 5, 1, 1, 1) == 1, "no such kernel"
    assert binding.packed_conv2d_fwd_cpu(*convolution, 3, 1, 0, 1) == 1, "larger than the map"
    assert binding.packed_conv2d_fwd_cpu(0, 0, 0, 0, 0, 2, 2, 4, 4, 3, 1, 1, 1) == 0
    assert binding.winograd_conv2d_fwd_cpu(p, p, p, p, 1, 2, 2, 513, 4, 0, 1) == 1, "more channels than it has room for"
    assert binding.winograd_conv2d_fwd_cpu(*convolution, 2, 1) == 1, "neither doubled nor not"
    assert binding.winograd_conv2d_fwd_cpu(0, 0, 0, 0, 0, 2, 2, 4, 4, 0, 1) == 0
    gradient = (p, p, p, p, 0, 0, 0, 0, 1, 2, 2, 1, 8, *(16, 8, 8) * 4)
    assert binding.attention_bwd_cpu(*gradient, 0.5, 0, 1) == 1, "no log-sum-exp"

    def merge(*module: int, dtypes: tuple[int, int] = (0, 0), count: int = 1) -> int:
        table = torch.tensor([*module, 0, 0], dtype=torch.int64)
        return binding.lora_merge_fwd_cpu(table.data_ptr(), count, *dtypes, 1)

    assert merge(p, p, p, p, 2, 2, 1) == merge(0, 0, 0, 0, 0, 5, 1) == merge(p, p, 0, 0, 2, 2, 0) == 0
    assert merge(p, 0, p, p, 2, 2, 1) == merge(p, p, 0, p, 2, 2, 1) == merge(p, p, p, p, -1, 2, 1) == 1
    assert merge(p, p, p, p, 2, 2, 1, count=-1) == binding.lora_merge_fwd_cpu(0, 1, 0, 0, 1) == 1
    assert merge(p, p, p, p, 2, 2, 1, dtypes=(0, 1)) == merge(p, p, p, p, 2, 2, 1, dtypes=(7, 0)) == 2
    for status in (0, 1, 2, 3, 1700, -5):
        assert binding.status_text(status)


@pytest.mark.skipif(native.unavailable_reason("cuda") is None, reason="this build has CUDA and a GPU")
def test_without_a_gpu_cuda_functions_say_so():
    x = torch.ones(4, 8)
    status = native.load().geglu_fwd_cuda(x.data_ptr(), x.data_ptr(), 4, 4, 0, 0, 0)
    assert status == 3 if native.build_info()["cuda"] is None else status >= 1000
    assert native.load().status_text(status)


# ---- vector paths and threads ----


def _everything(dtype: torch.dtype, n: int = 2) -> list[torch.Tensor]:
    """Outputs and gradients of every op on ragged shapes."""
    torch.manual_seed(1)
    found: list[torch.Tensor] = []
    with use_backend("cpu"):
        for shape, groups in (((n, 20, 33, 7), 5), ((n, 64, 40, 24), 32)):
            for form in (torch.contiguous_format, torch.channels_last):
                x = (torch.randn(shape) * 2 + 1).to(dtype).contiguous(memory_format=form).requires_grad_()
                weight, bias, shift = (torch.randn(s).to(dtype) for s in (shape[1], shape[1], shape[:2]))
                leaves = [x, *(t.requires_grad_() for t in (weight, bias, shift))]
                y = ops.group_norm_silu(x, weight, bias, num_groups=groups, shift=shift)
                found += [y, *torch.autograd.grad(y, leaves, torch.randn(shape).to(dtype))]
                steps, seeds = torch.arange(n) * 3, torch.arange(n) * 2**33 - 1
                found += ops.forward_diffusion(
                    x.detach(), alphas_cumprod=torch.linspace(0.99, 0.1, 10), timesteps=steps, seeds=seeds, stream=2**40
                )
                levels = {
                    "timesteps": steps,
                    "next_timesteps": steps - 1,
                    "alphas_cumprod": torch.linspace(0.99, 0.1, 10),
                }
                for kind in ("epsilon", "sample", "v_prediction"):
                    output = torch.randn(shape).to(dtype).contiguous(memory_format=form).requires_grad_()
                    noising = {"renoise_timesteps": 9 - steps, "seeds": seeds, "stream": 2**40}
                    y = ops.ddim_move(x, output, prediction_type=kind, **levels, **noising)
                    found += [*y, *torch.autograd.grad(y, (x, output), [torch.ones_like(t) for t in y])]
        for form in (torch.contiguous_format, torch.channels_last):
            found.append(ops.to_uint8(torch.randn(n, 3, 33, 47).to(dtype).contiguous(memory_format=form)))
        for cols in (1009, 640, 5003):
            x, residual = ((torch.randn(13 * n, cols) * 2 + 1).to(dtype).requires_grad_() for _ in range(2))
            weight, bias = (torch.randn(cols).to(dtype).requires_grad_() for _ in range(2))
            y = ops.layer_norm(x, weight, bias, residual=residual)
            found += [*y, *torch.autograd.grad(y, (x, weight, bias), [torch.randn(13 * n, cols).to(dtype)] * 2)]
        for rows, cols, rank in ((70 * n, 133, 5), (64, 640, 40)):
            merged = torch.randn(rows, cols).to(dtype)
            ops.lora_merge(
                [merged], [torch.randn(rank, cols).to(dtype)], [torch.randn(rows, rank).to(dtype)], scales=0.1
            )
            found.append(merged)
        for tokens, keys, heads, channels in ((150, 77, 2, 64), (7, 19, 3, 24), (40, 3, 1, 33)):
            q, k, v = (
                torch.randn(n, count, heads, channels).to(dtype).requires_grad_() for count in (tokens, keys, keys)
            )
            y = ops.cross_attention(q, k, v)
            found += [y, *torch.autograd.grad(y, (q, k, v), torch.randn(y.shape).to(dtype))]
        stream = _attention_cpu.streamed(native.load(), kept=True)  # the registry asks for AVX-512
        for tokens, keys, heads, channels in ((50, 600, 2, 64), (7, 259, 3, 41), (40, 3, 1, 500)):
            q, k, v = (torch.randn(n, count, heads, channels).to(dtype) for count in (tokens, keys, keys))
            found += stream(q, k, v + 1, None)
        for approximate in ("none", "tanh"):
            x = (torch.randn(13, 2 * 1009) * 3).to(dtype).requires_grad_()
            y = ops.geglu(x, approximate=approximate)
            found += [y, *torch.autograd.grad(y, x, torch.randn(13, 1009).to(dtype))]
    return [t.detach() for t in found]


@pytest.mark.parametrize("name", ["avx2", "avx512", "avx512_bf16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_vector_paths_agree_within_rounding(name, dtype, isa):
    isa("baseline")
    expected = _everything(dtype)
    isa(name)
    # Each path may be off by its own rounding: two units of the dtype, and for sums the cancellation within them.
    unit = torch.finfo(dtype).eps
    for got, want in zip(_everything(dtype), expected, strict=True):
        scale = want.float().abs().max().item()
        torch.testing.assert_close(got.float(), want.float(), rtol=4 * unit, atol=2 * unit * scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_threads_do_not_change_a_bit(dtype):
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(_everything(dtype))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels_last"])
def test_a_sample_does_not_depend_on_its_batch(form):
    x = torch.randn(5, 32, 48, 40).contiguous(memory_format=form)
    with use_backend("cpu"):
        together = ops.group_norm_silu(x, None, None, num_groups=8)
        alone = [ops.group_norm_silu(x[i : i + 1], None, None, num_groups=8) for i in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_the_library_opens_twice():
    """A second open is the same library: forcing a path through one handle is seen through the other."""
    library = ctypes.CDLL(str(native.library_path()))
    library.sdxl_fast_cpu_isa.restype = ctypes.c_char_p
    assert library.sdxl_fast_set_cpu_isa(b"baseline") == 0
    try:
        assert native.load().cpu_isa() == "baseline"
    finally:
        assert library.sdxl_fast_set_cpu_isa(b"auto") == 0
