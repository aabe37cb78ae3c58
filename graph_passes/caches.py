"""Keep keys and values in 16 bit beside graphs that compute in another type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.graph_passes.op import make_cast

_PAST: Final = "past_key_values."


@dataclass(frozen=True)
class NarrowCaches(ir.passes.InPlacePass):
    """Let every cache be of ``dtype``, but those whose input or output is named in ``high``. What is computed stays of its type.

    Before::

        k[B, G, n, d] --+
        past[B, G, C, d] -> TensorScatter -> present -> Attention

    After::

        k -> Cast dtype --+
        past[dtype] -> TensorScatter -> present[dtype] -> Cast -> Attention

    Prefill attends to its fresh keys and values, so there nothing that is computed changes.
    """

    dtype: ir.DataType
    high: frozenset[str] = frozenset()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when a cache became another type.

        Raises:
            GraphError: a cache that something else than one TensorScatter reads.
        """
        changed = False
        for past in model.graph.inputs:
            if not str(past.name).startswith(_PAST) or past.dtype in (None, self.dtype):
                continue
            scatter = _find_update(past)
            if {str(past.name), str(scatter.outputs[0].name)} & self.high:
                continue
            _narrow(model.graph, past, scatter, self.dtype)
            changed = True
        return ir.passes.PassResult(model, modified=changed)


def _find_update(past: ir.Value) -> ir.Node:
    uses = list(past.uses())
    if len(uses) != 1 or uses[0].node.op_type != "TensorScatter" or uses[0].idx != 0 or not uses[0].node.outputs[0].is_graph_output():
        readers = ", ".join(f"{use.node.op_type} node {use.node.name!r}" for use in uses) or "nothing"
        raise GraphError(f"{past.name} is read by {readers}, expected one TensorScatter that gives the cache: make the variant again")
    return uses[0].node


def _narrow(graph: ir.Graph, past: ir.Value, scatter: ir.Node, dtype: ir.DataType) -> None:
    present, update, computed = scatter.outputs[0], scatter.inputs[1], past.dtype
    if update is None or computed is None:
        raise GraphError(f"the update of {past.name} has no value or no type")
    past.type = present.type = ir.TensorType(dtype)
    written = make_cast(update, dtype, f"{present.name}.new")
    graph.insert_before(scatter, written)
    scatter.replace_input_with(1, written.outputs[0])
    if readers := list(present.uses()):
        read = make_cast(present, computed, f"{present.name}.read")
        graph.insert_after(scatter, read)
        for node, place in readers:
            node.replace_input_with(place, read.outputs[0])
