"""Scales of quantised activations against what they are applied to: the very tensors of the graph, on the samples of the check.

Read from the graph, without the code or the data that chose them. A scale that is eight times too large leaves five bits of eight, one that
is too small cuts values off; the tolerances of a whole model are too wide to tell that from rounding.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sievert.bundle.errors import GraphError
from sievert.bundle.specs import TensorSpec
from sievert.bundle.store import Bundle
from sievert.engines.run.base import Cache, ModelFile, Session
from sievert.engines.run.memory import Memory
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.pipeline import GRAPHS, Pipeline
from sievert.engines.run.prompt import PromptBatch
from sievert.graph_passes.expose import to_bytes
from sievert.parity.observe import read_graph
from sievert.parity.verdict import Difference, StageResult, Verdict

STAGE: Final = "activation scales"
_LARGEST: Final = {ir.DataType.INT8: 127.0, ir.DataType.FLOAT8E4M3FN: 448.0}
_PROBE: Final = "probe."


@dataclass(frozen=True)
class Scale:
    """What stands before a product: ``limit`` is the largest magnitude its codes reach, ``probe`` the output that says what it is fed.
    ``enough``: there are so many values that they have the percentile; else the probe gives the largest.
    """

    weight: str
    limit: float
    probe: str
    enough: bool


class _Probing:
    """ONNX Runtime on the CPU, whose sessions keep the largest value that each probe gave, and do not show it."""

    name, reads_onnx, tested = "onnxruntime", True, True

    def __init__(self) -> None:
        self.inner, self.found = OnnxRuntime(), dict[str, float]()

    def version(self) -> str | None:
        return self.inner.version()

    def unavailable(self) -> str | None:
        return self.inner.unavailable()

    def load(self, model: ModelFile) -> Session:
        return _ProbedSession(self.inner.load(model), self.found)


class _ProbedSession:
    def __init__(self, inner: Session, found: dict[str, float]) -> None:
        self._inner, self._found = inner, found

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self._inner.inputs

    @property
    def outputs(self) -> tuple[TensorSpec, ...]:
        return tuple(spec for spec in self._inner.outputs if not spec.name.startswith(_PROBE))

    @property
    def memory(self) -> Memory:
        return self._inner.memory

    def bind(self, caches: Sequence[Cache]) -> None:
        self._inner.bind(caches)

    def run(self, feeds: Mapping[str, NDArray[Any]], outputs: Sequence[str] | None = None) -> dict[str, NDArray[Any]]:
        given = self._inner.run(feeds)
        for name in [name for name in given if name.startswith(_PROBE)]:
            self._found[name] = max(self._found.get(name, 0.0), float(given.pop(name).max()))
        return given if outputs is None else {name: given[name] for name in outputs}


def judge_scales(
    bundle: Bundle, variant: str, batches: Iterable[PromptBatch], tolerance: float, *, lowered_for: str = ""
) -> Iterator[StageResult]:
    """Every activation scale of a variant: its limit is at most ``tolerance`` times the magnitude it was chosen for, and at least a
    ``tolerance``-th of it.

    The magnitude is that of the variant's calibration (the largest, or a percentile where the manifest names no exception) over prefill
    of ``batches`` and one step of decode.

    Raises:
        GraphError: a quantiser in a type or with a scale that is not known.
        EngineError: ONNX Runtime failed.
    """
    precision = bundle.variant(variant).precision
    percentile = 100.0 if precision is None or precision.calibration == "max" else float(precision.calibration.rpartition(" ")[2])
    unclipped = frozenset(() if precision is None else precision.unclipped)
    runtime, scales, graphs = _Probing(), list[Scale](), dict[str, bytes]()
    for graph in GRAPHS:
        model, emulated = read_graph(bundle, variant, graph, runtime, lowered_for)
        found = add_probes(model, graph, percentile, unclipped)
        scales += found
        if found or emulated:
            graphs[graph] = to_bytes(model)
    with Pipeline(bundle, variant, runtime, lowered_for=lowered_for, graphs=graphs) as pipeline:
        slots = pipeline.profile.decode_batch
        for batch in batches:
            result = pipeline.prefill(batch, pipeline.encode(batch.pixel_values))
            for slot in range(slots):
                pipeline.fill(slot, min(slot, pipeline.profile.batch - 1))
            pipeline.decode(np.resize(result.logits.argmax(axis=1), slots))
    for weight in dict.fromkeys(scale.weight for scale in scales):
        own = [scale for scale in scales if scale.weight == weight]
        size = max(runtime.found[scale.probe] for scale in [scale for scale in own if scale.enough] or own)
        for limit in dict.fromkeys(scale.limit for scale in own):  # prefill and decode should have one and the same
            yield _judge(weight, limit, size, tolerance)


def _judge(weight: str, limit: float, size: float, tolerance: float) -> StageResult:
    if not math.isfinite(size) or not limit > 0:
        return StageResult(STAGE, weight, Verdict.FAIL, note=f"its codes reach {limit:.3g}, what it is fed {size:.3g}")
    if size == 0:
        return StageResult(STAGE, weight, Verdict.PASS, note="fed zeros alone")
    ratio = max(limit / size, size / limit)
    difference = Difference(ratio, tolerance, ratio, 1.0, (), 1)
    note = "" if ratio <= tolerance else f"codes reach {limit:.3g}, what it is fed {size:.3g}: {ratio:.1f} times, {tolerance:g} allowed"
    return StageResult(STAGE, weight, Verdict.FAIL if note else Verdict.PASS, difference, note)


def add_probes(model: ir.Model, graph: str, percentile: float, unclipped: Collection[str] = ()) -> list[Scale]:
    """Let a graph give, for every activation it quantises, the magnitude that ``percentile`` of its values stay within; the largest one
    where it is multiplied with a weight in ``unclipped``.

    Raises:
        GraphError: a quantiser in a type or with a scale that is not known.
    """
    scales = []
    for number, node in enumerate([node for node in model.graph if node.op_type == "QuantizeLinear"]):
        activation, scale = node.inputs[0], node.inputs[1]
        tensor, kind = None if scale is None else scale.const_value, node.outputs[0].dtype
        if activation is None or activation.shape is None or tensor is None or tensor.size != 1 or kind not in _LARGEST:
            raise GraphError(f"QuantizeLinear node {node.name!r} of {graph} has no single scale, or codes of {kind}")
        weight = _weight_of(node)
        share = 100.0 if weight in unclipped else percentile
        above = int(math.prod(activation.shape.numpy()) * (1 - share / 100))
        name = f"{_PROBE}{graph}.{number}"
        _probe(model.graph, activation, max(1, above), name)
        scales.append(Scale(weight, float(tensor.numpy().item()) * _LARGEST[kind], name, share == 100 or above > 0))
    return scales


def _probe(graph: ir.Graph, activation: ir.Value, place: int, name: str) -> None:
    """Add the output ``name``: the largest magnitude but ``place - 1``."""
    flat, count = (ir.tensor([size], dtype=ir.DataType.INT64, name=f"{name}.{what}") for what, size in (("flat", -1), ("count", place)))
    constants = [ir.val(str(each.name), ir.DataType.INT64, [1], const_value=each) for each in (flat, count)]
    for value in constants:
        graph.register_initializer(value)
    size = ir.node("Abs", [activation])
    row = ir.node("Reshape", [size.outputs[0], constants[0]])
    largest = ir.node("TopK", [row.outputs[0], constants[1]], {"axis": 0}, num_outputs=2)
    least = ir.node("ReduceMin", [largest.outputs[0]], {"keepdims": 1})
    wide = ir.node("Cast", [least.outputs[0]], {"to": ir.DataType.FLOAT})
    for number, node in enumerate((size, row, largest, least, wide)):
        node.name = f"{name}.{number}"
        for place, value in enumerate(node.outputs):
            value.name = f"{name}.{number}.{place}"
    graph.extend([size, row, largest, least, wide])
    made = wide.outputs[0]
    made.name, made.shape, made.type = name, ir.Shape([1]), ir.TensorType(ir.DataType.FLOAT)
    graph.outputs.append(made)


def _weight_of(node: ir.Node) -> str:
    """The weight that what ``node`` quantises is multiplied with, the first of several."""
    for restore in node.outputs[0].consumers():
        for product in restore.outputs[0].consumers():
            source = product.inputs[1].producer() if len(product.inputs) > 1 and product.inputs[1] is not None else None
            if source is not None and source.inputs and source.inputs[0] is not None:
                return str(source.inputs[0].name).removesuffix(".q")
    return str(node.inputs[0].name) if node.inputs[0] is not None else str(node.name)
