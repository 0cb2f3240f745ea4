# SPDX-License-Identifier: Apache-2.0
"""How group_norm_silu is cut into CUDA blocks (a pure host function), and that the emulation notices misuse."""

from __future__ import annotations

import ctypes
import itertools
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).parent.parent / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")

pytestmark = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")

# (N, C, H*W, groups): the UNet at 512, 1024 and 1536 px, the VAE, the discriminator's heads, ragged and extreme shapes.
SDXL = [
    *((n, c, (size // 8) ** 2 // 4**level, 32) for n in (1, 8) for size in (512, 1024, 1536)
      for level, widths in enumerate(((320, 640, 960), (320, 640, 960, 1280, 1920), (640, 1280, 1920, 2560)))
      for c in widths),
    *((1, c, pixels, 32) for c, pixels in ((512, 2**14), (512, 2**16), (512, 2**18), (256, 2**18), (256, 2**20),
                                          (128, 2**20))),
]  # fmt: skip
ODD = [(1, 1, 1, 1), (3, 15, 35, 5), (2, 12, 1, 3), (1, 1030, 3, 2), (1, 4096, 2, 1), (65536, 8, 4, 2),
       (1, 6, 2**31, 3), (2, 20000, 16, 1), (1, 7, 10**6 + 3, 7), (40, 64, 64, 64)]  # fmt: skip
MULTIPROCESSORS = (1, 84, 108, 132, 148, 188, 256, 1000)


class Geometry(NamedTuple):
    chunk: int
    chunks: int
    entries: int
    tile_entries: int
    tiles: int
    tx: int
    ty: int
    threads: int
    sub_channels: int
    subs: int


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    target = tmp_path_factory.mktemp("geometry") / "libgeometry.so"
    source = CSRC / "cuda" / "emulation" / "emulation.cpp"
    command = [str(COMPILER), "-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror"]
    built = subprocess.run([*command, str(source), "-o", str(target)], capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    return ctypes.CDLL(str(target))


def _geometry(library: ctypes.CDLL, shape: tuple[int, ...], nhwc: bool, vec: int, sms: int) -> Geometry | None:
    out = (ctypes.c_int64 * 10)()
    sizes = [ctypes.c_int64(size) for size in shape]
    ok = library.sdxl_fast_emulation_group_norm_geometry(*sizes, int(nhwc), vec, ctypes.c_int64(sms), out)
    return Geometry(*out) if ok else None


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
@pytest.mark.parametrize("shape", [*SDXL, *ODD], ids=str)
def test_every_element_has_one_thread(library: ctypes.CDLL, shape: tuple[int, ...], nhwc: bool) -> None:
    _, c, hw, groups = shape
    group_channels = c // groups
    assert _geometry(library, shape, nhwc, 1, 132) is not None  # one element at a time always works
    for vec, sms in itertools.product((1, 4, 8), MULTIPROCESSORS):
        g = _geometry(library, shape, nhwc, vec, sms)
        if g is None:
            continue
        assert g.chunks * g.chunk >= hw > (g.chunks - 1) * g.chunk
        assert g.subs * g.sub_channels >= group_channels > (g.subs - 1) * g.sub_channels
        assert g.entries == groups * g.subs
        assert g.threads % 32 == 0 and 0 < g.threads <= 320
        if nhwc:
            assert g.tiles * g.tile_entries >= g.entries > (g.tiles - 1) * g.tile_entries
            assert g.tx * vec >= g.tile_entries * g.sub_channels and g.tx <= 40
            assert g.tx * g.ty <= g.threads and g.ty >= 1
            # The tile's first channel is a whole vector away from the row's: every access is aligned.
            assert (g.tile_entries * g.sub_channels) % vec == 0 or g.tiles == 1
            assert g.sub_channels % vec == 0 or g.subs == 1
        else:
            assert g.sub_channels == 1 and hw % vec == 0 and g.chunk % vec == 0
            assert g.tiles * 8 >= group_channels * g.chunks > (g.tiles - 1) * 8


@pytest.mark.parametrize("nhwc", [True, False], ids=["nhwc", "nchw"])
def test_sdxl_maps_fill_the_gpu_with_wide_accesses(library: ctypes.CDLL, nhwc: bool) -> None:
    for shape, sms in itertools.product(SDXL, (108, 132, 148)):
        n, c, hw, groups = shape
        g = _geometry(library, shape, nhwc, 8, sms)
        assert g is not None, "every SDXL map takes 16-byte accesses of 16-bit types"
        blocks = n * g.tiles * (g.chunks if nhwc else groups)
        if n * c * hw >= 2**22:  # 8 MB of bf16
            assert blocks >= 0.8 * sms
        if nhwc:
            assert g.tx * g.ty >= 0.9 * g.threads, "idle threads"
            # What all blocks read of each other's moments, next to the map itself.
            merged = blocks * g.chunks * g.tile_entries * 8
            assert merged <= 0.5 * n * c * hw * 2


def test_workspace_is_enough_on_any_device(library: ctypes.CDLL) -> None:
    """It may not depend on the current device, whose multiprocessors decide the number of chunks."""
    workspace = library.sdxl_fast_emulation_group_norm_workspace
    workspace.restype = ctypes.c_int64
    for shape, nhwc in itertools.product([*SDXL, *ODD], (True, False)):
        n, c, _, groups = shape
        sizes = [ctypes.c_int64(size) for size in shape]
        forward, backward = (workspace(*sizes, int(nhwc), direction) for direction in (0, 1))
        for vec, sms in itertools.product((1, 4, 8), MULTIPROCESSORS):
            g = _geometry(library, shape, nhwc, vec, sms)
            if g is not None:
                assert forward >= 8 * n * g.chunks * g.entries
                assert backward >= 4 * (3 * n * g.chunks * c + 2 * n * groups + 3 * n * c)
        assert forward <= max(2**26, 16 * n * c)


def test_misuse_of_the_machine_is_reported(library: ctypes.CDLL) -> None:
    """What would hang or crash a GPU must not pass in the emulation."""
    skipped_barrier, skipped_shuffle, ragged_block, correct = range(4)
    misuse = library.sdxl_fast_emulation_misuse
    assert misuse(skipped_barrier) == misuse(skipped_shuffle) == 719  # cudaErrorLaunchFailure
    assert misuse(ragged_block) == 9  # cudaErrorInvalidConfiguration
    assert misuse(correct) == 0
