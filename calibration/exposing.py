"""Cut a graph down to some of its inner values, a chunk of them at a time, so that measuring them takes bounded memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from sievert.bundle.specs import describe_values
from sievert.calibration.tensors import nbytes
from sievert.graph_passes.expose import expose, to_bytes


def chunk_values(values: Iterable[ir.Value], budget: int) -> Iterator[tuple[ir.Value, ...]]:
    """Values in order, grouped so that each group takes at most ``budget`` bytes or is a single value."""
    chunk: list[ir.Value] = []
    size = 0
    for value in values:
        (spec,) = describe_values([value])
        needed = nbytes(spec)
        if chunk and size + needed > budget:
            yield tuple(chunk)
            chunk, size = [], 0
        chunk.append(value)
        size += needed
    if chunk:
        yield tuple(chunk)


def cut_graph(model: ir.Model, chunk: Sequence[ir.Value]) -> bytes:
    """The graph with these values as its only outputs, and nothing they do not need."""
    names = [str(value.name) for value in chunk]
    exposed = expose(model, names)
    kept = [value for value in exposed.graph.outputs if str(value.name) in set(names)]
    exposed.graph.outputs.clear()
    exposed.graph.outputs.extend(kept)
    RemoveUnusedNodesPass()(exposed)
    return to_bytes(exposed)
