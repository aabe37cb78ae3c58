"""Copy parts of a dynamic graph into a static one, with some of its values bound to new ones.

The front, the tail and every decode segment are instances of the *same* decoder graph: an instance binds the values it enters at and
asks for the values it needs; only nodes between the two are copied. Weights are shared because they are the same initialiser.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError


class Instance:
    """One use of ``source`` inside the builder's graph; copied values are named under ``scope``."""

    def __init__(
        self,
        build: GraphBuilder,
        source: ir.Graph,
        *,
        scope: str,
        bound: Mapping[ir.Value, ir.Value],
        weights: dict[str, ir.Value],
        shapes: Mapping[ir.Value, ir.Value] = MappingProxyType({}),
    ) -> None:
        """``weights`` maps initialiser names to values already in the builder's graph; it is shared by all instances of a graph.

        ``shapes`` maps inputs of the source whose *shape* alone may be read (an exporter takes a length from any input that has it) to
        values of that shape; reading their content is refused.
        """
        self._build = build
        self._source = source
        self._scope = scope
        self._values: dict[ir.Value, ir.Value] = dict(bound)
        self._shapes = shapes
        self._weights = weights

    def bind(self, source: ir.Value, value: ir.Value) -> None:
        """From here on, ``source`` stands for ``value``. Binding a value that was already copied is a mistake."""
        if source in self._values:
            raise GraphError(f"{source.name!r} is already bound or copied in {self._scope}")
        self._values[source] = value

    def get(self, wanted: ir.Value) -> ir.Value:
        """The copy of ``wanted``, copying what it needs and no more.

        Raises:
            GraphError: it depends on an input of the source graph that was not bound.
        """
        stack = [wanted]
        while stack:
            value = stack[-1]
            if value in self._values:
                stack.pop()
                continue
            node = value.producer()
            if node is None:
                self._values[value] = self._leaf(value)
                continue
            missing = [v for v in node.inputs if v is not None and v not in self._values and not self._is_measured(node, v)]
            if missing:
                stack.extend(missing)
            else:
                self._copy(node)
        return self._values[wanted]

    def _is_measured(self, node: ir.Node, value: ir.Value) -> bool:
        return node.op_type == "Shape" and value in self._shapes

    def _leaf(self, value: ir.Value) -> ir.Value:
        if value.const_value is None:
            raise GraphError(f"{self._scope} depends on {value.name!r} of the exported graph, which has no counterpart in a pruned one")
        name = str(value.name)
        if name not in self._weights:
            self._weights[name] = self._build.initializer(value.const_value, name=name, qualify=False)
        return self._weights[name]

    def _copy(self, node: ir.Node) -> None:
        outputs = [ir.Value(name=f"{self._scope}.{value.name}", type=value.type) for value in node.outputs]
        copy = ir.Node(
            node.domain,
            node.op_type,
            [None if value is None else (self._shapes if self._is_measured(node, value) else self._values)[value] for value in node.inputs],
            attributes=node.attributes.values(),
            outputs=outputs,
            name=f"{self._scope}.{node.name}",
            metadata_props=dict(node.metadata_props),
        )
        self._build.add_node(copy)
        self._values.update(zip(node.outputs, outputs, strict=True))
