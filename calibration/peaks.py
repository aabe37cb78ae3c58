"""How large the activations get that are to be quantised, over all calibration data."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from collections.abc import Collection as Names
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import onnx_ir as ir

from sievert.bundle.errors import CalibrationError, EngineUnavailableError
from sievert.bundle.files import sha256_bytes
from sievert.calibration.collection import Collection
from sievert.calibration.exposing import chunk_values, cut_graph
from sievert.calibration.numbers import Float
from sievert.engines.run.base import ModelFile
from sievert.engines.run.dtypes import Array
from sievert.engines.run.registry import find_runtime
from sievert.graph_passes.quantise import find_linears

_CHUNK_BYTES = 256 << 20
_ENGINE = "onnxruntime"
_LEAST: Final = 0.8
"""The part of a value that may be left of it."""


@dataclass
class Peak:
    """The ``count`` largest magnitudes of a tensor so far: an exact percentile needs no others."""

    count: int
    largest: Float = field(default_factory=lambda: np.zeros(0, np.float32))

    def add(self, array: Array) -> None:
        """Take in one run."""
        both = np.concatenate([self.largest, np.abs(array.astype(np.float32)).ravel()])
        self.largest = np.partition(both, -self.count)[-self.count :] if len(both) > self.count else both

    @property
    def most(self) -> float:
        """The largest magnitude, 0 where there was none."""
        return float(self.largest.max(initial=0.0))

    @property
    def percentile(self) -> float:
        """The least of the values kept, the largest one where only that was."""
        return float(self.largest.min()) if len(self.largest) else 0.0

    @property
    def outliers(self) -> bool:
        """Whether a scale of the percentile would cut a value by more than a fifth.

        Few activations of a decoder are far larger than the others, and the model relies on them (https://arxiv.org/abs/2208.07339,
        https://arxiv.org/abs/2402.17762). Least squares do not keep them: what the others gain in finer steps outweighs them in sum.
        """
        return self.percentile < _LEAST * self.most


def measure_peaks(
    collection: Collection,
    models: Mapping[str, ir.Model],
    names: Names[str],
    *,
    percentile: float = 100.0,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Peak]:
    """The largest magnitudes of what each weight in ``names`` is multiplied with, as many as lie outside ``percentile`` %, by the
    weight's name.

    One for all graphs and instances: what prefill and decode feed to one projection has one scale, and so has what several
    projections share. 100 keeps the largest value alone. ``models`` are the graphs the data was collected from.

    Raises:
        CalibrationError: a sample gave NaN or infinity, named.
        EngineUnavailableError: ONNX Runtime cannot run on this machine.
        EngineError: it refused a graph.
    """
    if reason := find_runtime(_ENGINE).unavailable():
        raise EngineUnavailableError(reason)
    read = {graph: _activations(model, names) for graph, model in models.items() if graph in collection.graphs}
    group = _join([owners for values in read.values() for owners in values.values()])
    total: dict[str, int] = defaultdict(int)
    for graph, values in read.items():
        for value, owners in values.items():
            total[group[owners[0]]] += collection.count(graph) * _size(value)
    peaks = {key: Peak(max(1, math.floor(size * (1 - percentile / 100)) + 1)) for key, size in total.items()}
    for graph, values in read.items():
        fed = [value for value in values if value.is_graph_input()]
        chunks = list(chunk_values((value for value in values if value not in fed), _CHUNK_BYTES))
        for number, chunk in enumerate(chunks, 1):
            progress(f"measuring the activations of {graph}: part {number} of {len(chunks)}")
            content = cut_graph(models[graph], chunk)
            path = collection.bundle.path / f"{graph}.onnx"  # nothing is there: it says where the weights are
            session = find_runtime(_ENGINE).load(ModelFile(path, sha256_bytes(content), content))
            taken = {spec.name for spec in session.inputs}
            for run, feed in enumerate(collection.feeds(graph)):
                outputs = session.run({name: array for name, array in feed.items() if name in taken})
                for value in chunk:
                    _take(peaks[group[values[value][0]]], outputs[str(value.name)], collection, graph, run)
        for value in fed:
            for run, feed in enumerate(collection.feeds(graph)):
                _take(peaks[group[values[value][0]]], feed[str(value.name)], collection, graph, run)
    return {name: peaks[key] for name, key in group.items()}


def _activations(model: ir.Model, names: Names[str]) -> dict[ir.Value, list[str]]:
    """What the weights in ``names`` are multiplied with, and which of them, in the order of the graph."""
    found: dict[ir.Value, list[str]] = {}
    for linear in find_linears(model):
        if linear.name in names:
            found.setdefault(linear.activation, []).append(linear.name)
    return found


def _join(shared: list[list[str]]) -> dict[str, str]:
    """One key for all weights that share an activation anywhere."""
    key: dict[str, str] = {}
    for owners in shared:
        old = {key.get(name, name) for name in owners}
        new = min(old)
        key |= dict.fromkeys([*owners, *(name for name, known in key.items() if known in old)], new)
    return key


def _size(value: ir.Value) -> int:
    return math.prod(int(axis) for axis in value.shape.numpy()) if value.shape is not None else 0


def _take(peak: Peak, array: Array, collection: Collection, graph: str, run: int) -> None:
    if not np.isfinite(array.astype(np.float32)).all():
        where = f"{collection.name_samples(graph, run)} of {collection.path}"
        raise CalibrationError(f"{where} leads to NaN or infinity inside {graph}: leave it out and collect again")
    peak.add(array)
