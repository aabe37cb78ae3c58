"""The search itself: which plan is the cheapest that reaches a target. It knows no engine: a judge says what plans cost and reach.

Every step follows from the judge's answers and the order of the lines alone, so the same answers give the same plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

from sievert.bundle.plan import Plan
from sievert.calibration.scores import Estimate
from sievert.calibration.tune_grid import Line

Verdict = Literal["misses", "open", "reaches"]
Stage = Literal["screen", "race", "leaders", "front"]
LEADERS: Final = 3
"""Lines whose options and finer keeps are tried."""
WORTH: Final = 0.98
"""What other options and finer keeps have to save: trying many plans that cost the same would only find the luckiest."""
_FIRST: Final = 16
"""Questions of the first look, at least: of fewer even the worst plan could not surely miss."""


_ROUNDING: Final = 1e-9  # of a share


class Judge(Protocol):
    """Who asks the models. ``total`` is how many tuning questions there are."""

    total: int

    def cost(self, plan: Plan) -> float:
        """What the plan costs, as a share of the unpruned model."""

    def judge(self, plan: Plan, count: int) -> Estimate:
        """What the plan reaches on the first ``count`` tuning questions."""

    def hope(self, plan: Plan, count: int) -> float:
        """What it would reach on all of them if it did all but the first ``count`` right."""


@dataclass(frozen=True)
class Goal:
    """``target`` is what has to be reached, 1 being the unpruned model; plans of a cost above ``budget`` are not tried.

    ``strict``: the lower end of the interval has to reach the target, not the value.
    """

    target: float
    budget: float
    strict: bool


@dataclass(frozen=True)
class Trial:
    """What is known of a plan: its score on the first ``score.count`` tuning questions."""

    line: str
    plan: Plan
    cost: float
    score: Estimate
    verdict: Verdict


Note = Callable[[Stage, Trial], None]
"""Told every decision as it is made."""


@dataclass(frozen=True)
class Found:
    """``chosen`` is None where no plan reaches the target. ``front``: plans asked everything of which none is beaten by another that
    costs less or as much, by cost; ``trials`` everything that was looked at, in its last state.
    """

    chosen: Trial | None
    front: tuple[Trial, ...]
    trials: tuple[Trial, ...]


def make_rungs(total: int, batch: int) -> tuple[int, ...]:
    """How many questions a plan is asked before each decision: an eighth of all, then twice as many each time; whole batches."""
    rungs, count = [], max(_FIRST, math.ceil(total / 8))
    while count < total:
        rungs.append(min(total, math.ceil(count / batch) * batch))
        count *= 2
    return tuple(dict.fromkeys((*rungs, total)))


class Search:
    """Finds the cheapest plan in four stages; each leaves what it learnt in ``trials``.

    Screen: on each line, the least keep that does not surely miss the target on the first questions, by bisection: that keeping more never
    reaches less is taken for granted. Surely means that the interval lies below the target, or that too many answers are lost already.
    Race: the cheapest plan that is left is asked on until it surely misses, and its line moves up to the next keep, or until it has reached
    the target on all questions. Leaders: other options, and keeps in between, of the lines that came nearest, as far as they are surely
    cheaper than the best plan so far. Front: what looks unbeaten is asked the rest.
    """

    def __init__(self, judge: Judge, goal: Goal, rungs: Sequence[int], note: Note) -> None:
        self._judge, self._goal, self._rungs, self._note = judge, goal, rungs, note
        self._trials: dict[str, Trial] = {}
        self._stage: Stage = "screen"

    def run(self, lines: Sequence[Line], expand: Callable[[Line, int], Sequence[Line]]) -> Found:
        """``expand`` gives further lines like one whose plan at a place came near; all of its plans should be cheaper than that one."""
        places = {line: self._screen(line, math.inf) for line in _unique(lines)}
        self._stage = "race"
        chosen = self._race(places, math.inf)
        self._stage = "leaders"
        bound = math.inf if chosen is None else WORTH * chosen.cost
        near = sorted(places, key=lambda line: self._distance(line, places[line]))[:LEADERS]
        more = _unique([other for line in near for other in expand(line, places[line])])
        cheaper = self._race({line: self._screen(line, bound) for line in more}, bound)
        self._stage = "front"
        return Found(cheaper or chosen, self._complete_front(), tuple(self._trials.values()))

    def _screen(self, line: Line, bound: float) -> int:
        """The place of the first plan that does not surely miss; that of none where all do, or where it is too dear."""
        low, high = 0, len(line.plans)
        while low < high:
            middle = (low + high) // 2
            plan = line.plans[middle]
            if self._too_dear(plan, bound) or self._look(line, plan, self._rungs[0]).verdict != "misses":
                high = middle
            else:
                low = middle + 1
        return low

    def _race(self, places: dict[Line, int], bound: float) -> Trial | None:
        """Ask the cheapest plan until it is decided, then the next one; ``places`` move up with what misses."""
        while waiting := [line for line, place in places.items() if self._may_win(line, place, bound)]:
            line = min(waiting, key=lambda line: self._judge.cost(line.plans[places[line]]))
            trial = self._decide(line, line.plans[places[line]])
            if trial.verdict == "reaches":
                return trial
            places[line] += 1
        return None

    def _may_win(self, line: Line, place: int, bound: float) -> bool:
        return place < len(line.plans) and not self._too_dear(line.plans[place], bound)

    def _decide(self, line: Line, plan: Plan) -> Trial:
        """Ask more and more until the plan surely misses, or has been asked everything."""
        for rung in self._rungs:
            trial = self._look(line, plan, rung)
            if trial.verdict != "open":
                break
        return trial

    def _look(self, line: Line, plan: Plan, count: int) -> Trial:
        """Judge a plan by the first ``count`` questions, or by more where it was asked more."""
        key = plan.model_dump_json()
        known = self._trials.get(key)
        if known is not None and known.score.count >= count:
            return known
        score = self._judge.judge(plan, count)
        trial = Trial(line.name, plan, self._judge.cost(plan), score, self._verdict(plan, score))
        self._trials[key] = trial
        self._note(self._stage, trial)
        return trial

    def _verdict(self, plan: Plan, score: Estimate) -> Verdict:
        target = self._goal.target - _ROUNDING
        if score.count < self._judge.total:
            return "misses" if score.high < target or self._judge.hope(plan, score.count) < target else "open"
        return "reaches" if (score.low if self._goal.strict else score.value) >= target else "misses"

    def _too_dear(self, plan: Plan, bound: float) -> bool:
        cost = self._judge.cost(plan)
        return cost > self._goal.budget or cost >= bound

    def _distance(self, line: Line, place: int) -> tuple[float, float]:
        """How far a line is from giving the best plan: the cost of the first plan that may reach the target, then by how much none does."""
        if self._may_win(line, place, math.inf):
            return self._judge.cost(line.plans[place]), 0.0
        scores = [trial.score.value for trial in self._trials.values() if trial.line == line.name]
        return math.inf, -max(scores, default=0.0)

    def _complete_front(self) -> tuple[Trial, ...]:
        """Ask the rest of what looks unbeaten, until nothing unbeaten is left that was not asked everything."""
        while True:
            front = find_front(tuple(self._trials.values()))
            unfinished = next((trial for trial in front if trial.score.count < self._judge.total), None)
            if unfinished is None:
                return front
            key = unfinished.plan.model_dump_json()
            score = self._judge.judge(unfinished.plan, self._judge.total)
            self._trials[key] = Trial(unfinished.line, unfinished.plan, unfinished.cost, score, self._verdict(unfinished.plan, score))
            self._note(self._stage, self._trials[key])


def find_front(trials: Sequence[Trial]) -> tuple[Trial, ...]:
    """The trials that none beats: none costs less, or as much, and reaches as much or more. By cost, and so by score."""
    front: list[Trial] = []
    for trial in sorted(trials, key=lambda trial: (trial.cost, -trial.score.value)):
        if not front or trial.score.value > front[-1].score.value:
            front.append(trial)
    return tuple(front)


def _unique(lines: Sequence[Line]) -> list[Line]:
    """Without lines whose plans are all another's."""
    seen: dict[tuple[str, ...], Line] = {}
    for line in lines:
        seen.setdefault(tuple(plan.model_dump_json() for plan in line.plans), line)
    return list(seen.values())
