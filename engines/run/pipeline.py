"""A variant's four graphs on one runtime: look at a picture, read prompts, write token by token."""

from __future__ import annotations

import hashlib
import logging
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType, TracebackType
from typing import Final, Literal, Self

import numpy as np

from sievert.bundle.errors import EngineError, IntegrityError, ProfileError, PromptError
from sievert.bundle.files import sha256_bytes
from sievert.bundle.manifest import GraphEntry
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.base import Cache, ModelFile, Runtime, Session
from sievert.engines.run.dtypes import Array
from sievert.engines.run.files import find_model, has_float8
from sievert.engines.run.memory import Buffer, fixed_shape
from sievert.engines.run.prompt import PromptBatch
from sievert.engines.run.registry import find_runtime
from sievert.engines.run.slots import Slots

logger = logging.getLogger(__name__)

GRAPHS: Final = ("vision_encoder", "embed_tokens", "prefill", "decode")
_ORIGIN: Final = "original_row."
_REMEMBERED = 16  # pictures whose features are kept; a few MB each at most


@dataclass(frozen=True)
class Features:
    """What the vision encoder says about the pictures of B prompts: its outputs by name, each ``[B, ...]``."""

    values: Mapping[str, Array]

    @property
    def image_features(self) -> Array:
        """``[B, Nv, D]`` in the model's dtype."""
        return self.values["image_features"]


@dataclass(frozen=True)
class PrefillResult:
    """``logits[B, V]`` float32 of the last real row, ``kept_index[s][B, K_s]`` int64 (rows of the original sequence, ascending),
    ``inputs_embeds[B, S, D]``, and ``extra``: the outputs that were exposed, by name.
    """

    logits: Array
    kept_index: tuple[Array, ...]
    inputs_embeds: Array
    extra: Mapping[str, Array]


class Pipeline:
    """The graphs of one variant, loaded once.

    Caches stay where the runtime computes. Where prefill and decode have the same batch they share them, and row i of a prefill
    is slot i of decode. Otherwise a prefilled row gets a slot by :meth:`fill`, while other slots go on.

    ``engine`` is a name or a configured :class:`Runtime`. ``lowered_for`` runs the ONNX files that were lowered for that engine.
    ``graphs`` are ONNX models to run instead of the files of these names, which need not exist; they may give more outputs, and their
    weights are looked for in the bundle's folder.

    Raises:
        VariantError: no such variant, or it has no engines of that name.
        EngineUnavailableError: the runtime cannot run here.
        IntegrityError: a graph that is not what the manifest says.
        EngineError: the runtime refused a graph, or reads no ONNX where that is given.
    """

    def __init__(
        self,
        bundle: Bundle,
        variant_name: str,
        engine: str | Runtime = "onnxruntime",
        *,
        lowered_for: str = "",
        graphs: Mapping[str, bytes] = MappingProxyType({}),
    ) -> None:
        self.variant = bundle.variant(variant_name)
        self.geometry = bundle.manifest.geometry
        self.profile = self.variant.profile
        if self.variant.precision is not None and self.variant.precision.random:
            logger.warning("%s: its scales come from random data, and say nothing about the model in use", variant_name)
        self.runtime = find_runtime(engine) if isinstance(engine, str) else engine
        if graphs and not self.runtime.reads_onnx:
            raise EngineError(f"{self.runtime.name} runs engine files: graphs in memory run with the engine onnxruntime")
        self._sessions: dict[str, Session] = {}
        for graph in GRAPHS:
            if graph in graphs:
                path, content = bundle.path / self.variant.graphs[graph].file, graphs[graph]
                model = ModelFile(path, sha256_bytes(content), content, float8=has_float8(self.variant))
            else:
                model = find_model(bundle, variant_name, graph, self.runtime, lowered_for)
            self._sessions[graph] = session = self.runtime.load(model)
            _check_interface(graph, self.variant.graphs[graph], session, strict=self.runtime.reads_onnx)
        self._prefill_caches = self._bind("prefill", None)
        self._shared = self.profile.batch == self.profile.decode_batch
        self._decode_caches = self._bind("decode", self._prefill_caches if self._shared else None)
        self._slots = Slots(self.profile, self.geometry.pad_token_id)
        # Which row of the unpruned prompt each cache row is, for layers with a window: never changed by decode, so kept on the host.
        self._origins_read: dict[str, Array] = {}
        self._origins = _first_origins(self.variant.graphs["decode"], self.profile)
        self._prefilled: tuple[tuple[int, int], ...] = ()  # of each row the real tokens, and by how much the next position differs
        self._poisoned = False  # decode may have left a NaN in shared caches; a filled slot is copied whole
        self.prefills = 0  # how many there were: a stream sees by it that its prompts are gone
        self._seen: OrderedDict[bytes, dict[str, Array]] = OrderedDict()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Give back the graphs and the caches; nothing else works afterwards."""
        self._sessions.clear()
        for caches in (self._prefill_caches, self._decode_caches):
            for cache in caches:
                cache.buffer.free()
        self._prefill_caches = self._decode_caches = []

    def encode(self, pixel_values: Array) -> Features:
        """Features of ``pixel_values[B, *picture]``, or ``[B, M, *picture]``. Pictures seen before, in any row, are remembered by their
        content. A graph that takes one picture runs once for each.

        Raises:
            ProfileError: another shape than the profile's.
            EngineError: the runtime failed, or gave numbers that are not finite.
        """
        shape = fixed_shape(self._session("vision_encoder").inputs[0])
        rows, images, picture = self.profile.batch, self.profile.images, self.geometry.picture_shape
        expected = (rows, *((images,) if images > 1 else ()), *picture)
        if pixel_values.shape != expected:
            raise ProfileError(f"pixel_values has shape {pixel_values.shape}, expected {expected} as the variant's profile declares")
        alone = shape == (1, *picture)
        units = pixel_values.reshape(-1, *picture) if alone else pixel_values
        keys = [hashlib.sha256(np.ascontiguousarray(unit).tobytes()).digest() for unit in units]
        if alone:
            for unit, key in zip(units, keys, strict=True):
                self._look(unit[None], [key])
        else:
            self._look(units, keys)
        seen = [self._seen[key] for key in keys]
        for key in keys:
            self._seen.move_to_end(key)
        while len(self._seen) > max(_REMEMBERED, len(keys)):
            self._seen.popitem(last=False)
        values = {name: np.stack([one[name] for one in seen]) for name in seen[0]}
        return Features({name: value.reshape(rows, -1, *value.shape[2:]) for name, value in values.items()})

    def _look(self, pictures: Array, keys: Sequence[bytes]) -> None:
        """Run the vision encoder on pictures of which one or more were not seen yet, and remember what it says of each."""
        if all(key in self._seen for key in keys):
            return
        for name, value in self._run("vision_encoder", {"pixel_values": pictures}).items():
            if not np.isfinite(value).all():
                raise EngineError(
                    f"vision_encoder gave NaN or infinity in {name}: a 16-bit graph overflowed or an engine is wrong, run `sievert "
                    "check` on this variant"
                )
            for row, key in enumerate(keys):
                self._seen.setdefault(key, {})[name] = value[row].copy()

    def prefill(self, batch: PromptBatch, features: Features) -> PrefillResult:
        """Read prompts: afterwards the caches hold them, and :meth:`decode` goes on from there.

        With separate caches (another decode batch) nothing that is being decoded is touched; see :meth:`fill`.

        Raises:
            PromptError: no text after the image, and a selector that is guided by it.
            ProfileError: shapes that are not the profile's.
            EngineError: the runtime failed.
        """
        if self.variant.reads_question and (row := batch.without_question()) is not None:
            raise PromptError(
                f"prompt {row + 1} of {batch.rows} has no text after the image, but this variant keeps the tokens that such text asks for: "
                "write the question after the image, or use the variant full"
            )
        (shortest, longest), length = self.profile.lengths, batch.input_ids.shape[-1]
        if self.profile.dynamic_text and not shortest <= length <= longest:
            raise ProfileError(f"prompts of {length} tokens, padding included, but this variant takes {shortest}..{longest}")
        if self._poisoned:
            # Prefill writes rows 0..S-1; the rest is masked until decode writes it, but a masked NaN is still NaN times zero.
            for cache in self._prefill_caches:
                cache.buffer.clear()
            self._poisoned = False
        self.prefills += 1
        values: dict[str, Array] = {**features.values, "input_ids": batch.input_ids, "visual_index": batch.visual_index}
        embeds = self._run("embed_tokens", values)["inputs_embeds"]
        values |= {"inputs_embeds": embeds, "attention_mask": batch.attention_mask, "position_ids": batch.position_ids}
        outputs = self._run("prefill", values)
        logits = outputs.pop("logits")
        kept = tuple(outputs.pop(f"kept_index.{stage}") for stage in range(len(self.variant.plan.stages)))
        self._origins_read = {name: outputs.pop(name) for name in self._origins}
        for stage, rows in enumerate(kept):
            if (np.diff(rows, axis=1) < 1).any():  # a NaN among the scores takes tokens twice
                raise EngineError(f"stage {stage} kept a token twice: its scores are no numbers, run `sievert check` on this variant")
        self._prefilled = tuple(zip(batch.lengths, batch.shifts or (0,) * len(batch.lengths), strict=True))
        if self._shared:
            for row, (length, shift) in enumerate(self._prefilled):
                self._place(row, row)
                self._slots.start(row, length, shift)
        return PrefillResult(logits, kept, embeds, outputs)

    def fill(self, slot: int, row: int) -> None:
        """Let decode slot ``slot`` go on from row ``row`` of the last prefill.

        Raises:
            EngineError: no such slot or row, or the caches are shared and ``slot`` is not ``row``.
        """
        if not 0 <= row < len(self._prefilled):
            raise EngineError(f"row {row} was not prefilled: the last prefill had {len(self._prefilled)} rows")
        if self._shared:
            if slot != row:
                raise EngineError(f"row {row} cannot move to slot {slot}: prefill and decode have the same batch and share their caches")
        else:
            for target, source in zip(self._decode_caches, self._prefill_caches, strict=True):
                target.buffer.copy_row(slot, source.buffer, row)
            self._place(slot, row)
        self._slots.start(slot, *self._prefilled[row])

    def decode(self, tokens: Array) -> Array:
        """Feed one token per slot, ``tokens[Bd]`` integers, and get ``logits[Bd, V]`` float32 for the next ones.

        A slot whose token is :data:`~sievert.engines.run.slots.IDLE` rests: it does not move on, and its logits mean nothing.

        Raises:
            ProfileError: another number of tokens, one outside the vocabulary, or a slot whose cache is full.
            EngineError: a slot that nothing was prefilled for, or the runtime failed.
        """
        fed, rows, positions = self._slots.step(np.asarray(tokens), self.geometry.vocabulary)
        # Both as without pruning: the graph subtracts what each stage dropped.
        axes = (self.geometry.position_axes,) if self.geometry.position_axes > 1 else ()
        position_ids = np.broadcast_to(positions[:, None], (*axes, len(positions), 1))
        values = {"input_ids": fed[:, None], "position_ids": np.ascontiguousarray(position_ids), "cache_row": rows}
        values |= self._origins
        logits = self._run("decode", values)["logits"]
        self._slots.advance(np.asarray(tokens))
        if self._shared and not np.isfinite(logits).all():
            self._poisoned = True
        return logits

    def caches(self, of: Literal["prefill", "decode"] = "decode") -> list[tuple[Array, Array]]:
        """Host copies of every layer's ``(key, value)``, each ``[B, G, C_i, d]``."""
        caches = self._decode_caches if of == "decode" else self._prefill_caches
        arrays = [cache.buffer.numpy() for cache in caches]
        return list(zip(arrays[0::2], arrays[1::2], strict=True))

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens each decode slot holds, counted without pruning; 0 where nothing was prefilled."""
        return self._slots.lengths

    def _place(self, slot: int, row: int) -> None:
        """Remember for a slot which rows of its prompt are left."""
        for name, origins in self._origins.items():
            origins[slot] = self._origins_read[name][row]

    def _session(self, graph: str) -> Session:
        if graph not in self._sessions:
            raise EngineError("this pipeline was closed")
        return self._sessions[graph]

    def _run(self, graph: str, values: Mapping[str, Array]) -> dict[str, Array]:
        """Run a graph on those of the values it takes; what is missing is the session's to name."""
        session = self._session(graph)
        return session.run({spec.name: values[spec.name] for spec in session.inputs if spec.name in values})

    def _bind(self, graph: str, shared: list[Cache] | None) -> list[Cache]:
        """The caches of a graph, in new buffers or in those of ``shared``: keys and values of layer 0, 1, ..."""
        session = self._session(graph)
        inputs = {spec.name: spec for spec in session.inputs}
        caches: list[Cache] = []
        for layer in range(self.geometry.depth):
            for part in ("key", "value"):
                past, present = f"past_key_values.{layer}.{part}", f"present.{layer}.{part}"
                if past not in inputs:
                    raise IntegrityError(f"{graph} has no input {past}: it was not made for this model's {self.geometry.depth} layers")
                buffer = shared[len(caches)].buffer if shared else Buffer(session.memory, inputs[past])
                caches.append(Cache(past, present, buffer))
        session.bind(caches)
        return caches


def _first_origins(decode: GraphEntry, profile: Profile) -> dict[str, Array]:
    """``original_row.{s}[Bd, C_s]`` of slots that nothing was prefilled for: as if the first rows had been cut."""
    origins = {}
    for spec in decode.inputs:
        if spec.name.startswith(_ORIGIN):
            rows, capacity = (int(size) for size in spec.shape)
            origins[spec.name] = np.tile(np.arange(profile.capacity() - capacity, profile.capacity()), (rows, 1))
    return origins


def _check_interface(graph: str, entry: GraphEntry, session: Session, *, strict: bool) -> None:
    """The loaded file takes and gives what the manifest says; it may give more (exposed values).

    Without ``strict`` an input may be missing: a builder may drop one that the graph does not use.

    Raises:
        IntegrityError: it does not.
    """
    inputs, outputs = ({spec.name: spec for spec in specs} for specs in (session.inputs, session.outputs))
    wrong = [spec for spec in entry.inputs if inputs.get(spec.name, None if strict else spec) != spec]
    wrong += [spec for spec in entry.outputs if outputs.get(spec.name) != spec]
    unknown = inputs.keys() - {spec.name for spec in entry.inputs}
    if wrong or unknown:
        expected = ", ".join(f"{spec.name} {spec.dtype}{spec.shape}" for spec in wrong)
        raise IntegrityError(
            f"{graph}: the loaded file lacks {expected or 'nothing'} and takes {sorted(unknown) or 'nothing'} that the manifest "
            "does not list: make it again"
        )
