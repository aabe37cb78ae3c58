"""The search against a judge whose answers are known: it finds what trying everything finds, for less."""

from __future__ import annotations

import random

import pytest

from sievert.bundle.plan import Plan, Stage
from sievert.calibration.scores import Estimate, estimate_share
from sievert.calibration.tune_grid import Line
from sievert.calibration.tune_search import Goal, Search, Trial, find_front, make_rungs


class Table:
    """A judge with a list of outcomes for each plan."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.costs: dict[str, float] = {}
        self.held: dict[str, list[bool]] = {}
        self.asked: dict[str, int] = {}

    def put(self, plan: Plan, cost: float, held: list[bool]) -> None:
        self.costs[plan.model_dump_json()], self.held[plan.model_dump_json()] = cost, held

    def cost(self, plan: Plan) -> float:
        return self.costs[plan.model_dump_json()]

    def judge(self, plan: Plan, count: int) -> Estimate:
        key = plan.model_dump_json()
        self.asked[key] = max(self.asked.get(key, 0), count)
        return estimate_share(self.held[key][:count])

    def hope(self, plan: Plan, count: int) -> float:
        return (sum(self.held[plan.model_dump_json()][:count]) + self.total - count) / self.total


def plan(layer: int, keep: int) -> Plan:
    return Plan(stages=(Stage(selector="iwp", layer=layer, keep=keep, requested=str(keep)),))


def make_table(seed: int, *, total: int = 160, lines: int = 5, keeps: int = 8) -> tuple[Table, list[Line]]:
    """Lines on which a plan that keeps more is right wherever one that keeps less is."""
    draw, table, made = random.Random(seed), Table(total), []
    for number in range(lines):
        # Question q is answered as before from its own keep on: what bisection takes for granted holds.
        needs = [int(keeps * draw.random() ** (2 + number)) for _ in range(total)]
        plans = tuple(plan(number, 1 + place) for place in range(keeps))
        for place, each in enumerate(plans):
            table.put(each, (number + 1 + 3 * place + draw.random() / 2) / (4 * keeps), [need <= place for need in needs])
        made.append(Line("iwp", (number,), {}, plans))
    return table, made


def search(table: Table, lines: list[Line], *, target: float, budget: float = 1.0, strict: bool = False, trials: list[Trial] | None = None):
    notes = [] if trials is None else trials
    goal = Goal(target, budget, strict)
    return Search(table, goal, make_rungs(table.total, 1), lambda _, trial: notes.append(trial)).run(lines, lambda _, __: ())


def best(table: Table, lines: list[Line], target: float, budget: float = 1.0) -> float | None:
    """The lowest cost of all plans that reach the target, by trying all of them."""
    shares = {key: sum(held) / len(held) for key, held in table.held.items()}
    costs = [table.costs[key] for key, share in shares.items() if share >= target and table.costs[key] <= budget]
    return min(costs, default=None)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("target", [0.8, 0.95, 1.0])
def test_the_search_finds_what_trying_everything_finds(seed: int, target: float):
    table, lines = make_table(seed)
    found = search(table, lines, target=target)
    cheapest = best(table, lines, target)
    assert (found.chosen is None) == (cheapest is None)
    if found.chosen is not None and cheapest is not None:
        # A plan close to the target may seem to miss it surely, once in a while: then the next one is taken.
        assert cheapest <= found.chosen.cost <= 1.1 * cheapest
        assert found.chosen.cost == cheapest or (target, seed) in {(0.95, 0), (0.95, 8)}
    assert sum(table.asked.values()) < sum(len(held) for held in table.held.values())
    assert all(trial.score.count == table.total for trial in found.front)
    costs, scores = [trial.cost for trial in found.front], [trial.score.value for trial in found.front]
    assert costs == sorted(costs) and scores == sorted(set(scores))
    if found.chosen is not None:
        assert found.chosen.verdict == "reaches" and found.chosen.score.value >= target


@pytest.mark.parametrize("seed", range(4))
def test_a_budget_is_kept_and_its_plans_alone_are_asked(seed: int):
    table, lines = make_table(seed)
    found = search(table, lines, target=0.9, budget=0.4)
    assert (None if found.chosen is None else found.chosen.cost) == best(table, lines, 0.9, 0.4)
    assert found.trials and all(trial.cost <= 0.4 for trial in found.trials)
    assert all(table.costs[key] <= 0.4 for key in table.asked)


def test_where_no_plan_reaches_the_target_the_front_says_what_is_possible():
    table, lines = Table(100), [Line("iwp", (0,), {}, (plan(0, 1), plan(0, 2)))]
    table.put(plan(0, 1), 0.2, [n % 2 == 0 for n in range(100)])
    table.put(plan(0, 2), 0.4, [n % 10 > 0 for n in range(100)])
    found = search(table, lines, target=0.99)
    assert found.chosen is None
    assert found.front[-1].score.value == 0.9


def test_a_plan_that_surely_misses_is_asked_no_further():
    table, lines = Table(400), [Line("iwp", (0,), {}, (plan(0, 1),)), Line("iwp", (1,), {}, (plan(1, 1),))]
    table.put(plan(0, 1), 0.2, [False] * 400)
    table.put(plan(1, 1), 0.1, [True] * 400)
    found = search(table, lines, target=0.9)
    assert found.chosen is not None and found.chosen.plan == plan(1, 1)
    assert table.asked[plan(0, 1).model_dump_json()] == make_rungs(400, 1)[0]


def test_a_plan_that_has_lost_too_many_answers_is_asked_no_further():
    table, lines = Table(100), [Line("iwp", (0,), {}, (plan(0, 1),)), Line("iwp", (1,), {}, (plan(1, 1),))]
    table.put(plan(0, 1), 0.1, [n not in (10, 20, 30, 40, 50, 60) for n in range(100)])
    table.put(plan(1, 1), 0.2, [True] * 100)
    trials: list[Trial] = []
    found = search(table, lines, target=0.95, trials=trials)
    assert found.chosen is not None and found.chosen.plan == plan(1, 1)
    looks = [(trial.score.count, trial.verdict, trial.score.high > 0.95) for trial in trials if trial.plan == plan(0, 1)]
    # At 64 the interval still holds the target, but 6 of 100 are lost for good. The last look is the front's.
    assert looks == [(16, "open", True), (32, "open", True), (64, "misses", True), (100, "misses", True)]


def test_strict_wants_the_lower_end_of_the_interval():
    table, lines = Table(100), [Line("iwp", (0,), {}, (plan(0, 1), plan(0, 2)))]
    table.put(plan(0, 1), 0.2, [n % 16 > 0 or n > 90 for n in range(100)])  # 94 %, down to 87.5 %
    table.put(plan(0, 2), 0.4, [True] * 100)  # down to 96.3 %
    loose, strict = (search(table, lines, target=0.94, strict=strict) for strict in (False, True))
    assert loose.chosen is not None and strict.chosen is not None
    assert (loose.chosen.plan, strict.chosen.plan) == (plan(0, 1), plan(0, 2))


def test_leaders_are_varied_and_have_to_be_worth_it():
    table, lines = Table(64), [Line("iwp", (0,), {}, (plan(0, 4), plan(0, 8)))]
    table.put(plan(0, 4), 0.2, [False] * 64)
    table.put(plan(0, 8), 0.5, [True] * 64)
    table.put(plan(0, 7), 0.495, [True] * 64)  # saves too little to count
    table.put(plan(0, 6), 0.4, [True] * 64)
    asked: list[int] = []

    def expand(line: Line, place: int) -> list[Line]:
        asked.append(place)
        return [Line("iwp", (0,), {}, (plan(0, 6), plan(0, 7)))]

    found = Search(table, Goal(0.9, 1.0, strict=False), make_rungs(64, 1), lambda _, __: None).run(lines, expand)
    assert asked == [1]
    assert found.chosen is not None and found.chosen.plan == plan(0, 6)
    table.costs[plan(0, 6).model_dump_json()] = 0.492
    found = Search(table, Goal(0.9, 1.0, strict=False), make_rungs(64, 1), lambda _, __: None).run(lines, expand)
    assert found.chosen is not None and found.chosen.plan == plan(0, 8)


def test_the_same_answers_give_the_same_decisions():
    first, second = list[Trial](), list[Trial]()
    for trials in (first, second):
        table, lines = make_table(3)
        search(table, lines, target=0.95, trials=trials)
    assert first == second and first


@pytest.mark.parametrize(("total", "batch", "rungs"), [(10, 1, (10,)), (100, 1, (16, 32, 64, 100)), (400, 16, (64, 112, 208, 400))])
def test_rungs_double_in_whole_batches(total: int, batch: int, rungs: tuple[int, ...]):
    assert make_rungs(total, batch) == rungs


def test_the_front_leaves_out_what_another_plan_beats():
    trials = [
        Trial("", plan(0, keep), cost, Estimate(value, 0.0, 1.0, 10), "open")
        for keep, cost, value in [(1, 0.1, 0.5), (2, 0.2, 0.5), (3, 0.2, 0.7), (4, 0.3, 0.6), (5, 0.4, 0.9)]
    ]
    assert [trial.plan.stages[0].keep for trial in find_front(trials)] == [1, 3, 5]
