"""The files of a tuning: ``front.csv``, ``front.png``, ``plan.yaml``, ``tune.json`` and ``times.csv``.

All but the times follow from the answers alone: the same answers give the same bytes.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sievert.calibration.json_lines import writing
from sievert.calibration.scores import INTERVALS
from sievert.calibration.tune_place import REPORT
from sievert.plan_file import write_plan
from sievert.planning import describe_plan
from sievert.plotting import find_pyplot, to_png

if TYPE_CHECKING:
    from sievert.calibration.scores import Estimate
    from sievert.calibration.tune_search import Trial
    from sievert.tuning import Tuned

_FORMAT = 1
RELATIVE = "accuracy is that over the unpruned model's, whose own is taken as it is; intervals are those of the paired difference"


def write_results(folder: Path, tuned: Tuned, *, seed: int) -> None:
    """Write all of them into ``folder``.

    Raises:
        InputError: it cannot be written.
    """
    files = {
        "front.csv": _front_csv(tuned).encode(),
        "times.csv": _times_csv(tuned).encode(),
        REPORT: (json.dumps(describe(tuned, seed), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode(),
    }
    if (picture := draw_front(tuned)) is not None:
        files["front.png"] = picture
    if tuned.plan is not None:
        files["plan.yaml"] = write_plan(tuned.plan).encode()
    with writing(folder):
        for name, data in files.items():
            (folder / name).write_bytes(data)


def describe(tuned: Tuned, seed: int) -> dict[str, Any]:
    """The search as plain values."""
    task, result = tuned.task, tuned.result
    chosen = result.found.chosen
    return {
        "sievert_tune": _FORMAT,
        "task": {**task.to_json(), "bundle": task.bundle.path.name, "seed": seed},
        "questions": {"tuning": len(task.split.tuning), "confirming": len(task.split.confirming), "left_out": task.split.left_out},
        "rungs": list(result.rungs),
        "lines": result.lines,
        "accepted": tuned.plan is not None,
        "chosen": None if chosen is None else _describe(chosen),
        "confirmed": None if result.confirmed is None else asdict(result.confirmed),
        "front": [_describe(trial) for trial in result.found.front],
        "trials": [_describe(trial) for trial in result.found.trials],
        "refused": dict(result.refused),
        "intervals": f"{INTERVALS}; {RELATIVE}",
    }


def draw_front(tuned: Tuned) -> bytes | None:
    """Scores over costs, as PNG: every plan that was asked everything, the front, and the chosen plan on the other questions. None without
    matplotlib.
    """
    if (plt := find_pyplot()) is None:
        return None
    result, goal = tuned.result, tuned.task.goal
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    asked = [trial for trial in result.found.trials if trial.score.count == len(tuned.task.split.tuning)]
    axes.scatter([100 * trial.cost for trial in asked], [100 * trial.score.value for trial in asked], color="0.7", s=18, label="asked all")
    front = result.found.front
    bars = _bars([trial.score for trial in front])
    axes.errorbar(
        [100 * trial.cost for trial in front],
        [100 * trial.score.value for trial in front],
        bars,
        capsize=3,
        marker="o",
        label="front, 95 % intervals",
    )
    if (chosen := result.found.chosen) is not None and (confirmed := result.confirmed) is not None:
        style: dict[str, Any] = {"marker": "*", "markersize": 13, "capsize": 5, "linestyle": "none", "color": "tab:red"}
        place = [100 * chosen.cost], [100 * confirmed.value]
        axes.errorbar(*place, _bars([confirmed]), label="chosen, on questions not searched with", **style)
    axes.axhline(100 * goal.target, color="black", linewidth=1, linestyle="--", label=f"target {100 * goal.target:g} %")
    axes.set(xlabel="prefill FLOPs, % of unpruned", ylabel=f"{tuned.task.split.metric}, % of unpruned")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    return to_png(plt, figure)


def _bars(scores: Sequence[Estimate]) -> list[list[float]]:
    return [[100 * abs(getattr(score, end) - score.value) for score in scores] for end in ("low", "high")]


def _describe(trial: Trial) -> dict[str, Any]:
    return {
        "line": trial.line,
        "plan": trial.plan.model_dump(mode="json"),
        "cost": trial.cost,
        "score": asdict(trial.score),
        "verdict": trial.verdict,
    }


def _front_csv(tuned: Tuned) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["cost", "score", "low", "high", "questions", "chosen", "confirmed", "confirmed_low", "confirmed_high", "plan"])
    found, confirmed = tuned.result.found, tuned.result.confirmed
    rows = list(found.front)
    if found.chosen is not None and found.chosen.plan not in [trial.plan for trial in rows]:
        rows = sorted([*rows, found.chosen], key=lambda trial: trial.cost)
    for trial in rows:
        chosen = found.chosen is not None and trial.plan == found.chosen.plan
        held = _numbers(confirmed)[:3] if chosen and confirmed is not None else ["", "", ""]
        plan = describe_plan(trial.plan)
        writer.writerow([f"{trial.cost:.4f}", *_numbers(trial.score), "yes" if chosen else "no", *held, plan])
    return table.getvalue()


def _times_csv(tuned: Tuned) -> str:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["plan", "measure", "ratio", "low", "high", "rounds"])
    for timing in tuned.result.timings:
        for name in ("prefill", "first_token"):
            writer.writerow([describe_plan(timing.plan), name, *_numbers(getattr(timing, name))])
    return table.getvalue()


def _numbers(estimate: Estimate) -> list[str]:
    return [f"{estimate.value:.4f}", f"{estimate.low:.4f}", f"{estimate.high:.4f}", str(estimate.count)]
