"""Compute a float32 graph in 16 bit, with float32 where 16 bit would not do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.graph_passes.op import FLOAT, make_cast
from sievert.graph_passes.quantise import is_selector
from sievert.graph_passes.scopes import read_exported

_ROTARY: Final = "rotary_emb"
_ANGULAR: Final = frozenset({"Sin", "Cos"})
_STASHED: Final = {"RMSNormalization": "stash_type", "LayerNormalization": "stash_type", "Attention": "softmax_precision"}
Weights = Callable[[str], ir.TensorProtocol]


@dataclass(frozen=True)
class Narrow(ir.passes.InPlacePass):
    """Let every float32 value be of ``dtype``, but for islands of float32: what a selector computes, tables of rotary positions with the
    angles they are made of (a position beyond 256 is no bfloat16), what is made of integers, and every node that takes or gives a value in
    ``high``. Norms and softmax keep their float32 inside, logits and scores of the vision encoder are given as float32.

    Before::

        x[float32] -> MatMul(W) -> Exp -> y[float32]

    After, with the output of Exp in ``high``::

        x[float16] -> MatMul(W.float16) -> Cast float32 -> Exp -> y[float32]

    ``weights`` gives a parameter in ``dtype``, by its name. Constants beyond the type's range, which masks are made of, become its limits.
    """

    dtype: ir.DataType
    weights: Weights
    high: frozenset[str] = frozenset()

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when a value was narrowed."""
        work = _Narrowing(model.graph, self)
        return ir.passes.PassResult(model, modified=work.run())

    def ensures(self, model: ir.Model) -> None:
        """Every node takes float values of one type, as the operators demand.

        Raises:
            GraphError: one takes two; the message names it.
        """
        for node in model.graph:
            kinds = {value.dtype for value in node.inputs if value is not None and value.dtype in (FLOAT, self.dtype)}
            if len(kinds) > 1:
                raise GraphError(f"{node.op_type} node {node.name!r} takes {', '.join(map(str, kinds))} after narrowing")


class _Narrowing:
    """One graph while it is narrowed."""

    def __init__(self, graph: ir.Graph, how: Narrow) -> None:
        self._graph, self._how = graph, how
        self._casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}
        self._constants: dict[str, ir.Value] = {}
        self._angles = _find_angles(graph)

    def run(self) -> bool:
        nodes = list(self._graph)
        narrow = [node for node in nodes if not self._stays(node)]
        changed = False
        for value in self._graph.inputs:
            if value.dtype is FLOAT and value.name not in self._how.high and not _is_float32_by_contract(value):
                value.type = ir.TensorType(self._how.dtype)
                changed = True
        kept = set(nodes) - set(narrow)
        for node in narrow:
            for value in node.outputs:
                if value.dtype is FLOAT:
                    value.type = ir.TensorType(self._how.dtype)
                    changed = True
        for node in nodes:
            self._feed(node, FLOAT if node in kept else self._how.dtype)
        for node in narrow:
            attribute = _STASHED.get(node.op_type)
            if attribute is not None:
                node.attributes[attribute] = ir.AttrInt64(attribute, int(FLOAT))
        for place, value in enumerate(self._graph.outputs):
            if _is_float32_by_contract(value) and value.dtype is self._how.dtype:
                self._give_float32(place, value)
        for name, value in list(self._graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self._graph.initializers[name]
        return changed

    def _stays(self, node: ir.Node) -> bool:
        """Whether a node computes in float32."""
        floats = [value for value in (*node.inputs, *node.outputs) if value is not None and value.dtype is FLOAT]
        if any(value.name in self._how.high for value in floats):
            return True
        if node in self._angles or is_selector(node) or any(_ROTARY in scope for scope in read_exported(node)):
            return True
        computed = [value for value in node.inputs if value is not None and value.const_value is None]
        # Positions and masks: whole numbers that 16 bit would round.
        return bool(computed) and all(value.dtype is not FLOAT for value in computed) and node.op_type not in ("Gather",)

    def _feed(self, node: ir.Node, wanted: ir.DataType) -> None:
        """Let every float input of ``node`` be of the type wanted."""
        for place, value in enumerate(node.inputs):
            if value is None or value.dtype not in (FLOAT, self._how.dtype) or value.dtype is wanted:
                continue
            other = self._narrow_constant(value) if value.const_value is not None else self._cast(value, wanted)
            node.replace_input_with(place, other)
        if node.op_type == "Cast" and wanted is self._how.dtype and node.outputs[0].dtype is wanted:
            node.attributes["to"] = ir.AttrInt64("to", int(wanted))

    def _cast(self, value: ir.Value, wanted: ir.DataType) -> ir.Value:
        key = (value, wanted)
        if key not in self._casts:
            node = make_cast(value, wanted, f"{value.name}.{wanted.name.lower()}")
            producer = value.producer()
            if producer is None:
                self._graph.insert_before(self._graph[0], node)
            else:
                self._graph.insert_after(producer, node)
            self._casts[key] = node.outputs[0]
        return self._casts[key]

    def _narrow_constant(self, value: ir.Value) -> ir.Value:
        """A weight or constant in the narrow type: initialisers are all float32 before."""
        name, kind, tensor = str(value.name), self._how.dtype, value.const_value
        if name not in self._constants and tensor is not None:
            if isinstance(tensor, ir.ExternalTensor):
                narrow = self._how.weights(name)
            else:
                narrow = ir.Tensor(fit(np.asarray(tensor.numpy()), kind), dtype=kind)
            shape = [int(axis) for axis in narrow.shape.numpy()]
            made = ir.val(f"{name}.{kind.name.lower()}", kind, shape, const_value=narrow)
            self._graph.register_initializer(made)
            self._constants[name] = made
        return self._constants[name]

    def _give_float32(self, place: int, value: ir.Value) -> None:
        name = str(value.name)
        value.name = f"{name}.{self._how.dtype.name.lower()}"
        cast = ir.node("Cast", [value], {"to": FLOAT})
        made = cast.outputs[0]
        made.name, made.shape, made.type = name, value.shape, ir.TensorType(FLOAT)
        self._graph.append(cast)
        self._graph.outputs[place] = made


def _find_angles(graph: ir.Graph) -> set[ir.Node]:
    """Every Sin and Cos, and what their angles are computed from. The exporter leaves not all of these a module's name."""
    found: set[ir.Node] = set()
    stack = [node for node in graph if node.op_type in _ANGULAR]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack += [producer for value in node.inputs if value is not None and (producer := value.producer()) is not None]
    return found


def fit(values: np.ndarray[tuple[int, ...], np.dtype[np.float32]], dtype: ir.DataType) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """``values`` in ``dtype``; what is finite and beyond its range becomes the largest value of its sign."""
    largest = float(dtype.max)
    clipped = np.where(np.isfinite(values), np.clip(values, -largest, largest), values)
    return np.asarray(clipped).astype(dtype.numpy())


def _is_float32_by_contract(value: ir.Value) -> bool:
    return value.name in ("logits", "visual_scores")
