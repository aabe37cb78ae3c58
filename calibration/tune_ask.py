"""Ask plans the questions: what each says is kept, and what plans have in common is computed once.

Shared among all plans: a prompt's tokens, and what a vision encoder says of a picture (plans that score in the encoder have one of their
own). The unpruned model answers once. A plan's graphs are made in memory; nothing is written to the bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
import onnx
import onnx_ir as ir

from sievert.bundle.errors import GraphError, InputError, PlanError
from sievert.bundle.files import sha256_bytes
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.calibration.answers import Journal, Said
from sievert.calibration.identity import identify_graphs
from sievert.calibration.json_lines import JsonLines
from sievert.calibration.questions import Asked, Question
from sievert.calibration.scores import Estimate, agrees, estimate_relative, estimate_share, is_right
from sievert.calibration.tune_split import Split
from sievert.engines.run.base import Runtime
from sievert.engines.run.dtypes import Array
from sievert.engines.run.generate import generate
from sievert.engines.run.pipeline import Features, Pipeline
from sievert.engines.run.prompt import PromptBatch, Prompter
from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.prune import Preview, load_dynamic, preview_variant

PLANS: Final = "plans.jsonl"
_HEADER: Final = {"sievert_tune": 1}
_UNPRUNED: Final = Plan()
_PACKAGES: Final = (
    "sievert",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "numpy",
    "pillow",
    "tokenizers",
    "transformers",
)
_PREVIEWS: Final = 16  # of the last plans the graphs are kept; about 1 MB each


@dataclass(frozen=True)
class Settings:
    """What all answers depend on beside plan, picture and prompt. ``memory`` is how many bytes of features are kept."""

    runtime: Runtime
    max_new_tokens: int
    template: bool
    memory: int

    def to_json(self) -> dict[str, Any]:
        """As the answers are kept under."""
        return {"engine": self.runtime.name, "max_new_tokens": self.max_new_tokens, "template": self.template, "versions": find_versions()}


@dataclass(frozen=True)
class Made:
    """What is known of a plan's graphs without making them again: the identity that its answers are kept under, the FLOPs of its prefill
    and of its vision encoder for one batch, and the hash of that encoder.
    """

    identity: str
    prefill_flops: int
    vision_flops: int
    encoder: str


class Asker:
    """The judge of a search, over the questions of ``split``. A context manager: it holds the pipeline that was used last.

    ``folder`` holds the answers, and what plans cost, from one process to the next. ``on_answers`` is told how many were given so far.

    Raises:
        InputError: a damaged journal, or a folder that cannot be written.
    """

    def __init__(
        self, bundle: Bundle, profile: Profile, split: Split, settings: Settings, folder: Path, on_answers: Callable[[int], None]
    ) -> None:
        self.total = len(split.tuning)
        self.answered = 0
        self.refused: dict[str, str] = {}
        self._bundle, self._profile, self._split, self._settings = bundle, profile, split, settings
        self._journal = Journal(folder, settings.to_json(), command="tune")
        self._plans = JsonLines(folder / PLANS, _HEADER, command="tune")
        self._on_answers = on_answers
        self._dynamic = load_dynamic(bundle)
        self._prompter = Prompter(bundle.path, bundle.manifest.geometry, profile)
        self._source = self._hash_source()
        self._made = {record["plan"]: Made(**record["made"]) for record in self._plans.records if record.get("source") == self._source}
        self._previews: OrderedDict[str, Preview] = OrderedDict()
        self._batches: dict[tuple[Asked, ...], PromptBatch] = {}
        self._features = _FeatureCache(settings.memory)
        self._pipeline: tuple[str, Pipeline] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._drop_pipeline()

    def ask_unpruned(self) -> None:
        """Let the unpruned model answer everything; judging needs that.

        Raises:
            InputError: the metric is accuracy, and the unpruned model answers none of a part's questions right.
        """
        for part, questions in (("tune with", self._split.tuning), ("confirm on", self._split.confirming)):
            said = self.ask(_UNPRUNED, questions)
            if self._split.metric == "accuracy" and not any(is_right(question, said[question.asked].text) for question in questions):
                raise InputError(
                    f"the unpruned model answers none of the {len(questions)} questions to {part} as their lines accept, so that nothing "
                    "can be judged by accuracy: look at the answers, or use the metric agreement"
                )

    def cost(self, plan: Plan) -> float:
        """FLOPs of the plan's prefill over the unpruned one's, with what its vision encoder computes more than the unpruned one.

        Infinite for a plan whose graphs cannot be made; ``refused`` says why.
        """
        full = self._make(_UNPRUNED)
        try:
            mine = self._make(plan)
        except (PlanError, GraphError) as error:
            self.refused[plan.model_dump_json()] = str(error)
            return math.inf
        return (mine.prefill_flops + mine.vision_flops - full.vision_flops) / full.prefill_flops

    def judge(self, plan: Plan, count: int) -> Estimate:
        """The plan's score on the first ``count`` tuning questions."""
        return self._score(plan, self._split.tuning[:count])

    def hope(self, plan: Plan, count: int) -> float:
        """What the plan would reach on all tuning questions if it did all but the first ``count`` right."""
        asked = self._split.tuning[:count]
        mine, full = self.ask(plan, asked), self.ask(_UNPRUNED, self._split.tuning)
        if self._split.metric == "agreement":
            lost = sum(not agrees(mine[question.asked].text, full[question.asked].text) for question in asked)
            return (self.total - lost) / self.total
        lost = sum(not is_right(question, mine[question.asked].text) for question in asked)
        return (self.total - lost) / sum(is_right(question, full[question.asked].text) for question in self._split.tuning)

    def confirm(self, plan: Plan) -> Estimate:
        """The plan's score on the questions that the search never saw."""
        return self._score(plan, self._split.confirming)

    def preview(self, plan: Plan) -> Preview:
        """The plan's graphs."""
        key = plan.model_dump_json()
        if key not in self._previews:
            self._previews[key] = preview_variant(self._bundle, self._dynamic, name="tuned", plan=plan, profile=self._profile)
            while len(self._previews) > _PREVIEWS:
                self._previews.popitem(last=False)
        self._previews.move_to_end(key)
        return self._previews[key]

    def prepare(self, questions: Sequence[Question]) -> PromptBatch:
        """One batch of questions, pictures included."""
        images, prompts = [question.images for question in questions], [question.prompt for question in questions]
        return self._prompter.prepare(images, prompts, template=self._settings.template)

    def _score(self, plan: Plan, questions: Sequence[Question]) -> Estimate:
        mine, full = self.ask(plan, questions), self.ask(_UNPRUNED, questions)
        if self._split.metric == "agreement":
            return estimate_share([agrees(mine[question.asked].text, full[question.asked].text) for question in questions])
        now, before = ([is_right(question, said[question.asked].text) for question in questions] for said in (mine, full))
        if not any(before):  # among the first few of a model that is seldom right: nothing is known yet
            return Estimate(1.0, 0.0, 2.0, len(questions))
        return estimate_relative(now, before)

    def ask(self, plan: Plan, questions: Sequence[Question]) -> Mapping[Asked, Said]:
        """Answers to ``questions``: those that are kept, and the others batch by batch.

        Batches are cut from a part of the split at fixed places, whatever is answered already: rounding may depend on a row's neighbours.
        """
        made, size = self._make(plan), self._profile.batch
        for start in range(0, len(questions), size):
            batch = questions[start : start + size]
            if any(question.asked not in self._journal.said(made.identity) for question in batch):
                said = self._answer(plan, made, batch)
                self.answered += self._journal.add(plan.model_dump_json(), made.identity, said)
                self._on_answers(self.answered)
        return self._journal.said(made.identity)

    def _answer(self, plan: Plan, made: Made, questions: Sequence[Question]) -> list[tuple[Asked, Said]]:
        pipeline = self._load(plan, made)
        key = tuple(question.asked for question in questions)
        batch = self._batches.get(key)
        features = self._features.find(made.encoder, questions, self._profile.batch)
        if batch is None or features is None:
            whole = self.prepare(questions)
            # What stays is small: the pictures are needed again only by another vision encoder.
            self._batches[key] = batch = replace(whole, pixel_values=np.empty(0, np.float32), processed=(), pictures=())
            features = features or self._features.add(made.encoder, questions, pipeline.encode(whole.pixel_values))
        limit = self._settings.max_new_tokens
        said = generate(pipeline, self._prompter.tokenizer, batch, max_new_tokens=limit, features=features)
        return [
            (question.asked, Said(one.text.strip(), len(one.tokens), one.finish)) for question, one in zip(questions, said, strict=True)
        ]

    def _load(self, plan: Plan, made: Made) -> Pipeline:
        if self._pipeline is None or self._pipeline[0] != made.identity:
            self._drop_pipeline()
            self._pipeline = made.identity, self.open(plan)
        return self._pipeline[1]

    def open(self, plan: Plan) -> Pipeline:
        """The plan's graphs, loaded; the caller closes it."""
        preview = self.preview(plan)
        return Pipeline(preview.bundle, preview.name, self._settings.runtime, graphs=preview.graphs)

    def _drop_pipeline(self) -> None:
        if self._pipeline is not None:
            self._pipeline[1].close()
            self._pipeline = None

    def _make(self, plan: Plan) -> Made:
        key = plan.model_dump_json()
        if key not in self._made:
            graphs = self.preview(plan).graphs
            hashes = {graph: sha256_bytes(content) for graph, content in graphs.items()}
            flops = {graph: _count(graphs[graph], self._profile.sequence) for graph in ("prefill", "vision_encoder")}
            made = Made(identify_graphs(self._bundle, hashes), flops["prefill"], flops["vision_encoder"], hashes["vision_encoder"])
            self._plans.append([{"plan": key, "source": self._source, "made": asdict(made)}])
            self._made[key] = made
        return self._made[key]

    def _hash_source(self) -> str:
        """What a plan's graphs are made from: the dynamic graphs, the profile, and the versions that make them."""
        digest = hashlib.sha256(f"{self._profile.model_dump_json()} {sorted(find_versions().items())}\n".encode())
        for name in sorted(self._bundle.manifest.graphs):
            digest.update(f"{name} {self._bundle.manifest.files[self._bundle.graph(name).file].sha256}\n".encode())
        digest.update(identify_graphs(self._bundle, {}).encode())
        return digest.hexdigest()


class _FeatureCache:
    """What vision encoders said, picture by picture, up to a number of bytes; the oldest go first."""

    def __init__(self, limit: int) -> None:
        self._limit, self._held = limit, 0
        self._rows: OrderedDict[tuple[str, str], Mapping[str, Array]] = OrderedDict()

    def find(self, encoder: str, questions: Sequence[Question], batch: int) -> Features | None:
        """The features of a batch, its last row repeated up to ``batch`` as in a padded one; None where one picture is missing."""
        rows = [self._rows.get((encoder, question.asked.image)) for question in questions]
        known = [row for row in rows if row is not None]
        if len(known) < len(rows):
            return None
        known += [known[-1]] * (batch - len(known))
        return Features({name: np.stack([row[name] for row in known]) for name in known[0]})

    def add(self, encoder: str, questions: Sequence[Question], features: Features) -> Features:
        """Keep the rows of a batch, and give it back."""
        for place, question in enumerate(questions):
            key = encoder, question.asked.image
            if key not in self._rows:
                self._rows[key] = {name: value[place].copy() for name, value in features.values.items()}
                self._held += _bytes(self._rows[key])
        while self._held > self._limit:
            self._held -= _bytes(self._rows.popitem(last=False)[1])
        return features


def find_versions() -> dict[str, str]:
    """The packages that graphs and answers depend on."""
    found = {}
    for name in _PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def _count(content: bytes, sequence: int) -> int:
    return count_flops(ir.from_proto(onnx.load_from_string(content)), sequence)


def _bytes(row: Mapping[str, Array]) -> int:
    return sum(value.nbytes for value in row.values())
