"""Random numbers as a function of what is being drawn, so that a resumed run draws what an uninterrupted one would."""

from __future__ import annotations

import hashlib

import torch


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of `key`, e.g. `derive_seed(seed, rank, images_seen, "noise")`."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded by `derive_seed(*key)`."""
    return torch.Generator().manual_seed(derive_seed(*key))


def image_seeds(count: int, *key: int | str) -> torch.Tensor:
    """One int64 seed per sample, [count], for `ops.forward_diffusion`."""
    return torch.tensor([derive_seed(*key, index) for index in range(count)], dtype=torch.int64)
