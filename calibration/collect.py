"""Run samples through the real chain of a variant and keep what every graph was fed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Final

import numpy as np

from sievert.bundle.errors import CalibrationError, EngineError, EngineUnavailableError, ProfileError
from sievert.bundle.files import sha256_bytes, write_new
from sievert.bundle.manifest import FileEntry
from sievert.bundle.place import writing_beside
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.calibration.collection import Collection
from sievert.calibration.material import SEED, Material
from sievert.calibration.place import require_free
from sievert.calibration.record import (
    LEAST,
    NAME,
    CollectionInfo,
    DataInfo,
    Feed,
    GraphData,
    ModelInfo,
    SampleInfo,
    hash_model,
    hash_samples,
    render,
    seal,
)
from sievert.calibration.recorder import Recorder, RecordingSession
from sievert.calibration.tensors import nbytes, pack
from sievert.engines.run.dtypes import Array, is_float
from sievert.engines.run.generate import GREEDY
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.prompt import PromptBatch, Prompter
from sievert.engines.run.registry import find_runtime
from sievert.engines.run.slots import IDLE

OnCount = Callable[[int, int], None]
"""Called with how many samples are done and how many there are."""

DEFAULT_STEPS: Final = 3
_PACKAGES: Final = ("sievert", "numpy", "pillow", "tokenizers", "transformers")


def choose_steps(asked: int | Sequence[int], profile: Profile) -> tuple[int, ...]:
    """Which tokens of an answer decode's inputs are kept for, counted from 1. A number n means the first n of 1, 2, 4, 8 and so on.

    Raises:
        ProfileError: none, one below 1, or one that the variant has no room for.
    """
    room = profile.max_new_tokens
    if isinstance(asked, int):
        if asked < 1:
            raise ProfileError(f"decode_steps={asked}: at least one step is needed")
        return tuple(2**power for power in range(asked) if 2**power <= room)
    steps = tuple(sorted(set(asked)))
    if not steps or steps[0] < 1 or steps[-1] > room:
        raise ProfileError(f"decode_steps={','.join(map(str, asked)) or 'none'}, but this variant's caches have room for steps 1..{room}")
    return steps


@dataclass
class _Store:
    """Files as they are written. Equal inputs are one file: a picture that is asked about twice is stored once."""

    folder: Path
    files: dict[str, FileEntry] = field(default_factory=dict)
    feeds: dict[str, list[Feed]] = field(default_factory=dict)
    _names: dict[tuple[str, str], str] = field(default_factory=dict)

    def add(self, graph: str, arrays: Mapping[str, Array], samples: Sequence[int | None], step: int = 0) -> None:
        data = pack(arrays)
        digest = sha256_bytes(data)
        feeds = self.feeds.setdefault(graph, [])
        if (graph, digest) not in self._names:
            name = self._names[graph, digest] = f"{graph}-{len(feeds):05d}.safetensors"
            write_new(self.folder / name, data)
            self.files[name] = FileEntry(bytes=len(data), sha256=digest)
        feeds.append(Feed(file=self._names[graph, digest], samples=tuple(samples), step=step))


def collect(
    bundle: Bundle,
    variant: str,
    place: Path,
    material: Material,
    *,
    engine: str = "onnxruntime",
    steps: Sequence[int] = (1,),
    force: bool = False,
    finish: Callable[[], None] = lambda: None,
    on_count: OnCount = lambda _, __: None,
) -> Collection:
    """Write the inputs of every graph of ``variant``, for all samples of ``material``, to the folder ``place``.

    Everything is written beside ``place``, which it becomes in one rename at the end: an interrupted call leaves nothing. ``finish`` is
    called right before that, ``force`` replaces a collection that stands there. ``steps`` are tokens of the greedy answer; an answer that
    ends earlier has fewer.

    Raises:
        CalibrationError: too few samples, one that leads to NaN or infinity (named), no answer that reaches a step, too little disk, a
            ``place`` that is taken, or a variant of dynamic text.
        EngineUnavailableError: the engine cannot run on this machine.
        BundleError: the bundle is not what its manifest says, or the folder cannot be written.
    """
    if len(material.samples) < LEAST:
        raise CalibrationError(f"{len(material.samples)} sample calibrates nothing: give at least {LEAST}, better many")
    runtime = find_runtime(engine)
    if reason := runtime.unavailable():
        raise EngineUnavailableError(reason)
    profile = bundle.variant(variant).profile
    if profile.dynamic_text:  # what is recorded inside a graph is as long as it was made for
        raise CalibrationError(
            f"variant {variant!r} takes prompts of any length, and calibration data is collected at one: make a variant with --static-text"
        )
    prompter = Prompter(bundle.path, bundle.manifest.geometry, profile)
    recorder = Recorder(runtime)
    tokens: list[list[int]] = [[] for _ in material.samples]
    free = partial(require_free, place, force=force)
    with Pipeline(bundle, variant, recorder) as pipeline, writing_beside(place, "collect", check=free) as folder:
        chain = _Chain(pipeline, recorder.sessions, material, _Store(folder), tuple(steps), tokens)
        chain.require_room(place)
        for start in range(0, len(material.samples), profile.batch):
            on_count(start, len(material.samples))
            numbers = range(start, min(start + profile.batch, len(material.samples)))
            images, prompts = [material.images[n] for n in numbers], [material.samples[n].prompt for n in numbers]
            chain.follow(prompter.prepare(images, prompts, template=material.template), numbers)
        on_count(len(material.samples), len(material.samples))
        if "decode" not in chain.store.feeds:
            longest = max(len(each) for each in tokens)
            raise CalibrationError(
                f"no answer reaches decode step {min(steps)}: the longest has {longest} tokens, of which the last one ends it; "
                "choose earlier steps with --decode-steps"
            )
        info = _describe(bundle, variant, engine, chain, runtime.version() or "")
        finish()
        write_new(folder / NAME, render(info))
    return Collection(place, info, bundle)


@dataclass
class _Chain:
    """One variant's graphs, followed from the pixels to the last step. ``tokens`` are the greedy answers, by sample."""

    pipeline: Pipeline
    sessions: Mapping[str, RecordingSession]
    material: Material
    store: _Store
    steps: tuple[int, ...]
    tokens: list[list[int]]

    def follow(self, batch: PromptBatch, numbers: Sequence[int]) -> None:
        """Read a batch and answer it; ``numbers`` are the samples of its real rows."""
        for session in self.sessions.values():
            session.clear_caches()
        rows = [*numbers, *[None] * (len(batch.lengths) - batch.rows)]
        vision = self.sessions["vision_encoder"]
        # Not what the session was fed last: pictures that were seen before do not reach it again.
        self._keep("vision_encoder", vision.exact({vision.inputs[0].name: batch.pixel_values}), rows)
        try:
            features = self.pipeline.encode(batch.pixel_values)
            first = self.pipeline.prefill(batch, features)
        except EngineError:
            self._blame(rows)
            raise
        self._keep("embed_tokens", self.sessions["embed_tokens"].fed, rows)
        self._keep("prefill", self.sessions["prefill"].fed, rows)
        self._check("prefill", {"logits": first.logits}, rows, "gave")
        for row, number in enumerate(numbers):
            self.tokens[number].append(GREEDY.choose(first.logits[row], GREEDY.generator(row)))
        slots = self.pipeline.profile.decode_batch
        for start in range(0, batch.rows, slots):
            rows_now = range(start, min(start + slots, batch.rows))
            self._answer({slot: (row, numbers[row]) for slot, row in enumerate(rows_now)})

    def _answer(self, placed: Mapping[int, tuple[int, int]]) -> None:
        """Decode greedily up to the last step that is kept; ``placed`` gives the row and the sample of each slot."""
        stops, session = self.pipeline.geometry.eos_token_ids, self.sessions["decode"]
        for slot, (row, _) in placed.items():
            self.pipeline.fill(slot, row)
        for step in range(1, max(self.steps) + 1):
            active = {slot: number for slot, (_, number) in placed.items() if self.tokens[number][-1] not in stops}
            if not active:
                return
            fed = np.full(self.pipeline.profile.decode_batch, IDLE, np.int64)
            for slot, number in active.items():
                fed[slot] = self.tokens[number][-1]
            session.with_caches = step in self.steps
            logits = self.pipeline.decode(fed)
            samples = [active.get(slot) for slot in range(len(fed))]
            if session.with_caches:
                self._keep("decode", session.fed, samples, step)
            self._check("decode", {"logits": logits}, samples, "gave")
            for slot, number in active.items():
                self.tokens[number].append(GREEDY.choose(logits[slot], GREEDY.generator(slot)))

    def _keep(self, graph: str, fed: Mapping[str, Array], samples: Sequence[int | None], step: int = 0) -> None:
        self._check(graph, fed, samples, "was fed")
        self.store.add(graph, fed, samples, step)

    def _blame(self, rows: Sequence[int | None]) -> None:
        """Name the sample whose numbers stopped the pipeline. What a graph holds of an earlier batch was found to be finite.

        Raises:
            CalibrationError: there is one.
        """
        for graph in ("vision_encoder", "embed_tokens", "prefill"):
            self._check(graph, self.sessions[graph].fed, rows, "was fed")
            self._check(graph, self.sessions[graph].gave, rows, "gave")

    def _check(self, graph: str, arrays: Mapping[str, Array], samples: Sequence[int | None], how: str) -> None:
        """Every real row is finite.

        Raises:
            CalibrationError: one is not; the message names the sample.
        """
        for name, array in arrays.items():
            if not is_float(array.dtype) or np.isfinite(array).all():
                continue
            for row, number in enumerate(samples):
                if number is not None and not np.isfinite(array[row]).all():
                    raise CalibrationError(
                        f"{self.material.name(number)}: {graph} {how} NaN or infinity in {name!r}: leave that sample out; if others say "
                        "the same, the model overflows in its own type, run `sievert check`"
                    )

    def require_room(self, place: Path) -> None:
        """Refuse before the work what would fill the disk.

        Raises:
            CalibrationError: it would.
        """
        profile, count = self.pipeline.profile, len(self.material.samples)
        needed = 0
        for graph, session in self.sessions.items():
            decode = graph == "decode"
            runs = -(-count // (profile.decode_batch if decode else profile.batch)) * (len(self.steps) if decode else 1)
            needed += runs * sum(nbytes(spec) for spec in session.inputs if decode or spec.name not in session.past)
        free = shutil.disk_usage(self.store.folder).free
        if needed > free:
            raise CalibrationError(
                f"{count} samples need up to {needed / 2**20:.0f} MiB in {place.parent}, which has {free / 2**20:.0f} MiB free: take fewer "
                "with --samples or --decode-steps, or another place with --out"
            )


def _describe(bundle: Bundle, variant: str, engine: str, chain: _Chain, runtime: str) -> CollectionInfo:
    manifest, made = bundle.manifest, bundle.variant(variant)
    source, material = manifest.source, chain.material
    used: tuple[SampleInfo, ...] = tuple(
        sample.model_copy(update={"tokens": tuple(said)}) for sample, said in zip(material.samples, chain.tokens, strict=True)
    )
    graphs = {
        graph: GraphData(
            sha256=session.sha256,
            inputs=session.inputs,
            zeros=tuple(spec.name for spec in session.inputs if graph == "prefill" and spec.name in session.past),
            feeds=tuple(chain.store.feeds[graph]),
        )
        for graph, session in chain.sessions.items()
    }
    return seal(
        CollectionInfo(
            random=material.random,
            seed=SEED,
            model=ModelInfo(sha256=hash_model(manifest), source=source.model, architecture=source.architecture, dtype=source.dtype),
            variant=variant,
            plan=made.plan,
            profile=made.profile,
            engine=engine,
            template=material.template,
            decode_steps=chain.steps,
            data=DataInfo(file="" if material.source is None else material.source.name, sha256=hash_samples(material.samples)),
            samples=used,
            graphs=graphs,
            files=chain.store.files,
            versions={**{name: version(name) for name in _PACKAGES}, engine: runtime},
        )
    )


def count_steps(info: CollectionInfo) -> dict[int, int]:
    """How many answers reach each of the steps that were asked for."""
    feeds: Iterable[Feed] = info.graphs["decode"].feeds
    return {step: sum(_real(feed) for feed in feeds if feed.step == step) for step in info.decode_steps}


def _real(feed: Feed) -> int:
    return sum(number is not None for number in feed.samples)
