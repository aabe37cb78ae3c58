"""What answers are worth: right or not, the same as the unpruned ones or not, with intervals for shares of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from sievert.calibration.questions import Question, normalise

INTERVALS: Final = (
    "95 % intervals by normal approximation: of the paired difference after Bonett and Price (one pseudo-count for each kind of change), "
    "of the agreement after Wilson"
)
_Z: Final = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A share or a difference of shares, from -1 to 1, with its 95 % interval, over ``count`` questions."""

    value: float
    low: float
    high: float
    count: int


def is_right(question: Question, text: str) -> bool:
    """Whether a text is one of the accepted answers, compared by :func:`~sievert.calibration.questions.normalise`."""
    return normalise(text) in {normalise(answer) for answer in question.answers}


def agrees(text: str, unpruned: str) -> bool:
    """Whether two answers are the same, compared in the same way."""
    return normalise(text) == normalise(unpruned)


def estimate_change(now: Sequence[bool], before: Sequence[bool]) -> Estimate:
    """The paired difference of two shares, ``now`` less ``before``.

    Interval: Bonett and Price, "Adjusted Wald confidence interval for a difference of binomial proportions based on paired data", 2012.
    Unlike the plain one it does not shrink to nothing where few answers differ.
    """
    count = len(now)
    pairs = list(zip(now, before, strict=True))
    gained, lost = pairs.count((True, False)), pairs.count((False, True))
    up, down = (gained + 1) / (count + 2), (lost + 1) / (count + 2)
    half = _Z * math.sqrt((up + down - (up - down) ** 2) / (count + 2))
    return Estimate((gained - lost) / count, max(-1.0, up - down - half), min(1.0, up - down + half), count)


def estimate_share(held: Sequence[bool]) -> Estimate:
    """A share with Wilson's interval, which is right at shares of 0 and 1 too."""
    count = len(held)
    share, weight = sum(held) / count, _Z**2 / count
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / count + weight / (4 * count)) / (1 + weight)
    return Estimate(share, max(0.0, middle - half), min(1.0, middle + half), count)


def estimate_relative(now: Sequence[bool], before: Sequence[bool]) -> Estimate:
    """The share of ``before``'s right answers that ``now`` reaches: 1 where both are right equally often.

    One plus the paired difference over the share of ``before``, and so for the ends of its interval: that share is taken as it is. It can
    lie above 1.

    Raises:
        ValueError: nothing in ``before`` is right.
    """
    of = sum(before) / len(before)
    if of == 0:
        raise ValueError("no answer was right before: nothing can be relative to that")
    change = estimate_change(now, before)
    return Estimate(1 + change.value / of, 1 + change.low / of, 1 + change.high / of, change.count)


def estimate_median(values: Sequence[float]) -> Estimate:
    """The median with the 95 % interval of the sign test, for at least 6 values of any size."""
    ordered, count = sorted(values), len(values)
    skipped = math.floor(count / 2 - _Z * math.sqrt(count) / 2)  # of 15: the 4th lowest to the 4th highest
    middle = (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
    return Estimate(middle, ordered[skipped], ordered[count - 1 - skipped], count)
