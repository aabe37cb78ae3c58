"""What a runtime is to the pipeline: it loads one graph, keeps caches where it computes, and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from sievert.bundle.errors import EngineError, ProfileError
from sievert.bundle.specs import TensorSpec
from sievert.engines.run.dtypes import Array, is_float, numpy_dtype
from sievert.engines.run.memory import Buffer, Memory, find_sequence, fixed_shape, shape_at


@dataclass(frozen=True)
class ModelFile:
    """A graph to load: a checked file of a bundle and its SHA-256.

    ``content`` is an ONNX model to run in place of the file, which need not exist then; its weights are looked for beside ``path``. Only
    runtimes that read ONNX take it. ``float8``: it computes with 8-bit floats.
    """

    path: Path
    sha256: str
    content: bytes | None = None
    float8: bool = False


@dataclass(frozen=True)
class Cache:
    """A buffer that a graph reads as ``past`` and leaves updated as ``present``."""

    past: str
    present: str
    buffer: Buffer


class Session(Protocol):
    """One loaded graph."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the graph takes, caches included."""

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        """What the graph gives, caches included."""

    @property
    def memory(self) -> Memory:
        """Where its caches have to live."""

    def bind(self, caches: Sequence[Cache]) -> None:
        """Read and write these buffers in every later run; they leave the feeds and the outputs."""

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Compute ``outputs`` (all that are not bound, if None) from host arrays, as host arrays the caller owns.

        Raises:
            ProfileError: a feed of another shape or type than the graph takes.
            EngineError: a feed missing or unknown, an output unknown, or the runtime failed.
        """


class Runtime(Protocol):
    """A way to execute graphs. ``reads_onnx``: it loads ONNX files; else engine files made for ``name`` beforehand.

    ``tested`` says whether this code has ever been executed on the hardware it is for.
    """

    @property
    def name(self) -> str:
        """What users call it, and the key of its engines in the manifest."""

    @property
    def reads_onnx(self) -> bool:
        """Whether it loads ONNX files."""

    @property
    def tested(self) -> bool:
        """Whether this code has run on the hardware it is for."""

    def version(self) -> str | None:
        """The version of its library; None where that is not installed."""

    def unavailable(self) -> str | None:
        """Why this machine cannot run it and what to do, in one sentence; None where it can."""

    def load(self, model: ModelFile) -> Session:
        """Load a graph.

        Raises:
            EngineUnavailableError: :meth:`unavailable` has something to say.
            IntegrityError: an engine file is not the one the manifest lists.
            EngineError: the library refused the graph.
        """


def check_feeds(graph: str, inputs: Sequence[TensorSpec], bound: frozenset[str] | set[str], feeds: Mapping[str, Array]) -> dict[str, Array]:
    """Contiguous arrays of exactly the types the graph takes.

    A float is cast to the graph's float type, an integer to a wider one; nothing else is.

    Raises:
        ProfileError: a feed of another shape or kind.
        EngineError: a feed missing, unknown or bound.
    """
    wanted = {spec.name: spec for spec in inputs if spec.name not in bound}
    if wanted.keys() != feeds.keys():
        missing, unknown = sorted(wanted.keys() - feeds.keys()), sorted(feeds.keys() - wanted.keys())
        raise EngineError(f"{graph}: inputs missing: {missing or 'none'}, not taken: {unknown or 'none'}; it takes {sorted(wanted)}")
    sequence = find_sequence(wanted.values(), {name: np.asarray(feed) for name, feed in feeds.items()})
    return {name: _fit(graph, wanted[name], feed, sequence) for name, feed in feeds.items()}


def check_outputs(graph: str, specs: Sequence[TensorSpec], bound: set[str], asked: Sequence[str] | None) -> list[TensorSpec]:
    """The specs of the outputs asked for, in that order.

    Raises:
        EngineError: an output the graph does not give, or one that stays in a bound cache.
    """
    free = {spec.name: spec for spec in specs if spec.name not in bound}
    if unknown := [name for name in asked or () if name not in free]:
        raise EngineError(f"{graph} has no output {', '.join(unknown)}; it gives {sorted(free)}")
    return list(free.values()) if asked is None else [free[name] for name in asked]


def check_caches(graph: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], caches: Sequence[Cache]) -> None:
    """Refuse buffers that are not what the graph reads and writes.

    Raises:
        EngineError: an input or output the graph does not have, or another shape or type.
    """
    for cache in caches:
        for name, specs in ((cache.past, inputs), (cache.present, outputs)):
            spec = next((spec for spec in specs if spec.name == name), None)
            if spec is None:
                raise EngineError(f"{graph} has no cache {name}; it has {[spec.name for spec in specs]}")
            if (fixed_shape(spec), numpy_dtype(spec.dtype)) != (cache.buffer.shape, cache.buffer.dtype):
                raise EngineError(f"{graph}: cache {name} is {spec.dtype}{spec.shape}, got {cache.buffer.dtype}{cache.buffer.shape}")


def _fit(graph: str, spec: TensorSpec, feed: Array, sequence: int) -> Array:
    array = np.asarray(feed)
    if array.shape != shape_at(spec, sequence):
        raise ProfileError(f"{graph}: {spec.name} has shape {array.shape}, expected {spec.shape} as the variant's profile declares")
    dtype = numpy_dtype(spec.dtype)
    if is_float(array.dtype) != is_float(dtype) or not (is_float(dtype) or np.can_cast(array.dtype, dtype, "safe")):
        raise ProfileError(f"{graph}: {spec.name} has type {array.dtype}, expected {spec.dtype}")
    return np.asarray(array, dtype, order="C")
