"""Interleaved rounds, and the interval of a median ratio."""

from __future__ import annotations

import math
from functools import partial

import pytest

from sievert.bundle.errors import InputError
from sievert.engines.run.timing import compare, take_turns


def test_every_round_runs_every_arm_once_and_the_first_is_not_counted():
    ran: list[str] = []
    told: list[int] = []
    seconds = take_turns({name: partial(ran.append, name) for name in "abc"}, 8, tell=told.append)
    rounds = [ran[start : start + 3] for start in range(0, len(ran), 3)]
    assert len(rounds) == 9 and all(sorted(each) == ["a", "b", "c"] for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1, "always the same order"
    assert told == list(range(8)) and {name: len(each) for name, each in seconds.items()} == {"a": 8, "b": 8, "c": 8}
    assert all(each >= 0 for times in seconds.values() for each in times)


@pytest.mark.parametrize(("pairs", "place"), [(6, 0), (8, 0), (9, 1), (15, 3), (31, 9)])
def test_the_interval_is_that_of_the_sign_test(pairs: int, place: int):
    found = compare([float(number) for number in range(1, pairs + 1)], [1.0] * pairs)
    assert (found.low, found.high, found.pairs) == (place + 1, pairs - place, pairs)
    assert found.median == (pairs + 1) / 2
    outside = sum(math.comb(pairs, below) for below in range(place + 1)) / 2**pairs
    assert outside <= 0.025 < outside + math.comb(pairs, place + 1) / 2**pairs


def test_ratios_are_paired_by_rounds():
    slow = [2.0**number for number in range(8)]  # the machine slows down while it measures
    found = compare([3 * each for each in slow], slow)
    assert (found.low, found.median, found.high) == (3.0, 3.0, 3.0)


def test_too_few_rounds_or_unequal_ones_are_refused():
    with pytest.raises(InputError, match="at least 6"):
        take_turns({"a": lambda: None}, 5)
    with pytest.raises(InputError, match="equal length"):
        compare([1.0] * 7, [1.0] * 8)
    with pytest.raises(InputError, match="6 or more"):
        compare([1.0] * 5, [1.0] * 5)
