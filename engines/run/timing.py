"""Time several things so that their ratios mean something on a machine that also does other work."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sievert.bundle.errors import InputError

FEWEST_ROUNDS: Final = 6  # below, no interval of a median has 95 % confidence
_OUTSIDE: Final = 0.025

Tell = Callable[[int], None]


@dataclass(frozen=True)
class Ratio:
    """The median of ``pairs`` ratios taken round by round, and the interval that holds the true median with 95 % confidence."""

    median: float
    low: float
    high: float
    pairs: int


def take_turns(
    arms: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    tell: Tell = lambda _: None,
    warm_up: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each arm in each round. Every round runs every arm once, in another order, so that what disturbs one disturbs all.

    ``warm_up`` rounds before the first are not counted. ``tell`` gets the number of each counted round as it begins. ``clock`` gives
    seconds; ``time.process_time`` does not see what others do, but counts threads that wait by spinning.

    Raises:
        InputError: fewer rounds than an interval needs.
    """
    if rounds < FEWEST_ROUNDS:
        raise InputError(f"rounds={rounds}: at least {FEWEST_ROUNDS} are needed for an interval of the median; 15 or more are better")
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    order, shuffled = random.Random(0), list(arms)  # noqa: S311 (an order, no secret)
    for number in range(-warm_up, rounds):
        if number >= 0:
            tell(number)
        order.shuffle(shuffled)
        for name in shuffled:
            start = clock()
            arms[name]()
            if number >= 0:
                seconds[name].append(clock() - start)
    return seconds


def compare(own: Sequence[float], other: Sequence[float]) -> Ratio:
    """``own`` over ``other``, paired by rounds; the interval is that of the sign test, which assumes nothing of the distribution.

    Raises:
        InputError: other numbers of rounds, or too few of them.
    """
    if len(own) != len(other) or len(own) < FEWEST_ROUNDS:
        raise InputError(f"{len(own)} and {len(other)} rounds: a ratio takes two lists of equal length, {FEWEST_ROUNDS} or more each")
    ratios = sorted(mine / theirs for mine, theirs in zip(own, other, strict=True))
    place = _lowest_place(len(ratios))
    return Ratio(statistics.median(ratios), ratios[place], ratios[-1 - place], len(ratios))


def _lowest_place(count: int) -> int:
    """The largest place from either end whose values leave out the median with a chance of at most 2.5 % on each side."""
    chance, place = 0.0, -1
    while True:
        chance += math.comb(count, place + 1) / 2**count
        if chance > _OUTSIDE:
            return place
        place += 1
