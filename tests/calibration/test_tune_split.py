"""Questions to tune with and to confirm on."""

from __future__ import annotations

from pathlib import Path

import pytest

from sievert.bundle.errors import InputError
from sievert.calibration.questions import Asked, Question
from sievert.calibration.tune_split import choose_metric, split_questions


def questions(pictures: int, each: int, *, answers: tuple[str, ...] = ("yes",)) -> list[Question]:
    return [
        Question(
            line=number * each + place,
            images=(Path(f"{number}.png"),),
            names=(f"{number}.png",),
            hashes=(f"{number:02}",),
            prompt=f"q{place}",
            answers=answers,
            asked=Asked(f"{number:02}", f"q{place}"),
        )
        for number in range(pictures)
        for place in range(each)
    ]


def test_no_picture_is_in_both_parts_and_nothing_is_lost():
    asked = questions(20, 3)
    found = split_questions(asked, "agreement", share=0.5, seed=0)
    parts = [{question.asked.image for question in part} for part in (found.tuning, found.confirming)]
    assert not parts[0] & parts[1] and len(parts[0] | parts[1]) == 20
    assert len(found.tuning) + len(found.confirming) == 60 and len(found.tuning) == 30


def test_the_split_follows_from_the_seed_and_not_from_the_order_of_the_lines():
    asked = questions(20, 2)
    found = split_questions(asked, "agreement", share=0.5, seed=1)
    assert split_questions(list(reversed(asked)), "agreement", share=0.5, seed=1) == found
    assert split_questions(asked, "agreement", share=0.5, seed=2) != found


def test_limits_take_the_first_of_the_same_order():
    asked = questions(40, 1)
    whole = split_questions(asked, "agreement", share=0.5, seed=0)
    some = split_questions(asked, "agreement", share=0.5, seed=0, tuning=10, confirming=12)
    assert (some.tuning, some.confirming) == (whole.tuning[:10], whole.confirming[:12])


def test_questions_that_are_asked_twice_count_once_and_accuracy_leaves_out_those_without_answers():
    asked = [*questions(30, 1), *questions(30, 1)[:5]]
    assert split_questions(asked, "agreement", share=0.5, seed=0).left_out == 5
    some = [*questions(30, 1), *(question for question in questions(34, 1, answers=())[30:])]
    found = split_questions(some, "accuracy", share=0.5, seed=0)
    assert found.left_out == 4 and all(question.answers for question in (*found.tuning, *found.confirming))


def test_the_metric_is_accuracy_where_every_line_has_an_answer():
    assert choose_metric(questions(3, 1), "auto") == "accuracy"
    assert choose_metric([*questions(3, 1), *questions(1, 1, answers=())], "auto") == "agreement"
    assert choose_metric(questions(3, 1), "agreement") == "agreement"
    with pytest.raises(InputError, match="needs accepted answers"):
        choose_metric(questions(3, 1, answers=()), "accuracy")


@pytest.mark.parametrize(
    ("pictures", "options", "says"),
    [
        (19, {}, "each part needs 10"),
        (1, {}, "about 1 pictures give 1 to tune with and 0 to confirm on"),
        (40, {"share": 0.9}, "4 to confirm on"),
        (40, {"share": 1.0}, "above 0 % and below 100 %"),
        (40, {"tuning": 9}, "questions=9: at least 10"),
        (40, {"confirming": -1}, "confirm_questions=-1"),
    ],
)
def test_too_few_questions_are_refused(pictures: int, options: dict[str, float], says: str):
    given: dict[str, object] = {"share": 0.5, "seed": 0, **options}
    with pytest.raises(InputError, match=says):
        split_questions(questions(pictures, 1), "agreement", **given)  # type: ignore[arg-type]
