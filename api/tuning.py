"""The right pruning budget: the fastest plan that keeps a target on the user's own questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sievert.bundle.errors import EngineUnavailableError, InputError
from sievert.bundle.names import FULL
from sievert.bundle.plan import Plan
from sievert.bundle.store import Bundle
from sievert.diagnosing import find_memory_gib
from sievert.progress import Progress, Size, silent
from sievert.running import choose_limit

if TYPE_CHECKING:
    from sievert.calibration.questions import Questions
    from sievert.calibration.tune import Result, Task

Metric = Literal["auto", "agreement", "accuracy"]
_FEATURES_SHARE = 8  # of the machine's memory, the part that features of pictures may take


@dataclass(frozen=True)
class Tuned:
    """What was found, and the folder ``out`` with it. ``plan`` is what to use, None where no plan reaches the target.

    ``result.confirmed`` is the plan's score on the questions that the search never saw.
    """

    out: Path
    plan: Plan | None
    task: Task
    result: Result


def tune(
    bundle: str | Path,
    data: str | Path,
    *,
    target: str = "99%",
    metric: Metric = "auto",
    selectors: Sequence[str] = (),
    layers: Sequence[int] = (),
    keeps: Sequence[str] = (),
    options: bool = True,
    budget: str = "100%",
    split: str = "50%",
    questions: Size = "auto",
    confirm_questions: Size = "auto",
    seed: int = 0,
    strict: bool = False,
    engine: str = "onnxruntime",
    max_new_tokens: Size = "auto",
    out: str | Path = "",
    template: bool = True,
    force: bool = False,
    progress: Progress = silent,
) -> Tuned:
    """Search the plan of the fewest prefill FLOPs that keeps ``target`` of the unpruned model's answers, and confirm it on other questions.

    ``data`` is as in :func:`sievert.evaluate`. ``metric``: ``agreement``, the share of answers that are the unpruned ones, or ``accuracy``,
    right answers over those of the unpruned model; ``auto`` is accuracy where every line has an answer. ``split`` of the questions are
    tuned with, the others confirm, at most ``questions`` and ``confirm_questions`` of them; no picture is in both.

    ``selectors``, ``layers`` and ``keeps`` restrict what is tried; ``options``: also other options of the leaders. ``budget`` is the most
    prefill FLOPs, as a share of the unpruned model's. ``strict`` wants the lower ends of the 95 % intervals to reach the target, with
    both parts. Plans have the sizes of the variant ``full``, are made in memory and run by ``engine``, which has to read ONNX.

    Results stand in the folder ``out`` (``BUNDLE-tune`` beside the bundle): ``front.csv``, ``front.png`` (where matplotlib is installed),
    ``tune.json``, ``times.csv``, and ``plan.yaml``, for ``prune``, where a plan reaches the target. Until then work stands beside it, in
    ``out.partial``: the same call goes on there after an interruption, and ends with the same results. ``force`` replaces results, and
    asks only what they have no answers to.

    Raises:
        InputError, ImageError, PromptError: data or shares that cannot be used, too few questions, an ``out`` that is taken.
        PlanError: a selector, layer or keep that does not exist, or a grid of which nothing can be made.
        ProfileError: ``max_new_tokens`` is more than ``full`` has room for.
        VariantError: there is no variant ``full``.
        EngineUnavailableError: the engine cannot run on this machine.
        BundleError: the bundle is not what its manifest says, or another process works in ``out``.
    """
    from sievert.calibration.questions import check_questions, read_questions
    from sievert.calibration.tune import run_task
    from sievert.calibration.tune_place import choose_place, working_beside, working_folder
    from sievert.tune_report import write_results

    aim, most = read_share("target", target), read_share("budget", budget)
    progress("checking the bundle")
    opened = Bundle.open(bundle)
    place = choose_place(opened, out, force=force)
    progress("reading the questions")
    asked = read_questions(Path(data))
    task = _make_task(
        opened,
        asked,
        target=aim,
        budget=most,
        strict=strict,
        metric=metric,
        grid=(tuple(selectors), tuple(layers), tuple(keeps)),
        options=options,
        split=(read_share("split", split), seed, _count(questions), _count(confirm_questions)),
        engine=engine,
        max_new_tokens=max_new_tokens,
        template=template,
    )
    count = len(asked.questions)
    check_questions(asked, opened, [FULL], template=template, tell=lambda done: progress(f"checking images and prompts: {done} of {count}"))
    progress("")
    with working_beside(place) as finish:
        result = run_task(task, working_folder(place), progress)
        progress("")
        found = Tuned(place, result.found.chosen.plan if result.found.chosen and result.accepted(task.goal) else None, task, result)
        write_results(working_folder(place), found, seed=seed)
        finish()
    return found


def read_share(name: str, text: str) -> float:
    """``99%`` as 0.99.

    Raises:
        InputError: no percentage, or not above 0 % and at most 100 %.
    """
    try:
        if not text.strip().endswith("%"):
            raise ValueError(text)
        percent = float(text.strip()[:-1])
    except ValueError:
        raise InputError(f"{name}={text!r} is no percentage: write it like {name} 99%") from None
    if not 0 < percent <= 100:
        raise InputError(f"{name}={text}: a percentage lies above 0% and at most at 100%")
    return percent / 100


def _make_task(
    bundle: Bundle,
    asked: Questions,
    *,
    target: float,
    budget: float,
    strict: bool,
    metric: Metric,
    grid: tuple[tuple[str, ...], tuple[int, ...], tuple[str, ...]],
    options: bool,
    split: tuple[float, int, int, int],
    engine: str,
    max_new_tokens: Size,
    template: bool,
) -> Task:
    """Everything that is asked for, checked; ``split`` is the share, the seed, and the most questions of each part. Raises as tune."""
    from sievert.calibration.tune import Task, needed_questions
    from sievert.calibration.tune_ask import Settings
    from sievert.calibration.tune_grid import KEEPS, Grid, make_lines
    from sievert.calibration.tune_search import Goal
    from sievert.calibration.tune_split import choose_metric, split_questions
    from sievert.engines.run.registry import find_runtime

    runtime = find_runtime(engine)
    if not runtime.reads_onnx:
        raise InputError(f"engine {engine!r} runs engine files, and plans are tried as graphs in memory: use onnxruntime")
    if reason := runtime.unavailable():
        raise EngineUnavailableError(reason)
    selectors, layers, keeps = grid
    restricted = bool(layers or keeps)
    allowed = Grid(selectors, layers, keeps or KEEPS, schedules=not restricted)
    profile = bundle.variant(FULL).profile
    make_lines(allowed, bundle.manifest.geometry, profile)  # before anything is asked
    goal = Goal(target, budget, strict)
    share, seed, most, confirming = split
    parts = split_questions(
        asked.questions, choose_metric(asked.questions, metric), share=share, seed=seed, tuning=most, confirming=confirming
    )
    few = min(len(parts.tuning), len(parts.confirming))
    if strict and (needed := needed_questions(goal, parts)) > few * (needed > 0):
        raise InputError(
            f"strict, but even a plan that changes no answer could not show {target * 100:g}% on {few} questions: each part needs "
            f"{needed}; give more questions, or a lower target"
        )
    if strict and target >= 1:
        raise InputError("strict, but no number of questions shows that 100% is kept: give a lower target, or leave strict out")
    memory = int((find_memory_gib() or 8) * 2**30 / _FEATURES_SHARE)
    limit = choose_limit(bundle, [FULL], max_new_tokens)
    settings = Settings(runtime, limit, template, memory)
    return Task(bundle, profile, parts, allowed, goal, settings, options, not keeps, asked.sha256)


def _count(size: Size) -> int:
    if size == "auto":
        return 0
    if size < 1:
        raise InputError(f"{size} questions: give a number of at least 10")
    return size
