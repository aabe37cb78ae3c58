"""Tune the pruning budget of a bundle: search with one part of the questions, confirm on the other, and time what is left."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import CalibrationError
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.calibration.json_lines import JsonLines
from sievert.calibration.scores import Estimate, estimate_relative, estimate_share
from sievert.calibration.tune_ask import Asker, Settings
from sievert.calibration.tune_grid import Grid, Line, cut_line, make_lines, refine, vary_options
from sievert.calibration.tune_search import Found, Goal, Search, Stage, Trial, make_rungs
from sievert.calibration.tune_split import Metric, Split
from sievert.calibration.tune_time import Timing, time_plans

DECISIONS: Final = "decisions.jsonl"
_HEADER: Final = {"sievert_tune": 1}
_FINALISTS: Final = 5
_STAGES: Final[dict[Stage, str]] = {
    "screen": "screening what might reach the target",
    "race": "asking the cheapest plans on",
    "leaders": "trying options and finer keeps of the leaders",
    "front": "completing the front",
}

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What is searched for, where, and by what. ``vary``: also other options of the leaders; ``between``: also keeps
    between those of the grid.

    ``data_sha256`` is that of the file of questions.
    """

    bundle: Bundle
    profile: Profile
    split: Split
    grid: Grid
    goal: Goal
    settings: Settings
    vary: bool
    between: bool
    data_sha256: str

    def to_json(self) -> dict[str, Any]:
        """Everything that the result depends on beside the answers."""
        split = {part: [asdict(question.asked) for question in getattr(self.split, part)] for part in ("tuning", "confirming")}
        digest = hashlib.sha256(json.dumps(split, sort_keys=True).encode()).hexdigest()
        return {
            "bundle": {name: entry.sha256 for name, entry in sorted(self.bundle.manifest.files.items()) if not name.endswith(".engine")},
            "profile": self.profile.model_dump(),
            "data_sha256": self.data_sha256,
            "split_sha256": digest,
            "metric": self.split.metric,
            "goal": asdict(self.goal),
            "grid": asdict(self.grid),
            "vary": self.vary,
            "between": self.between,
            "settings": self.settings.to_json(),
        }


@dataclass(frozen=True)
class Result:
    """``confirmed`` is the chosen plan's score on the questions that the search never saw. Costs are shares of the unpruned
    prefill's FLOPs.

    ``refused``: lines of the grid, and plans, that this model cannot take, with the reason.
    """

    found: Found
    confirmed: Estimate | None
    timings: tuple[Timing, ...]
    rungs: tuple[int, ...]
    lines: int
    refused: dict[str, str]

    def accepted(self, goal: Goal) -> bool:
        """Whether there is a plan to be used: chosen, and under ``strict`` confirmed with the lower end of its interval."""
        if self.found.chosen is None or self.confirmed is None:
            return False
        return not goal.strict or self.confirmed.low >= goal.target


def needed_questions(goal: Goal, split: Split) -> int:
    """How many questions a part needs at least for the lower end of an interval to reach the target, if a plan changes no answer.

    0 where no number is enough: a target of 100 %.
    """
    if goal.target >= 1:
        return 0
    count = 1
    while _best_case(split.metric, count).low < goal.target:
        count += 1
    return count


def run_task(task: Task, folder: Path, progress: Progress) -> Result:
    """Search, confirm and time; ``folder`` keeps all that a later call goes on from, and must be held by this process alone.

    Raises:
        PlanError: nothing of the grid can be made of this model.
        InputError: the unpruned model is never right, or a journal in ``folder`` is damaged.
        CalibrationError: an earlier run decided otherwise on the same answers.
    """
    geometry = task.bundle.manifest.geometry
    made = make_lines(task.grid, geometry, task.profile)
    rungs = make_rungs(len(task.split.tuning), task.profile.batch)
    decisions = _Decisions(folder, task)
    doing = "asking the unpruned model"

    def tell(answers: int) -> None:
        progress(f"{doing}: {answers} answers, {decisions.count} decisions")

    def note(stage: Stage, trial: Trial) -> None:
        nonlocal doing
        doing = _STAGES[stage]
        decisions.add(stage, trial)
        tell(asker.answered)

    def expand(line: Line, place: int) -> Sequence[Line]:
        more: list[Line | None] = []
        if task.vary:
            more += [cut_line(other, place) for other in vary_options(line, task.grid.keeps, geometry, task.profile)]
        if task.between and place < len(line.plans):
            more.append(refine(line, place, geometry, task.profile))
        return [other for other in more if other is not None]

    with Asker(task.bundle, task.profile, task.split, task.settings, folder, tell) as asker:
        tell(0)
        asker.ask_unpruned()
        found = Search(asker, task.goal, rungs, note).run(made.lines, expand)
        doing = "confirming on questions that the search never saw"
        tell(asker.answered)
        confirmed = None if found.chosen is None else asker.confirm(found.chosen.plan)
        finalists = choose_finalists(found)
        timings = time_plans(
            asker,
            [trial.plan for trial in finalists],
            task.split.tuning[: task.profile.batch],
            lambda number: progress(f"timing the finalists: {number} of {len(finalists)}"),
        )
        return Result(found, confirmed, timings, rungs, len(made.lines), {**made.refused, **asker.refused})


def choose_finalists(found: Found) -> tuple[Trial, ...]:
    """The chosen plan and its neighbours on the front, by cost; the last ones of the front where none was chosen."""
    chosen = found.chosen
    if chosen is None:
        return found.front[-_FINALISTS:]
    others = [trial for trial in found.front if trial.plan != chosen.plan]
    near = sorted(others, key=lambda trial: abs(trial.cost - chosen.cost))[: _FINALISTS - 1]
    return tuple(sorted((chosen, *near), key=lambda trial: trial.cost))


def _best_case(metric: Metric, count: int) -> Estimate:
    held = [True] * count
    return estimate_share(held) if metric == "agreement" else estimate_relative(held, held)


class _Decisions:
    """Every decision in its order, kept; one that was made before has to come out the same again."""

    def __init__(self, folder: Path, task: Task) -> None:
        self._task = hashlib.sha256(json.dumps(task.to_json(), sort_keys=True).encode()).hexdigest()
        self._lines = JsonLines(folder / DECISIONS, _HEADER, command="tune")
        self._before = [record for record in self._lines.records if record.get("task") == self._task]
        self.count = 0

    def add(self, stage: Stage, trial: Trial) -> None:
        """Raises CalibrationError: the same decision was another one before."""
        record = {
            "task": self._task,
            "stage": stage,
            "line": trial.line,
            "plan": trial.plan.model_dump_json(),
            "cost": trial.cost,
            "score": asdict(trial.score),
            "verdict": trial.verdict,
        }
        if self.count >= len(self._before):
            self._lines.append([record])
        elif self._before[self.count] != record:
            raise CalibrationError(
                f"decision {self.count + 1} was {self._before[self.count]} before this search was interrupted, and is {record} now: "
                "answers or code have changed since; remove the folder and start again"
            )
        self.count += 1
