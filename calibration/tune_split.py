"""Which questions a plan is searched with, and which ones it is confirmed on."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from sievert.bundle.errors import InputError
from sievert.calibration.questions import Question

Metric = Literal["agreement", "accuracy"]
LEAST: Final = 10
"""Fewer questions say next to nothing: with all of them right, Wilson's interval of 10 still goes down to 72 %."""


@dataclass(frozen=True)
class Split:
    """No picture is in both parts. ``left_out`` questions are like another one, or have no answer that ``metric`` needs."""

    metric: Metric
    tuning: tuple[Question, ...]
    confirming: tuple[Question, ...]
    left_out: int


def choose_metric(questions: Sequence[Question], metric: Literal["auto", "agreement", "accuracy"]) -> Metric:
    """``auto`` is accuracy where every question has an accepted answer, else agreement.

    Raises:
        InputError: accuracy, and no question has an accepted answer.
    """
    answerable = sum(bool(question.answers) for question in questions)
    if metric == "accuracy" and not answerable:
        raise InputError(
            'the metric accuracy needs accepted answers, but no line of the data has one: add "answer": "..." to the lines, or use the '
            "metric agreement"
        )
    if metric == "auto":
        return "accuracy" if answerable == len(questions) else "agreement"
    return metric


def split_questions(
    questions: Sequence[Question], metric: Metric, *, share: float, seed: int, tuning: int = 0, confirming: int = 0
) -> Split:
    """Deal out the pictures in the order of ``seed``: about ``share`` of the questions to tune with, the others to confirm on.

    Questions about one picture stay together: a hard picture is hard for all of them, and would make the two parts alike. Of each part
    at most ``tuning`` and ``confirming`` questions are taken (0: all). The same questions in another order give the same split.

    Raises:
        InputError: a share that is not between 0 and 1, or a part with fewer than :data:`LEAST` questions.
    """
    if not 0 < share < 1:
        raise InputError(f"split={share:.0%}: give the share of the questions to tune with, above 0 % and below 100 %")
    for name, limit in (("questions", tuning), ("confirm_questions", confirming)):
        if limit < 0 or 0 < limit < LEAST:
            raise InputError(f"{name}={limit}: at least {LEAST} are needed to judge a plan by")
    usable = {question.asked: question for question in questions if question.answers or metric == "agreement"}
    order = random.Random(seed)  # noqa: S311 (nothing secret)
    pictures: dict[str, list[Question]] = {}
    for asked in sorted(usable, key=lambda asked: (asked.image, asked.prompt)):
        pictures.setdefault(asked.image, []).append(usable[asked])
    names = list(pictures)
    order.shuffle(names)
    parts: tuple[list[Question], list[Question]] = ([], [])
    for name in names:
        parts[len(parts[0]) >= share * len(usable)].extend(pictures[name])
    for part in parts:
        order.shuffle(part)
    found = Split(
        metric, tuple(parts[0][: tuning or len(usable)]), tuple(parts[1][: confirming or len(usable)]), len(questions) - len(usable)
    )
    few = min(len(found.tuning), len(found.confirming))
    if few < LEAST:
        raise InputError(
            f"{len(usable)} usable questions about {len(pictures)} pictures give {len(found.tuning)} to tune with and "
            f"{len(found.confirming)} to confirm on (no picture is in both), but each part needs {LEAST}: give more questions, about more "
            "pictures, or another split"
        )
    return found
