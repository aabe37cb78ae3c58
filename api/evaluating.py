"""What pruning costs on the user's own questions: every variant answers all of them, and is compared with the unpruned one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sievert.bundle.errors import EngineUnavailableError, InputError, ProfileError
from sievert.bundle.files import locked
from sievert.bundle.names import FULL, LOCK
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.calibration.answers import NAME, Journal, Said
from sievert.calibration.identity import identify_graphs
from sievert.calibration.json_lines import writing
from sievert.calibration.questions import Question, Questions, check_questions, read_questions
from sievert.diagnosing import find_memory_gib
from sievert.engines.run.base import Runtime
from sievert.engines.run.files import find_model
from sievert.engines.run.generate import generate
from sievert.engines.run.pipeline import GRAPHS, Features, Pipeline
from sievert.engines.run.prompt import Prompter
from sievert.engines.run.registry import find_runtime
from sievert.eval_report import write_report
from sievert.eval_score import Score, score_variant
from sievert.progress import Progress, Size, silent
from sievert.running import choose_limit

OnCount = Callable[[int, int], None]
"""Called with how many answers there are and how many there will be."""


@dataclass(frozen=True)
class Evaluation:
    """All scores, ``full`` first. ``out`` is the folder with ``report.json``, ``answers.csv`` and the answers to go on from."""

    path: Path
    out: Path
    engine: str
    max_new_tokens: int
    questions: int
    visual_tokens: int
    plans: Mapping[str, Plan]
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class _Work:
    """What is asked of whom. ``made`` is the identity of each variant."""

    bundle: Bundle
    runtime: Runtime
    low_memory: bool
    made: Mapping[str, str]
    questions: Questions
    template: bool
    limit: int

    def profile(self, name: str) -> Profile:
        return self.bundle.variant(name).profile


def evaluate(
    bundle: str | Path,
    data: str | Path,
    *,
    variants: Sequence[str] = (),
    engine: str = "onnxruntime",
    low_memory: bool = False,
    max_new_tokens: Size = "auto",
    out: str | Path = "",
    samples: Size = "auto",
    template: bool = True,
    progress: Progress = silent,
    on_count: OnCount = lambda _, __: None,
) -> Evaluation:
    """Let ``full`` and each of ``variants`` (all others of as many images, if none is named) answer every question of ``data``, greedily.

    ``data`` has a line ``{"image": ..., "prompt": ..., "answer": ...}`` per question (``"images": [...]`` for several), image paths
    relative to it; ``answer`` is a text or a list of accepted ones, and may be missing. ``samples`` takes only the first lines.
    ``max_new_tokens`` ``auto`` is what all these variants have room for. Answers are kept in the folder ``out`` (``BUNDLE-eval`` beside
    the bundle), each with all that it depends on: a call asks only what is not answered there, and scores by the data as it is now.
    ``low_memory``: see :func:`find_runtime`.

    Raises:
        InputError, ImageError, PromptError: data that cannot be used, with its line; an ``out`` that holds something else.
        ProfileError: ``max_new_tokens`` is more than a variant has room for, or a variant takes another number of images than ``full``.
        VariantError: no such variant, no ``full``, or it has no such engine.
        EngineUnavailableError: the engine cannot run on this machine.
        BundleError: the bundle is not what its manifest says, or another process writes to ``out``.
    """
    runtime = find_runtime(engine, low_memory=low_memory)
    if reason := runtime.unavailable():
        raise EngineUnavailableError(reason)
    progress("reading the questions")
    if samples != "auto" and samples < 1:
        raise InputError(f"limit={samples}: at least one question is needed")
    questions = read_questions(Path(data), limit=0 if samples == "auto" else samples)
    progress("checking the bundle")
    opened = Bundle.open(bundle)
    names = choose_variants(opened, variants)
    made = {name: identify(opened, name, runtime) for name in names}
    work = _Work(opened, runtime, low_memory, made, questions, template, choose_limit(opened, names, max_new_tokens))
    place = check_place(opened, Path(out) if str(out) else opened.path.with_name(f"{opened.path.name}-eval"))
    count = len(questions.questions)
    check_questions(
        questions, opened, names, template=template, tell=lambda done: progress(f"checking images and prompts: {done} of {count}")
    )
    progress("")
    settings = {"engine": engine, "max_new_tokens": work.limit, "template": template, **({"low_memory": True} if low_memory else {})}
    with _holding(place):
        journal = Journal(place, settings)
        _answer_all(work, journal, on_count)
        said = {name: journal.said(made[name]) for name in names}
        scores = tuple(score_variant(name, questions.questions, said[name], None if name == FULL else said[FULL]) for name in names)
        plans = {name: opened.variant(name).plan for name in names}
        found = Evaluation(opened.path, place, engine, work.limit, count, opened.variant(FULL).profile.visual_tokens, plans, scores)
        write_report(place, describe(found, {"data": questions.sha256, **settings}), questions.questions, said)
    return found


def choose_variants(bundle: Bundle, asked: Sequence[str]) -> tuple[str, ...]:
    """``full`` and ``asked``, or all that take as many images per prompt as ``full`` does.

    Raises:
        VariantError: one of them does not exist.
        ProfileError: one that was asked for takes another number of images, so that no question fits both.
    """
    images = bundle.variant(FULL).profile.images
    counts = {name: bundle.variant(name).profile.images for name in dict.fromkeys(asked or sorted(bundle.manifest.variants))}
    if asked and (other := [name for name, count in counts.items() if count != images]):
        raise ProfileError(
            f"{other[0]!r} takes {counts[other[0]]} images per prompt and {FULL!r} takes {images}, so no question fits both: make a bundle "
            f"of its own with `sievert export --images {counts[other[0]]}`"
        )
    return tuple(dict.fromkeys([FULL, *(name for name, count in counts.items() if count == images)]))


def identify(bundle: Bundle, variant: str, runtime: Runtime) -> str:
    """A hash of everything a variant's answers depend on: what is run, the weights, the processor and the tokenizer.

    Raises:
        VariantError: no such variant, or it has no such engine.
    """
    return identify_graphs(bundle, {graph: find_model(bundle, variant, graph, runtime, "").sha256 for graph in GRAPHS})


def check_place(bundle: Bundle, out: Path) -> Path:
    """``out``, if answers may be written there: a folder to be made, an empty one, or one of an earlier evaluation.

    Raises:
        InputError: it lies inside the bundle, is a file, or holds something else.
    """
    place = out.expanduser().resolve()
    if place == bundle.path or bundle.path in place.parents:
        raise InputError(f"--out {out} lies inside the bundle, which holds nothing but the bundle: choose another folder")
    if place.exists() and not place.is_dir():
        raise InputError(f"--out {out} is a file: choose a folder")
    if place.is_dir() and (held := {path.name for path in place.iterdir()} - {LOCK}) and NAME not in held:
        raise InputError(f"--out {out} holds other files and no answers of `sievert eval`: choose a folder that does not exist yet")
    return place


def describe(found: Evaluation, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The report as plain values."""
    scores = [{**asdict(score), "plan": found.plans[score.variant].model_dump(mode="json")} for score in found.scores]
    return {"bundle": found.path.name, "questions": found.questions, "settings": dict(settings), "variants": scores}


def _answer_all(work: _Work, journal: Journal, on_count: OnCount) -> None:
    """Ask what has not been answered yet; what several lines or variants share is asked once."""
    questions = {question.asked: question for question in work.questions.questions}
    identities = set(work.made.values())
    total = len(questions) * len(identities)
    done = sum(asked in journal.said(made) for made in identities for asked in questions)
    on_count(done, total)
    for group in _group(work):
        waiting = [name for name in group if any(asked not in journal.said(work.made[name]) for asked in questions)]
        left = [question for asked, question in questions.items() if any(asked not in journal.said(work.made[name]) for name in waiting)]
        if not left:
            continue
        profile = work.profile(group[0])
        prompter = Prompter(work.bundle.path, work.bundle.manifest.geometry, profile)
        with contextlib.ExitStack() as loaded:
            pipelines = {name: loaded.enter_context(Pipeline(work.bundle, name, work.runtime)) for name in waiting}
            for start in range(0, len(left), profile.batch):
                for new in _answer_batch(work, prompter, left[start : start + profile.batch], pipelines, journal):
                    on_count(done := done + new, total)


def _answer_batch(
    work: _Work, prompter: Prompter, asked: Sequence[Question], pipelines: Mapping[str, Pipeline], journal: Journal
) -> Iterator[int]:
    """Ask one batch of every variant that has not answered all of it, and count; those with the same vision encoder share its features."""
    batch = prompter.prepare([question.images for question in asked], [question.prompt for question in asked], template=work.template)
    features: dict[str, Features] = {}
    for name, pipeline in pipelines.items():
        made = work.made[name]
        if all(question.asked in journal.said(made) for question in asked):
            continue
        encoder = work.bundle.manifest.files[work.bundle.graph("vision_encoder", variant=name).file].sha256
        if encoder not in features:
            features[encoder] = pipeline.encode(batch.pixel_values)
        said = generate(pipeline, prompter.tokenizer, batch, max_new_tokens=work.limit, features=features[encoder])
        answers = [(question.asked, Said(one.text.strip(), len(one.tokens), one.finish)) for question, one in zip(asked, said, strict=True)]
        yield journal.add(name, made, answers)


def _group(work: _Work) -> list[list[str]]:
    """Variants that are loaded together, so that each picture is prepared and looked at once: those of one batch and prompt length.

    Each one holds the weights up to twice, for prefill and decode; with low memory all of them hold them once. Where that would take more
    than half of the memory, or it is a GPU's, they go one after the other.
    """
    weights = work.bundle.manifest.files[work.bundle.manifest.weights_file].bytes
    held = weights if work.low_memory else 2 * weights * len(work.made)
    if work.runtime.name != "onnxruntime" or held > find_memory_gib() * 2**30 / 2:
        return [[name] for name in work.made]
    groups: dict[tuple[int, int, int], list[str]] = {}
    for name in work.made:
        groups.setdefault((work.profile(name).batch, *work.profile(name).lengths), []).append(name)
    return list(groups.values())


@contextlib.contextmanager
def _holding(place: Path) -> Iterator[None]:
    """Make and hold the folder of the answers.

    Raises:
        InputError: it cannot be written.
        BundleError: another process holds it.
    """
    with contextlib.ExitStack() as held:
        with writing(place):
            place.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(place, "eval"))
        yield
