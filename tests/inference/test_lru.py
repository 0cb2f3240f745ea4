"""The cache by bytes: what it keeps, what it drops and when."""

from __future__ import annotations

import pytest

from sdxl_fast.inference.lru import ByteLru


def test_the_least_recently_used_goes_first() -> None:
    dropped: list[str] = []
    cache: ByteLru[str] = ByteLru(30, dropped=dropped.append)
    for key in "abc":
        assert cache.put(key, key.upper(), 10)
    assert cache.get("a") == "A"
    assert cache.put("d", "D", 15)
    assert dropped == ["B", "C"]
    assert list(cache) == ["a", "d"]
    assert (cache.used, cache.evictions) == (25, 2)


def test_what_never_fits_drops_nothing() -> None:
    cache: ByteLru[str] = ByteLru(30)
    cache.put("a", "A", 10)
    assert not cache.put("b", "B", 31)
    assert cache.get("b") is None
    assert cache.get("a") == "A"


def test_a_key_put_again_counts_once() -> None:
    cache: ByteLru[str] = ByteLru(30)
    cache.put("a", "A", 20)
    cache.put("a", "B", 25)
    assert (cache.get("a"), cache.used, len(cache)) == ("B", 25, 1)
    cache.drop("a")
    cache.drop("a")
    assert cache.used == 0


def test_a_negative_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="budget is -1"):
        ByteLru(-1)
