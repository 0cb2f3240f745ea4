# SPDX-License-Identifier: Apache-2.0
"""Tries the papers' claims on the embedded model.

    sdxl-fast data emoji --out ~/.cache/sdxl_fast/data/emoji   # once: the pictures
    python -m benchmarks.claims                          # all, from the checkpoints in the repository
    python -m benchmarks.claims --only blur x0-form      # some
    python -m benchmarks.claims --report                 # the page anew from what has been measured
    python -m benchmarks.claims --start emoji-lightning  # from a finished run of your own

Each variant takes about 20 minutes on a core; all claims get one seed before the headline ones get their others. What
is done is kept, in `--out` and in the cache: the same command goes on where the last one was stopped, in the middle of
a training too, and as many as there are cores (`OMP_NUM_THREADS=1`) share the work.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from benchmarks.claims import page
from benchmarks.claims.claims import CLAIMS, ONE_SEED, Claim
from benchmarks.claims.start import COMMITTED, NotRunError, StoppedError
from benchmarks.claims.turns import BusyError
from benchmarks.claims.variants import VARIANTS, Variant
from benchmarks.claims.work import Options, Workshop

OUT = Path("benchmarks/claims/results")


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.claims", description=__doc__.partition("\n")[0])
    names = [claim.name for claim in CLAIMS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"claims: {', '.join(names)}")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of each claim's own (three or one)")
    parser.add_argument("--out", type=Path, default=OUT, help="results, sheets and claims.md")
    parser.add_argument(
        "--start", default=COMMITTED, help="run whose stages all go on from; by default the committed ones"
    )
    parser.add_argument("--set", nargs="+", default=[], metavar="A.B=VALUE", help="overrides of that run's recipe")
    parser.add_argument("--scale", type=float, default=1.0, help="of every length, to try it out")
    parser.add_argument("--pictures", type=int, default=1000, help="drawn per row")
    parser.add_argument("--report", action="store_true", help="run nothing, write the page from what is there")
    return parser.parse_args(argv)


def seeds_of(claim: Claim, variant: Variant, asked: Sequence[int] | None) -> Sequence[int]:
    """Of what is drawn as it is there is one of each."""
    trained = variant.recipe is not None or variant.base is not None
    return (asked or claim.seeds) if trained else ONE_SEED


def work_off(claims: Sequence[Claim], workshop: Workshop, seeds: Sequence[int] | None) -> list[str]:
    """Runs what the claims need, first seed first, and writes the page after each; the reasons of what was not run."""
    jobs = [
        (index, name, seed)
        for claim in claims
        for name in claim.variants
        for index, seed in enumerate(seeds_of(claim, VARIANTS[name], seeds))
    ]
    left = list(dict.fromkeys((name, seed) for _, name, seed in sorted(jobs, key=lambda job: job[0])))
    refused: dict[str, str] = {}
    while left:
        busy: dict[tuple[str, int], str] = {}
        for name, seed in left:
            try:
                workshop.result(VARIANTS[name], seed)
            except StoppedError as error:
                return [*_said(refused), str(error)]
            except BusyError as error:
                busy[name, seed] = str(error)
                continue
            except Exception as error:  # one variant that cannot be trained keeps none from being tried
                refused[name] = f"{type(error).__name__}: {error}"
                continue
            page.write(CLAIMS, workshop.options.out)
        if len(busy) == len(left):  # what others are at may be done by now, once something else has been
            return [*_said(refused), *busy.values()]
        left = list(busy)
    return _said(refused)


def _said(refused: dict[str, str]) -> list[str]:
    return [f"{name}: {reason}" for name, reason in refused.items()]


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    given = _arguments(argv)
    claims = [claim for claim in CLAIMS if given.only is None or claim.name in given.only]
    refused: list[str] = []
    if not given.report:
        lengths = {"pictures": given.pictures, "scale": given.scale}
        options = Options(given.start, given.out, settings=tuple(given.set), **lengths)
        try:
            refused = work_off(claims, Workshop(options), given.seeds)
        except NotRunError as error:
            print(error)
            return 2
    print(page.write(CLAIMS, given.out))
    for reason in refused:
        print(f"not run: {reason}")
    return 1 if refused else 0


if __name__ == "__main__":
    raise SystemExit(main())
