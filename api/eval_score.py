"""What answers are worth: right, as the unpruned model's, and how sure one can be of either."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sievert.calibration.questions import Asked, Question, normalise
from sievert.eval_journal import Said

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


@dataclass(frozen=True)
class Score:
    """One variant. ``right``, of ``answerable`` questions, and ``change`` against the unpruned variant need accepted answers.

    ``change`` is the paired difference of the accuracies; ``agreement`` the share of answers that are the unpruned variant's; both are
    None for that variant itself. ``cut_short`` answers reached the maximum of tokens.
    """

    variant: str
    answerable: int
    right: int
    change: Estimate | None
    agreement: Estimate | None
    cut_short: int


def is_right(question: Question, text: str) -> bool:
    """Whether a text is one of the accepted answers, compared by :func:`~sievert.calibration.questions.normalise`."""
    return normalise(text) in {normalise(answer) for answer in question.answers}


def agrees(text: str, unpruned: str) -> bool:
    """Whether two answers are the same, compared in the same way."""
    return normalise(text) == normalise(unpruned)


def score_variant(variant: str, questions: Sequence[Question], said: Mapping[Asked, Said], unpruned: Mapping[Asked, Said] | None) -> Score:
    """The score over ``questions``, all answered; ``unpruned`` is None for that variant itself."""
    answerable = [question for question in questions if question.answers]
    right = [is_right(question, said[question.asked].text) for question in answerable]
    change = agreement = None
    if unpruned is not None:
        before = [is_right(question, unpruned[question.asked].text) for question in answerable]
        change = estimate_change(right, before) if answerable else None
        agreement = estimate_share([agrees(said[question.asked].text, unpruned[question.asked].text) for question in questions])
    cut_short = sum(said[question.asked].finish == "length" for question in questions)
    return Score(variant, len(answerable), sum(right), change, agreement, cut_short)


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
