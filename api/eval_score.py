"""What answers are worth: right, as the unpruned model's, and how sure one can be of either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sievert.calibration.answers import Said
from sievert.calibration.questions import Asked, Question
from sievert.calibration.scores import INTERVALS, Estimate, agrees, estimate_change, estimate_share, is_right

__all__ = ["INTERVALS", "Estimate", "Score", "agrees", "estimate_change", "estimate_share", "is_right", "score_variant"]


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
