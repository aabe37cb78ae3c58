"""Replace single nodes of a graph by small subgraphs, with onnxscript's builder."""

from __future__ import annotations

from typing import cast

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.op import Op


class Rewriter:
    """Collects replacements for nodes of ``graph`` and applies them together.

    The new nodes are built in a graph of their own over the values of ``graph``, so that each can then stand where the node it replaces
    stood. Replaced outputs keep their names; new names begin with ``scope``.
    """

    def __init__(self, graph: ir.Graph, scope: str) -> None:
        self._graph = graph
        self._scope = scope
        self._scratch = ir.Graph([], [], nodes=[], opset_imports={"": graph.opset_imports[""]}, name=scope)
        self._build = GraphBuilder(self._scratch)
        self._build.push_module(scope)
        self._replacements: list[tuple[ir.Node, list[ir.Node], ir.Value]] = []

    @property
    def op(self) -> Op:
        """Operators that add nodes to the current replacement."""
        return cast("Op", self._build.op)

    def replace(self, node: ir.Node, value: ir.Value) -> None:
        """``value``, built from nodes added since the last replacement, takes the place of the one output of ``node``."""
        done = {new for _, nodes, _ in self._replacements for new in nodes}
        self._replacements.append((node, [new for new in self._scratch if new not in done], value))

    def apply(self) -> bool:
        """Put every replacement in place; whether there was any."""
        for value in list(self._scratch.initializers.values()):
            del self._scratch.initializers[str(value.name)]
            value.name = self._free_name(f"{self._scope}.{value.name}")
            self._graph.register_initializer(value)
        for node, new_nodes, value in self._replacements:
            self._scratch.remove(new_nodes)
            ir.convenience.replace_nodes_and_values(self._graph, node, [node], new_nodes, [node.outputs[0]], [value])
        return bool(self._replacements)

    def _free_name(self, name: str) -> str:
        free, number = name, 1
        while free in self._graph.initializers:
            free, number = f"{name}.{number}", number + 1
        return free
