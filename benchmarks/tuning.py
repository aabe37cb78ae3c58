"""What `sievert tune` finds on the shipped model, beside the default setting: `python benchmarks/tuning.py`.

The search sees questions about training digits alone: one part to tune with, one to confirm on. What it finds for a target then answers
questions about digits that neither the model nor the search has seen, beside the default (IWP before a seventh of the layers, 22 % kept).
With `--as-good` it is also asked for what the default keeps on the first part. Answers are kept in `--work`, so an interrupted run goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sievert
from benchmarks.stamp import ROOT, describe_machine, hash_code
from examples.digits_lvlm.data import Split, held_out
from sievert.bundle.plan import Plan
from sievert.calibration.questions import read_questions
from sievert.calibration.scores import Estimate, estimate_change, is_right
from sievert.calibration.tune import Task
from sievert.calibration.tune_ask import Asker
from sievert.calibration.tune_split import Split as Parts
from sievert.calibration.tune_time import Timing, time_plans
from sievert.planning import Cut, describe_plan, make_plan
from sievert.tuning import Tuned, tune

CHECKPOINT: Final = ROOT / "examples" / "digits_lvlm" / "checkpoint"
MEASURED: Final = (
    "bundle",
    "graph_passes",
    "engines/run",
    "exporter",
    *(
        f"calibration/{name}.py"
        for name in ("answers", "questions", "scores", "tune", "tune_ask", "tune_grid", "tune_search", "tune_split")
    ),
    "api/tuning.py",
    "examples/digits_lvlm/checkpoint",
    "examples/digits_lvlm/data.py",
    "examples/digits_lvlm/questions.py",
    "benchmarks/tuning.py",
)
SELECTORS: Final = ("iwp", "magnitude", "fastv", "dart", "divprune", "visionzip")
MAX_NEW: Final = 4


@dataclass(frozen=True)
class Row:
    """A plan on the unseen digits: right answers, and the paired differences of their share to the unpruned model and to the default."""

    name: str
    plan: Plan
    cost: float
    time: Timing
    tuned_on: Estimate
    right: int
    against_unpruned: Estimate
    against_default: Estimate


def write_data(folder: Path, count: int, split: Split) -> Path:
    """``count`` questions as ``sievert tune`` takes them; several are about one canvas."""
    folder.mkdir(parents=True, exist_ok=True)
    names: dict[bytes, str] = {}
    lines = []
    for item in held_out(count, split=split):
        pixels = item.image.tobytes()
        if pixels not in names:
            names[pixels] = f"{len(names):05}.png"
            item.image.save(folder / names[pixels])
        lines.append(json.dumps({"image": names[pixels], "prompt": item.question, "answer": item.answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "questions.jsonl"


def search(bundle: Path, data: Path, out: Path, target: str, *, vary: bool) -> Tuned:
    """One call of ``sievert tune``; later ones go on from the answers of the first. ``vary``: also other options of the leaders."""
    return tune(
        bundle,
        data,
        target=target,
        selectors=SELECTORS,
        options=vary,
        max_new_tokens=MAX_NEW,
        out=out,
        force=True,
        progress=lambda what: _say(f"\r{target}: {what}\033[K"),
    )


def measure_default(found: Tuned, plan: Plan, folder: Path) -> tuple[Estimate, float]:
    """The default's score on the questions that were tuned with, and its cost."""
    with Asker(found.task.bundle, found.task.profile, found.task.split, found.task.settings, folder, lambda _: None) as asker:
        return asker.judge(plan, asker.total), asker.cost(plan)


def judge(task: Task, data: Path, folder: Path, plans: dict[str, tuple[Plan, Estimate]]) -> tuple[int, list[Row]]:
    """All plans, the default first, on unseen questions; and how many of them the unpruned model answers right."""
    folder.mkdir(exist_ok=True)
    questions = read_questions(data).questions
    parts = Parts("accuracy", questions, questions, 0)
    with Asker(
        task.bundle, task.profile, parts, task.settings, folder, lambda count: _say(f"\runseen digits: {count} answers\033[K")
    ) as asker:
        unpruned = asker.ask(Plan(), questions)
        before = [is_right(question, unpruned[question.asked].text) for question in questions]
        rights: dict[str, list[bool]] = {}
        for name, (plan, _) in plans.items():
            said = asker.ask(plan, questions)
            rights[name] = [is_right(question, said[question.asked].text) for question in questions]
        timings = time_plans(asker, [plan for plan, _ in plans.values()], questions[: task.profile.batch], lambda _: None)
        first = next(iter(rights.values()))
        rows = []
        for (name, (plan, score)), timing in zip(plans.items(), timings, strict=True):
            changes = estimate_change(rights[name], before), estimate_change(rights[name], first)
            rows.append(Row(name, plan, asker.cost(plan), timing, score, sum(rights[name]), *changes))
        return sum(before), rows


def write_table(rows: list[Row], unpruned: int, asked: int, tunings: dict[str, Tuned]) -> Path:
    """``docs/tuning.md``."""
    first = next(iter(tunings.values()))
    options = "the leaders also with other" if first.task.vary else "with their default"
    lines = [
        "# What `sievert tune` finds on the shipped model",
        "",
        f"Written by `benchmarks/tuning.py`; do not edit. {len(first.task.split.tuning)} questions to tune with and "
        f"{len(first.task.split.confirming)} to confirm on are about",
        f"training digits; the last columns are {asked} questions about digits that neither the model nor the search has seen, of which",
        f"the unpruned model answers {unpruned} right. Selectors: {', '.join(SELECTORS)}, {options} options. Time: prefill over the",
        "unpruned one's, medians of 15 pairs in turns, on a shared machine. Differences are paired, in points, with 95 % intervals.",
        "",
        f"Code measured: `{hash_code(MEASURED)}`. Machine: {describe_machine()}.",
        "",
        "| | plan | FLOPs | time | where it was tuned, % of unpruned | unseen, right | against unpruned | against the default |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        time = row.time.prefill
        against = "" if row is rows[0] else _points(row.against_default)
        lines.append(
            f"| {row.name} | `{describe_plan(row.plan)}` | {row.cost * 100:.1f} % | {time.value:.2f} [{time.low:.2f}, {time.high:.2f}] "
            f"| {_percent(row.tuned_on)} | {row.right / asked * 100:.1f} % | {_points(row.against_unpruned)} | {against} |"
        )
    lines += ["", "What each search did:", ""]
    for name, tuned in tunings.items():
        trials, total = tuned.result.found.trials, len(tuned.task.split.tuning)
        whole, asked_in_all = sum(trial.score.count == total for trial in trials), sum(trial.score.count for trial in trials)
        held = tuned.result.confirmed
        said = "no plan reached it" if held is None else f"confirmed {_percent(held)} of unpruned"
        lines.append(
            f"- {name}: {tuned.result.lines} lines, {len(trials)} plans looked at, {whole} asked everything, {asked_in_all} questions "
            f"put to plans; {said}."
        )
    path = ROOT / "docs" / "tuning.md"
    path.write_text("\n".join(lines) + "\n")
    return path


def measure(work: Path, questions: int, unseen: int, target: str, *, vary: bool, as_good: bool) -> None:
    """The whole benchmark."""
    code, bundle, out = hash_code(MEASURED), work / "bundle", work / "tuned"
    if not bundle.exists():
        sievert.export(CHECKPOINT, bundle, cuts=(), max_text=24, max_new_tokens=MAX_NEW, engines=("onnxruntime",))
    data, other = write_data(work / "data", questions, "train"), write_data(work / "unseen", unseen, "test")
    tunings = {f"target {target}": search(bundle, data, out, target, vary=vary)}
    first = next(iter(tunings.values()))
    default = make_plan(first.task.bundle.manifest.geometry, [Cut()])
    score, _ = measure_default(first, default, out)
    if as_good:
        reached = f"{math.floor(score.value * 1e4) / 1e2:g}%"
        tunings[f"as good as the default ({reached})"] = search(bundle, data, out, reached, vary=vary)
    plans = {"default": (default, score)}
    plans |= {
        name: (found.chosen.plan, found.chosen.score) for name, found in ((n, t.result.found) for n, t in tunings.items()) if found.chosen
    }
    unpruned, rows = judge(first.task, other, work / "judged", plans)
    if hash_code(MEASURED) != code:
        raise SystemExit("the code was changed while it was measured: nothing was written")
    sys.stdout.write(f"\nmade {write_table(rows, unpruned, unseen, tunings).relative_to(ROOT)}\n")


def _points(change: Estimate) -> str:
    return f"{change.value * 100:+.1f} [{change.low * 100:+.1f}, {change.high * 100:+.1f}]"


def _percent(score: Estimate) -> str:
    return f"{score.value * 100:.1f} [{score.low * 100:.1f}, {score.high * 100:.1f}]"


def _say(text: str) -> None:
    sys.stderr.write(text)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--questions", type=int, default=1000, help="questions about training digits, half to tune with, half to confirm on"
    )
    parser.add_argument("--unseen", type=int, default=1000, help="questions about unseen digits")
    parser.add_argument("--target", default="98%", help="what has to be kept of the unpruned model's accuracy")
    parser.add_argument("--vary", action="store_true", help="also other options of the leaders (three times as long)")
    parser.add_argument("--as-good", action="store_true", help="also search for what is as good as the default")
    parser.add_argument("--work", type=Path, help="folder for the bundle and the answers (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work: Path = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        measure(work.resolve(), options.questions, options.unseen, options.target, vary=options.vary, as_good=options.as_good)


if __name__ == "__main__":
    main()
