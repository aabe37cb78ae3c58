"""The range of every float tensor of a variant on calibration data, against what a narrower format can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, Literal

import onnx_ir as ir

from sievert.bundle.errors import CalibrationError, EngineUnavailableError
from sievert.bundle.files import sha256_bytes
from sievert.calibration.collection import Collection
from sievert.calibration.exposing import chunk_values, cut_graph
from sievert.calibration.formats import Format, find_format
from sievert.calibration.judging import Seen, TensorRange, judge
from sievert.calibration.tensors import read_values
from sievert.engines.run.base import ModelFile
from sievert.engines.run.registry import find_runtime
from sievert.graph_passes.lower import Target, lower

ENGINE: Final = "onnxruntime"
CHUNK_BYTES: Final = 256 << 20


@dataclass(frozen=True)
class Ranges:
    """Every float tensor of a variant's graphs, in the order of the computation. ``emulated``: the graphs are 16-bit ones, and the CPU
    computes what it has no kernels for in float32.
    """

    variant: str
    dtype: str
    limit: float
    lowered_for: str
    random: bool
    emulated: bool
    samples: int
    runs: dict[str, int]
    tensors: tuple[TensorRange, ...]

    def worst(self, count: int) -> tuple[TensorRange, ...]:
        """Those with the least headroom, without what stays float32 anyway."""
        judged = [each for each in self.tensors if each.verdict != "float32" and (each.headroom is not None or each.verdict != "fits")]
        broken = ("nan", "overflow")
        return tuple(sorted(judged, key=lambda each: (each.verdict not in broken, each.headroom or 0.0))[:count])

    @property
    def keep_float32(self) -> tuple[TensorRange, ...]:
        """What would overflow, in the order of the computation."""
        return tuple(each for each in self.tensors if each.verdict == "overflow")

    def to_json(self) -> dict[str, Any]:
        """Plain values only."""
        keep = [{"graph": each.graph, "name": each.name, "reason": each.reason} for each in self.keep_float32]
        return {"sievert_ranges": 1, **asdict(self), "keep_float32": keep}


def measure_ranges(
    collection: Collection,
    variant: str,
    *,
    dtype: str = "float16",
    lowered_for: Target | Literal[""] = "",
    chunk_bytes: int = CHUNK_BYTES,
    wanted: Callable[[str], bool] = lambda _: True,
    progress: Callable[[str], None] = lambda _: None,
) -> Ranges:
    """Run a variant's graphs in ONNX Runtime on all the data, every float tensor exposed, and judge each for ``dtype``.

    Only tensors whose name is ``wanted`` are measured.

    Tensors are exposed in chunks of at most ``chunk_bytes`` (or one tensor), each in a graph cut down to what it needs. ``lowered_for``
    measures the graphs in the form that engine is built from, where attention may be written out. Best on a float32 bundle, which shows
    how far beyond the limit a value goes.

    Raises:
        VariantError: there is no such variant.
        CalibrationError: the data is not of that variant, or a dtype that has no entry in the formats.
        EngineUnavailableError: ONNX Runtime cannot run on this machine.
        EngineError: it refused a graph, as the CPU does with many in bfloat16.
    """
    limits = find_format(dtype)
    collection.require_variant(variant)
    if (precision := collection.bundle.variant(variant).precision) is not None:
        raise CalibrationError(
            f"variant {variant!r} is quantised ({precision.label}): measure the one it was made from, {precision.base!r}"
        )
    if reason := find_runtime(ENGINE).unavailable():
        raise EngineUnavailableError(reason)
    bundle = collection.bundle
    sixteen = bundle.manifest.source.dtype != "float32"
    tensors: list[TensorRange] = []
    weights: dict[str, Seen] = {}
    for graph in collection.graphs:
        path = bundle.graph_file(graph, variant=variant)
        model = ir.load(path)
        if lowered_for:
            model = lower(model, lowered_for)
        found: dict[ir.Value, Seen] = {}
        progress(f"reading weights and inputs of {graph}")
        judged = frozenset(weights)
        found |= _read_weights(_floats(model.graph.initializers.values(), wanted), limits, weights)
        found |= _read_inputs(collection, graph, _floats(model.graph.inputs, wanted), limits)
        chunks = list(chunk_values(_floats((value for node in model.graph for value in node.outputs), wanted), chunk_bytes))
        for number, chunk in enumerate(chunks, 1):
            progress(f"measuring {graph}: part {number} of {len(chunks)}")
            found |= _measure(collection, graph, ModelFile(path, "", cut_graph(model, chunk)), chunk, limits)
        tensors += judge(collection, graph, model, found, limits, judged, sixteen=sixteen)
    return Ranges(
        variant=variant,
        dtype=dtype,
        limit=limits.largest,
        lowered_for=lowered_for,
        random=collection.random,
        emulated=sixteen,
        samples=len(collection.info.samples),
        runs={graph: collection.count(graph) for graph in collection.graphs},
        tensors=tuple(tensors),
    )


def _floats(values: Iterable[ir.Value], wanted: Callable[[str], bool]) -> Iterator[ir.Value]:
    floats = (value for value in values if value.name and value.dtype is not None and value.dtype.is_floating_point())
    return (value for value in floats if wanted(str(value.name)))


def _read_weights(values: Iterable[ir.Value], limits: Format, known: dict[str, Seen]) -> dict[ir.Value, Seen]:
    """Float weights, which are narrowed with everything else. ``known`` are those that an earlier graph had, by name, and grows."""
    found = {}
    for value in values:
        tensor = value.const_value
        if tensor is None:
            continue
        shared = isinstance(tensor, ir.ExternalTensor)  # named after its parameter in all graphs; small ones are each graph's own
        seen = known.get(str(value.name)) if shared else None
        if seen is None:
            seen = Seen()
            seen.add(read_values(tensor), limits)
        if shared:
            known[str(value.name)] = seen
        found[value] = seen
    return found


def _read_inputs(collection: Collection, graph: str, values: Iterable[ir.Value], limits: Format) -> dict[ir.Value, Seen]:
    """What the graph was fed."""
    found = {value: Seen() for value in values}
    for run, feed in enumerate(collection.feeds(graph) if found else ()):
        for value, seen in found.items():
            seen.add(feed[str(value.name)], limits, run)
    return found


def _measure(collection: Collection, graph: str, model: ModelFile, chunk: Sequence[ir.Value], limits: Format) -> dict[ir.Value, Seen]:
    """Run all feeds through one cut graph."""
    content = model.content or b""
    session = find_runtime(ENGINE).load(ModelFile(model.path, sha256_bytes(content), content))
    taken = {spec.name for spec in session.inputs}
    found = {value: Seen() for value in chunk}
    for run, feed in enumerate(collection.feeds(graph)):
        outputs = session.run({name: array for name, array in feed.items() if name in taken})
        for value, seen in found.items():
            seen.add(outputs[str(value.name)], limits, run)
    return found
