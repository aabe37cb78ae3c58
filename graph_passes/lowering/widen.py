"""Emulate bfloat16 where an engine has no kernels for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.graph_passes.op import FLOAT, make_cast

# What ONNX Runtime 1.31 has bfloat16 kernels for on the CPU, of the operators our graphs hold (tried one by one).
_CPU_NAMES: Final = """
Cast Concat Constant Flatten Gather GatherElements GatherND Identity LayerNormalization Reshape ScatterElements ScatterND
Shape Slice Split Squeeze TensorScatter Transpose Unsqueeze
"""
CPU_BFLOAT16: Final = frozenset(_CPU_NAMES.split())
_BRIEF: Final = ir.DataType.BFLOAT16


@dataclass(frozen=True)
class EmulateBfloat16(ir.passes.InPlacePass):
    """Compute in float32 what the CPU has no bfloat16 kernel for, and round each result to bfloat16.

    Before::

        a[bfloat16], b[bfloat16] -> MatMul -> y[bfloat16]

    After::

        a -> Cast float32, b -> Cast float32 -> MatMul -> Cast bfloat16 -> y[bfloat16]

    Every tensor that is stored is rounded as a bfloat16 engine rounds it; sums inside an operator are float32, as such engines have them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when a node was wrapped.

        Raises:
            GraphError: an operator whose attribute asks for bfloat16, which casts around it cannot give.
        """
        wide: dict[ir.Value, ir.Value] = {}
        nodes = list(find_bfloat16(model.graph))
        for node in nodes:
            if any(attribute.type is ir.AttributeType.INT and name == "output_dtype" for name, attribute in node.attributes.items()):
                raise GraphError(f"{node.op_type} node {node.name!r} asks for its type by an attribute: it cannot be emulated")
            for place, value in enumerate(node.inputs):
                if value is not None and value.dtype is _BRIEF:
                    node.replace_input_with(place, _widen(model.graph, node, value, wide))
            for value in node.outputs:
                if value.dtype is _BRIEF:
                    _round(model.graph, node, value)
        return ir.passes.PassResult(model, modified=bool(nodes))

    def ensures(self, model: ir.Model) -> None:
        """No node is left that the CPU has no kernel for.

        Raises:
            PostconditionError: one is.
        """
        for node in find_bfloat16(model.graph):
            raise ir.passes.PostconditionError(f"{node.op_type} node {node.name!r} still computes in bfloat16")


def find_bfloat16(graph: ir.Graph) -> Iterator[ir.Node]:
    """Nodes that take or give bfloat16 and have no kernel for it on the CPU."""
    for node in graph:
        values = (*node.inputs, *node.outputs)
        if node.domain == "" and node.op_type not in CPU_BFLOAT16 and any(v is not None and v.dtype is _BRIEF for v in values):
            yield node


def _widen(graph: ir.Graph, reader: ir.Node, value: ir.Value, wide: dict[ir.Value, ir.Value]) -> ir.Value:
    """``value`` in float32, cast once for all that read it."""
    if value not in wide:
        node = make_cast(value, FLOAT, f"wide.{value.name}")
        producer = value.producer()
        if producer is None:
            graph.insert_before(reader, node)  # the first reader in the graph's order
        else:
            graph.insert_after(producer, node)
        wide[value] = node.outputs[0]
    return wide[value]


def _round(graph: ir.Graph, node: ir.Node, value: ir.Value) -> None:
    """Let ``node`` give float32, and what reads its output read that rounded; the rounded value has the name."""
    cast = ir.node("Cast", [value], {"to": _BRIEF}, name=f"round.{value.name}")
    made = cast.outputs[0]
    made.shape, made.type = value.shape, ir.TensorType(_BRIEF)
    ir.convenience.replace_all_uses_with(value, made, replace_graph_outputs=True)
    cast.replace_input_with(0, value)
    made.name, value.name = value.name, f"exact.{value.name}"
    value.type = ir.TensorType(FLOAT)
    graph.insert_after(node, cast)
