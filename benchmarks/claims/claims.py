# SPDX-License-Identifier: Apache-2.0
"""What the papers say, as comparisons of variants. L is SDXL-Lightning (arXiv 2402.13929), A is ADD (2311.17042)."""

from __future__ import annotations

from dataclasses import dataclass

THREE_SEEDS, ONE_SEED = (0, 1, 2), (0,)
FROM_NOTHING = "Twenty minutes from random weights are far from convergence; top-5 by chance is 0.012."


@dataclass(frozen=True)
class Comparison:
    """`first` is claimed to have the better `metric` than `second`, or with `strict=False` at least no worse a one.

    Sides are "variant@steps".
    """

    first: str
    second: str
    metric: str
    strict: bool = True


@dataclass(frozen=True)
class Claim:
    """A sentence of a paper, or a question put to one, and what would show it.

    Attributes:
        name: unique; of its contact sheet.
        says: the claim, ending without a full stop.
        source: section or table of the paper.
        comparisons: all must hold.
        seeds: each variant is trained once with each.
        also: variants shown beside those compared.
        note: what a reader has to know to judge the comparison.
    """

    name: str
    says: str
    source: str
    comparisons: tuple[Comparison, ...]
    seeds: tuple[int, ...] = ONE_SEED
    also: tuple[str, ...] = ()
    note: str = ""

    @property
    def sides(self) -> list[str]:
        """Every "variant@steps" of the claim once, in order."""
        named = [side for c in self.comparisons for side in (c.first, c.second)]
        return list(dict.fromkeys([*named, *self.also]))

    @property
    def variants(self) -> list[str]:
        """Names of what it needs trained or drawn."""
        return list(dict.fromkeys(side.partition("@")[0] for side in self.sides))


def _all(metric: str, *pairs: tuple[str, str], strict: bool = True) -> tuple[Comparison, ...]:
    return tuple(Comparison(first, second, metric, strict) for first, second in pairs)


CLAIMS: tuple[Claim, ...] = (
    Claim(
        "blur",
        "At 4 steps and at 1 an adversarial loss keeps pictures sharp where regression on the teacher blurs them",
        "L §3.1",
        _all("sharpness", ("four-d@4", "four-mse@4"), ("one-d@1", "one-mse@1")),
        THREE_SEEDS,
        ("start-8-step@8", "start-1-step@1"),
        "At 1 step the adversarial loss stands beside regression, as in the recipe; see balance for it alone.",
    ),
    Claim(
        "relaxed-d",
        "Going on with D', which does not see where the step began, makes better pictures than D alone",
        "L §3.4",
        _all("kid_excess", ("four-d-then-d-prime@4", "four-d@4"), ("one-d-then-d-prime@1", "one-d@1")),
        THREE_SEEDS,
    ),
    Claim(
        "x0-form",
        "In one step a student that predicts x0 is free of the grain of one that predicts epsilon",
        "L §3.7.3",
        (
            *_all("grain", ("one-x0-anew@1", "one-epsilon-anew@1")),
            *_all("top5", ("one-x0-anew@1", "one-epsilon-anew@1"), strict=False),
        ),
        THREE_SEEDS,
        ("start-2-step@2", "one-d@1"),
        "Both begin at the 2-step LoRA and have equally many images, of which one spends some on the change of form. "
        "What shows nothing has no grain either: the pictures must be no worse.",
    ),
    Claim(
        "levels-of-d",
        "In one step a discriminator shown several noise levels makes better pictures than one shown the clean level",
        "L §3.7.2",
        _all("kid_excess", ("one-d@1", "one-single@1")),
        THREE_SEEDS,
    ),
    Claim(
        "full-unet",
        "Training the whole UNet makes better pictures than a LoRA",
        "L §3.6",
        _all("kid_excess", ("four-full@4", "four-d-then-d-prime@4")),
    ),
    Claim(
        "pure-noise",
        "Training on pure noise at the last timestep, which is where drawing starts, makes better pictures",
        "L §3.5",
        _all("kid_excess", ("one-d@1", "one-impure@1")),
    ),
    Claim(
        "flow",
        "Under D a student keeps closer to where its teacher ends from the same noise than under D'",
        "L §3.2, §3.4",
        _all("flow", ("four-d@4", "four-d-prime@4")),
        also=("four-mse@4",),
    ),
    Claim(
        "balance",
        "The adversarial loss needs no MSE beside it, at no weight",
        "L §3.2",
        _all(
            "kid_excess",
            *(("four-d@4", f"four-balance-{w}@4") for w in ("0.1", "1", "10")),
            ("one-d-alone@1", "one-d@1"),
            strict=False,
        ),
    ),
    Claim(
        "other-style",
        "A LoRA distilled on the base also serves a fine-tune of it, in that one's style",
        "L §3.6",
        _all("kid_excess", ("tuned-lora@8", "tuned@8"), ("tuned-lora@8", "other-style@8")),
    ),
    Claim(
        "add-losses",
        "ADD's adversarial loss carries it: distillation alone fails, and beside it helps or does no harm",
        "A table 1d",
        (
            *_all("kid_excess", ("add-exponential@1", "add-distillation@1")),
            *_all("top5", ("add-exponential@1", "add-adversarial@1"), strict=False),
        ),
    ),
    Claim(
        "add-weights",
        "Of ADD's c(t) the exponential one is nearest to real pictures, NFSD truest to the text",
        "A table 1d",
        (
            *_all("kid_excess", ("add-exponential@1", "add-sds@1"), ("add-exponential@1", "add-nfsd@1"), strict=False),
            *_all("top5", ("add-nfsd@1", "add-exponential@1"), ("add-nfsd@1", "add-sds@1"), strict=False),
        ),
    ),
    Claim(
        "add-conditions",
        "Telling ADD's discriminator text and image makes pictures truer to the text than either or neither",
        "A table 1b",
        _all("top5", *(("add-nfsd@1", f"add-{other}@1") for other in ("untold", "text", "image"))),
    ),
    Claim(
        "add-pretrained",
        "ADD needs a student that starts as the teacher; one that starts at random does not get there",
        "A table 1c",
        _all("kid_excess", ("add-nfsd@1", "add-random@1")),
    ),
    Claim(
        "methods",
        "SDXL-Lightning makes better pictures than ADD and LCM at 1 and at 4 steps",
        "L table 2",
        _all(
            "kid_excess",
            *(("one-d-then-d-prime@1", f"{other}@1") for other in ("add-nfsd", "lcm")),
            *(("four-d-then-d-prime@4", f"{other}@4") for other in ("add-nfsd", "lcm")),
        ),
        note="The column `before` is part of the comparison: SDXL-Lightning's students have earlier stages behind "
        "them, ADD's and LCM's begin at the base model, as published; 20 minutes go to each from there. ADD's "
        "discriminator looks through the network that KID and top-5 are measured with, which favours it.",
    ),
    Claim(
        "add-against-lcm",
        "One step of ADD makes better pictures than four of LCM",
        "A §4.2",
        _all("kid_excess", ("add-nfsd@1", "lcm@4")),
        note="ADD sees fewer images in the same minutes, as it decodes each and looks at the picture.",
    ),
    Claim(
        "backbone-of-d",
        "The UNet's own encoder is a better discriminator than image features of pictures or a small conv net",
        "L §3.3; asked for in reviews",
        _all("kid_excess", ("one-single@1", "one-pixels@1"), ("one-d@1", "one-conv@1")),
        note="Pictures have no noise levels: image features are compared with the UNet at the clean level alone. "
        "They are the network's that KID and top-5 are measured with, which favours them.",
    ),
    Claim(
        "width",
        "The wider the student the better its pictures: double before equal before half (ADD, started at random)",
        "asked for in reviews",
        _all("kid_excess", ("add-random-double@1", "add-random@1"), ("add-random@1", "add-random-half@1")),
        note=FROM_NOTHING,
    ),
    Claim(
        "text-time",
        "A UNet shaped as SD 1.5's, without text_time, is distilled no worse (ADD, started at random)",
        "asked for in reviews",
        _all("kid_excess", ("add-random-sd15@1", "add-random@1"), strict=False),
        note=FROM_NOTHING,
    ),
)
