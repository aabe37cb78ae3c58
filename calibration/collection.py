"""Calibration data on disk: found to belong to the bundle, and unchanged, before any of it is used."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from sievert.bundle.errors import CalibrationError, IntegrityError, VariantError
from sievert.bundle.files import plain_status, sha256_file
from sievert.bundle.manifest import Manifest
from sievert.bundle.names import check_name
from sievert.bundle.store import Bundle
from sievert.calibration.record import COLLECT_AGAIN, LEAST, CollectionInfo, GraphData, hash_model, read_info
from sievert.calibration.tensors import unpack
from sievert.engines.run.dtypes import Array, numpy_dtype
from sievert.engines.run.memory import fixed_shape
from sievert.engines.run.pipeline import GRAPHS

logger = logging.getLogger(__name__)

RANDOM = "this calibration data is random: what is found with it proves that the tools work, and says nothing about the model in use"


class Collection:
    """What every graph of one variant was fed. Make one with :func:`load_collection`, or by collecting."""

    def __init__(self, path: Path, info: CollectionInfo, bundle: Bundle) -> None:
        self.path = path
        self.info = info
        self.bundle = bundle

    def __repr__(self) -> str:
        kind = "random samples" if self.random else "samples"
        return f"Collection({str(self.path)!r}, {len(self.info.samples)} {kind} through {self.info.variant!r})"

    @property
    def random(self) -> bool:
        """Whether nobody ever asked these questions. Every command that uses the data says so."""
        return self.info.random

    @property
    def graphs(self) -> tuple[str, ...]:
        """The graphs there are inputs of, in the order they run."""
        return tuple(sorted(self.info.graphs, key=[*GRAPHS, *sorted(self.info.graphs)].index))

    def count(self, graph: str) -> int:
        """How many runs of a graph there are. Raises as :meth:`feeds`."""
        return len(self._graph(graph).feeds)

    def feeds(self, graph: str) -> Iterator[dict[str, Array]]:
        """All inputs of each run of a graph, in the graph's own types, zero caches included; one run at a time is in memory.

        Raises:
            CalibrationError: no such graph, or a file that cannot be read.
        """
        return (self.feed(graph, number) for number in range(self.count(graph)))

    def feed(self, graph: str, number: int) -> dict[str, Array]:
        """The inputs of one run. Raises as :meth:`feeds`."""
        data = self._graph(graph)
        arrays = unpack(self.path / data.feeds[number].file, [spec for spec in data.inputs if spec.name not in data.zeros])
        for spec in data.inputs:
            if spec.name in data.zeros:
                arrays[spec.name] = np.zeros(fixed_shape(spec), numpy_dtype(spec.dtype))
        return arrays

    def name_samples(self, graph: str, number: int) -> str:
        """The samples of one run in words: ``line 3`` or ``random sample 2``, several with commas."""
        found = [sample for sample in self._graph(graph).feeds[number].samples if sample is not None]
        if self.random:
            return ", ".join(f"random sample {sample + 1}" for sample in found)
        return ", ".join(f"line {self.info.samples[sample].line}" for sample in found)

    def require_variant(self, name: str) -> None:
        """Refuse to use the data for a variant whose graphs take something else.

        Raises:
            VariantError: there is none of that name.
            CalibrationError: it drops other tokens, or its lengths, batches or inputs are others.
        """
        variant = self.bundle.variant(name)
        where = f"{self.path} was collected from the variant {self.info.variant!r}"
        if variant.profile != self.info.profile:
            then, now = self.info.profile.model_dump(), variant.profile.model_dump()
            sizes = ", ".join(f"{key} {then[key]}, now {now[key]}" for key in then if then[key] != now[key])
            raise CalibrationError(f"{where} of other sizes than {name!r} has ({sizes}): {COLLECT_AGAIN} --variant {name}")
        if variant.plan != self.info.plan:
            raise CalibrationError(f"{where}, which keeps other tokens than {name!r}: {COLLECT_AGAIN} --variant {name}")
        for graph, data in self.info.graphs.items():
            taken = variant.graphs[graph].inputs if graph in variant.graphs else ()
            if other := sorted(spec.name for spec in data.inputs if spec not in taken):
                raise CalibrationError(f"{where}, whose {graph} took other inputs than it takes now ({other[0]}): {COLLECT_AGAIN}")

    def require_use(self, variant: str, *, random: bool) -> None:
        """Refuse data that is not of ``variant``, and data that is random unless ``random``.

        Raises:
            VariantError: there is no such variant.
            CalibrationError: it is not of that variant, or random.
        """
        self.require_variant(variant)
        if self.random and not random:
            raise CalibrationError(f"{self.path}: {RANDOM}. To quantise with it all the same, say --random")

    def _graph(self, graph: str) -> GraphData:
        if graph not in self.info.graphs:
            raise CalibrationError(f"{self.path} has no inputs of {graph!r}; it has those of {', '.join(self.graphs)}")
        return self.info.graphs[graph]


def load_collection(folder: str | Path, bundle: Bundle, *, progress: Callable[[str], None] = lambda _: None) -> Collection:
    """Open calibration data for a bundle, every file hashed. Random data is warned about on each call.

    Raises:
        CalibrationError: no collection there, one of another model or number of tokens, of a single sample, or changed since.
    """
    path = Path(folder).expanduser().resolve()
    info = read_info(path)
    _check_model(path, info, bundle.manifest)
    collection = Collection(path, info, bundle)
    try:
        collection.require_variant(info.variant)
    except VariantError as error:
        raise CalibrationError(f"{path} was collected from a variant that is gone ({error}): {COLLECT_AGAIN}") from error
    if len(info.samples) < LEAST:
        raise CalibrationError(f"{path} holds {len(info.samples)} sample, which calibrates nothing: collect at least {LEAST}")
    progress("hashing the calibration data")
    _check_files(path, info)
    if info.random:
        logger.warning(RANDOM)
    return collection


def _check_model(path: Path, info: CollectionInfo, manifest: Manifest) -> None:
    images, expected = info.profile.images, info.profile.images * manifest.geometry.visual_tokens
    if info.profile.visual_tokens != expected:
        raise CalibrationError(
            f"{path} was collected with {info.profile.visual_tokens} visual tokens, this model has {expected}"
            f"{f' for {images} images' if images > 1 else ''}: {COLLECT_AGAIN}"
        )
    if info.model.sha256 != hash_model(manifest):
        then, now = info.model, manifest.source
        raise CalibrationError(
            f"{path} was collected from another model ({then.architecture} {then.source}, {then.dtype}) than this bundle holds "
            f"({now.architecture} {now.model}, {now.dtype}): their weights differ; {COLLECT_AGAIN}"
        )


def _check_files(path: Path, info: CollectionInfo) -> None:
    for data in info.graphs.values():
        for feed in data.feeds:
            if feed.file not in info.files or any(number is not None and not 0 <= number < len(info.samples) for number in feed.samples):
                raise CalibrationError(f"{path} names {feed.file} without its hash or samples: {COLLECT_AGAIN}")
    for name, entry in info.files.items():
        try:
            check_name(name, where=str(path))
            same = plain_status(path / name).st_size == entry.bytes and sha256_file(path / name) == entry.sha256
        except (IntegrityError, OSError) as error:
            raise CalibrationError(f"{path} was changed since it was collected ({error}): {COLLECT_AGAIN}") from error
        if not same:
            raise CalibrationError(f"{path} was changed since it was collected: {name} is another file now; {COLLECT_AGAIN}")
