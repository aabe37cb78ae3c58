"""Every arm's answers to the questions of `benchmarks/accuracy.py`, shared among processes, kept so that a run can go on."""

from __future__ import annotations

import json
import multiprocessing
import os
import queue
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from benchmarks.accuracy_arms import Arm
from benchmarks.accuracy_judge import Answers
from examples.digits_lvlm.data import Item, Split, held_out
from sievert.bundle.store import Bundle
from sievert.engines.run.dtypes import Array
from sievert.engines.run.generate import generate
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.pipeline import Features, Pipeline, PrefillResult
from sievert.engines.run.prompt import PromptBatch, Prompter

BATCH: Final = 16
MAX_NEW: Final = 4


class Recording(Pipeline):
    """A pipeline that remembers the logits of its last prefill: the distribution of the first answer token."""

    logits: Array

    def prefill(self, batch: PromptBatch, features: Features) -> PrefillResult:
        """As the pipeline does."""
        result = super().prefill(batch, features)
        self.logits = result.logits
        return result


def answer(bundle: Bundle, arms: Sequence[Arm], questions: int, folder: Path, label: str, split: Split) -> dict[str, Answers]:
    """All questions to all arms in one pass; the first arm is the unpruned model.

    Each processor's own process asks its share of the arms, and the unpruned model, with one thread: on small graphs that is twice
    as fast as sharing each graph.
    """
    context = multiprocessing.get_context("spawn")
    processes = len(os.sched_getaffinity(0))
    shares = []
    for place in range(processes):
        saved = folder / f"answers-{label}-{split}-{questions}-{place}-of-{processes}.npz"
        shares.append(Share(bundle.path, (arms[0], *arms[1 + place :: processes]), questions, split, saved))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with context.Manager() as manager, ProcessPoolExecutor(processes, context) as pool, Progress(*columns) as progress:
        bar, answered = progress.add_task(f"{label}: {len(arms)} variants", total=questions * processes), manager.Queue()
        waiting = [pool.submit(answer_share, share, answered) for share in shares]
        while wait(waiting, timeout=1).not_done:
            while not answered.empty():
                progress.advance(bar, answered.get())
        progress.update(bar, completed=questions * processes)
        taken = {name: rows for one in waiting for name, rows in one.result().items()}
    return {arm.name: Answers(*np.asarray(taken[arm.name], np.float64).T) for arm in arms}


@dataclass(frozen=True)
class Share:
    """The arms one process asks, the unpruned model first; their answers are kept in ``saved``."""

    bundle: Path
    arms: tuple[Arm, ...]
    questions: int
    split: Split
    saved: Path


def answer_share(share: Share, answered: queue.Queue[int]) -> dict[str, list[list[float]]]:
    """For each arm and question: right, same, divergence. ``answered`` is told how many questions are done.

    Prompts and vision features are computed once a batch and shared by the arms that have the same vision encoder.
    """
    plans = json.dumps({arm.name: arm.plan.model_dump(mode="json") for arm in share.arms}, sort_keys=True)
    taken: dict[str, list[list[float]]] = {arm.name: [] for arm in share.arms}
    if share.saved.exists():
        with np.load(share.saved) as file:
            if str(file["plans"]) == plans:
                taken = {name: file[name].tolist() for name in taken}
    known = len(taken[share.arms[0].name])
    answered.put(known)
    if known == share.questions:
        return taken
    bundle, runtime = Bundle.open(share.bundle), OnnxRuntime(threads=1)
    pipelines = {arm.name: Recording(bundle, arm.name, runtime) for arm in share.arms}
    prompter = Prompter(bundle.path, bundle.manifest.geometry, bundle.variant(share.arms[0].name).profile)
    for count, items in enumerate(_chunks(islice(held_out(share.questions, split=share.split), known, None))):
        for name, rows in _answer_batch(bundle, pipelines, prompter, items).items():
            taken[name] += rows
        answered.put(len(items))
        if count % 20 == 19:
            _save(share.saved, plans, taken)
    _save(share.saved, plans, taken)
    return taken


def _answer_batch(
    bundle: Bundle, pipelines: Mapping[str, Recording], prompter: Prompter, items: Sequence[Item]
) -> dict[str, list[list[float]]]:
    batch = prompter.prepare([item.image for item in items], [item.question for item in items])
    shared: dict[str, Features] = {}
    reference: tuple[list[str], Array] | None = None
    rows: dict[str, list[list[float]]] = {}
    for name, pipeline in pipelines.items():
        encoder = bundle.manifest.files[pipeline.variant.graphs["vision_encoder"].file].sha256
        features = shared[encoder] = shared.get(encoder) or pipeline.encode(batch.pixel_values)
        said = [one.text.strip() for one in generate(pipeline, prompter.tokenizer, batch, max_new_tokens=MAX_NEW, features=features)]
        logs = _log_softmax(pipeline.logits[: len(items)])
        reference = reference or (said, logs)
        divergence = (np.exp(reference[1]) * (reference[1] - logs)).sum(axis=1)
        rows[name] = [
            [text == item.answer, text == first, float(kl)]
            for text, item, first, kl in zip(said, items, reference[0], divergence, strict=True)
        ]
    return rows


def _log_softmax(logits: Array) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return logs


def _chunks(items: Iterator[Item]) -> Iterator[list[Item]]:
    while chunk := list(islice(items, BATCH)):
        yield chunk


def _save(path: Path, plans: str, taken: Mapping[str, list[list[float]]]) -> None:
    temporary = path.with_suffix(".part.npz")
    arrays: dict[str, Any] = {"plans": np.asarray(plans), **{name: np.asarray(rows, np.float32) for name, rows in taken.items()}}
    with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w") as file:
                np.save(file, array)
    temporary.replace(path)
