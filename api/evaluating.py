"""What pruning costs on the user's own questions: every variant answers all of them, and is compared with the unpruned one."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import EngineUnavailableError, InputError
from sievert.bundle.files import locked
from sievert.bundle.names import LOCK
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.calibration.questions import Question, Questions, check_questions, read_questions
from sievert.diagnosing import find_memory_gib
from sievert.engines.run.files import find_model
from sievert.engines.run.generate import generate
from sievert.engines.run.pipeline import GRAPHS, Features, Pipeline
from sievert.engines.run.prompt import Prompter
from sievert.engines.run.registry import find_runtime
from sievert.eval_journal import NAME, Journal, Said
from sievert.eval_report import write_report
from sievert.eval_score import Score, score_variant
from sievert.planning import FULL
from sievert.progress import Progress, Size, silent
from sievert.running import choose_limit

OnCount = Callable[[int, int], None]
"""Called with how many answers there are and how many there will be."""

_FORMAT: Final = 1


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
    """What is asked of whom."""

    bundle: Bundle
    engine: str
    names: tuple[str, ...]
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
    max_new_tokens: Size = "auto",
    out: str | Path = "",
    samples: Size = "auto",
    template: bool = True,
    progress: Progress = silent,
    on_count: OnCount = lambda _, __: None,
) -> Evaluation:
    """Let ``full`` and each of ``variants`` (all others, if none is named) answer every question of ``data``, greedily.

    ``data`` has a line ``{"image": ..., "prompt": ..., "answer": ...}`` per question, image paths relative to it; ``answer`` is a text or
    a list of accepted ones, and may be missing. ``samples`` takes only the first lines. ``max_new_tokens`` ``auto`` is what all these
    variants have room for. Answers are kept in the folder ``out`` (``BUNDLE-eval`` beside the bundle): repeated, an interrupted call goes
    on there.

    Raises:
        InputError, ImageError, PromptError: data that cannot be used, with its line; an ``out`` that holds something else.
        ProfileError: ``max_new_tokens`` is more than a variant has room for.
        VariantError: no such variant, no ``full``, or it has no such engine.
        EngineUnavailableError: the engine cannot run on this machine.
        BundleError: the bundle is not what its manifest says, or another process writes to ``out``.
    """
    if reason := find_runtime(engine).unavailable():
        raise EngineUnavailableError(reason)
    progress("reading the questions")
    if samples != "auto" and samples < 1:
        raise InputError(f"limit={samples}: at least one question is needed")
    questions = read_questions(Path(data), limit=0 if samples == "auto" else samples)
    progress("checking the bundle")
    opened = Bundle.open(bundle)
    names = tuple(dict.fromkeys([FULL, *(variants or sorted(opened.manifest.variants))]))
    identities = {name: identify(opened, name, engine) for name in names}
    work = _Work(opened, engine, names, questions, template, choose_limit(opened, names, max_new_tokens))
    place = check_place(opened, Path(out) if str(out) else opened.path.with_name(f"{opened.path.name}-eval"))
    count = len(questions.questions)
    tightest = min((work.profile(name) for name in names), key=lambda profile: profile.max_text)
    prompter = Prompter(opened.path, opened.manifest.geometry, tightest)
    check_questions(questions, prompter, template=template, tell=lambda done: progress(f"checking images and prompts: {done} of {count}"))
    progress("")
    settings = {
        "sievert_eval": _FORMAT,
        "data": questions.sha256,
        "engine": engine,
        "max_new_tokens": work.limit,
        "template": template,
    }
    with _writing(place):
        images = {question.line: question.image_sha256 for question in questions.questions}
        journal = Journal(place, settings, identities, images)
        _answer_all(work, journal, on_count)
        scores = tuple(
            score_variant(name, questions.questions, journal.said(name), None if name == FULL else journal.said(FULL)) for name in names
        )
        plans = {name: opened.variant(name).plan for name in names}
        found = Evaluation(opened.path, place, engine, work.limit, count, opened.manifest.geometry.visual_tokens, plans, scores)
        write_report(place, describe(found, settings), questions.questions, {name: journal.said(name) for name in names})
    return found


def identify(bundle: Bundle, variant: str, engine: str) -> str:
    """A hash of everything a variant's answers depend on: what is run, the weights, the processor and the tokenizer.

    Raises:
        VariantError: no such variant, or it has no such engine.
    """
    runtime = find_runtime(engine)
    digest = hashlib.sha256()
    for graph in GRAPHS:
        digest.update(f"{graph} {find_model(bundle, variant, graph, runtime, '').sha256}\n".encode())
    for name, entry in sorted(bundle.manifest.files.items()):
        if not name.endswith((".onnx", ".engine")):
            digest.update(f"{name} {entry.sha256}\n".encode())
    return digest.hexdigest()


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
    """Ask what has not been answered yet."""
    lines = {question.line for question in work.questions.questions}
    total = len(lines) * len(work.names)

    def count() -> None:
        on_count(sum(len(lines & journal.said(name).keys()) for name in work.names), total)

    count()
    for group in _group(work):
        waiting = [name for name in group if lines - journal.said(name).keys()]
        if not waiting:
            continue
        profile = work.profile(group[0])
        prompter = Prompter(work.bundle.path, work.bundle.manifest.geometry, profile)
        with contextlib.ExitStack() as loaded:
            pipelines = {name: loaded.enter_context(Pipeline(work.bundle, name, work.engine)) for name in waiting}
            for start in range(0, len(lines), profile.batch):
                asked = work.questions.questions[start : start + profile.batch]
                _answer_batch(work, prompter, asked, pipelines, journal, count)


def _answer_batch(
    work: _Work,
    prompter: Prompter,
    asked: Sequence[Question],
    pipelines: Mapping[str, Pipeline],
    journal: Journal,
    count: Callable[[], None],
) -> None:
    """Ask one batch of every variant that has not answered all of it; those with the same vision encoder share its features."""
    waiting = [name for name in pipelines if {question.line for question in asked} - journal.said(name).keys()]
    if not waiting:
        return
    batch = prompter.prepare([question.image for question in asked], [question.prompt for question in asked], template=work.template)
    features: dict[str, Features] = {}
    for name in waiting:
        encoder = work.bundle.manifest.files[work.bundle.graph("vision_encoder", variant=name).file].sha256
        if encoder not in features:
            features[encoder] = pipelines[name].encode(batch.pixel_values)
        said = generate(pipelines[name], prompter.tokenizer, batch, max_new_tokens=work.limit, features=features[encoder])
        answers = [Said(question.line, one.text.strip(), len(one.tokens), one.finish) for question, one in zip(asked, said, strict=True)]
        journal.add(name, answers)
        count()


def _group(work: _Work) -> list[list[str]]:
    """Variants that are loaded together, so that each picture is prepared and looked at once: those of one batch and prompt length.

    Each one holds the weights up to twice, for prefill and decode. Where all of them would take more than half of the memory, or it is a
    GPU's, they go one after the other.
    """
    weights = work.bundle.manifest.files[work.bundle.manifest.weights_file].bytes
    if work.engine != "onnxruntime" or 2 * weights * len(work.names) > find_memory_gib() * 2**30 / 2:
        return [[name] for name in work.names]
    groups: dict[tuple[int, int], list[str]] = {}
    for name in work.names:
        groups.setdefault((work.profile(name).batch, work.profile(name).max_text), []).append(name)
    return list(groups.values())


@contextlib.contextmanager
def _writing(place: Path) -> Iterator[None]:
    """Make and hold the folder of the answers.

    Raises:
        InputError: it cannot be written.
        BundleError: another process holds it.
    """
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place, "eval"):
            yield
    except OSError as error:
        where = place if error.filename is None else Path(str(error.filename))
        if place not in (where, *where.parents) and where not in place.parents:
            raise
        raise InputError(f"{place} cannot be written ({error.strerror or error}): what was answered stays; give another --out") from error
