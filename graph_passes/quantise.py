"""Find the products with weights in a static graph, and write them with explicit QuantizeLinear and DequantizeLinear.

Engines that are strongly typed take precision from the graph alone; ONNX Runtime fuses the same pairs where its CPU has kernels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.graph_passes.scopes import read_built

_SELECTORS: Final = ("select.", "vision_scores")
_ON_THE_WAY: Final = frozenset(
    {"Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze", "Slice", "Split", "Identity", "RotaryEmbedding", "GatherND", "Gather"}
)
_NORMS: Final = frozenset({"RMSNormalization", "LayerNormalization"})


@dataclass(frozen=True)
class Linear:
    """A product of an activation and a weight of the weights file. ``channel_axis`` of the weight ``[K, N]`` or ``[N, K]`` is that of its
    outputs; ``head``: it makes the logits.
    """

    node: ir.Node
    activation: ir.Value
    weight: ir.Value
    channel_axis: int
    head: bool

    @property
    def name(self) -> str:
        """The parameter's, with ``.T`` where it is transposed."""
        return str(self.weight.name)


def find_linears(model: ir.Model) -> tuple[Linear, ...]:
    """Every MatMul and Gemm with a matrix of the weights file, in the order of the graph. Convolutions and tables are none."""
    heads = {value for value in model.graph.outputs if value.name == "logits"}
    return tuple(linear for node in model.graph if (linear := _read_linear(node, heads)) is not None)


def _read_linear(node: ir.Node, heads: set[ir.Value]) -> Linear | None:
    if node.op_type not in ("MatMul", "Gemm") or node.domain != "" or len(node.inputs) < 2:
        return None
    activation, weight = node.inputs[0], node.inputs[1]
    if activation is None or weight is None or not isinstance(weight.const_value, ir.ExternalTensor) or len(weight.const_value.shape) != 2:
        return None
    if node.attributes.get_int("transA", 0):
        return None
    after = node.outputs[0]
    while after not in heads and len(after.uses()) == 1 and next(iter(after.consumers())).op_type == "Cast":
        after = next(iter(after.consumers())).outputs[0]
    return Linear(node, activation, weight, 0 if node.attributes.get_int("transB", 0) else 1, after in heads)


def selector_weights(model: ir.Model) -> frozenset[str]:
    """Names of the weights whose products a selector reads: the projections of layer l that stand before its q, k and v.

    Between a projection and the selector may be reshapes, a bias, a head's norm and rotary embedding. A selector that reads the residual
    stream reads everything before it, of which nothing is singled out.
    """
    found: set[str] = set()
    inside = {node for node in model.graph if is_selector(node)}
    stack = [value for node in inside for value in node.inputs if value is not None and value.producer() not in inside]
    seen: set[ir.Value] = set()
    while stack:
        value = stack.pop()
        node = value.producer()
        if node is None or value in seen or node in inside:
            continue
        seen.add(value)
        linear = _read_linear(node, set())
        if linear is not None:
            found.add(linear.name)
        elif node.op_type in _ON_THE_WAY | _NORMS and node.inputs[0] is not None:
            stack.append(node.inputs[0])
        elif node.op_type in ("Add", "Mul"):
            computed = [each for each in node.inputs if each is not None and each.const_value is None]
            stack += computed if len(computed) == 1 else []  # a bias or a gain; two are the residual stream
    return frozenset(found)


def is_selector(node: ir.Node) -> bool:
    """Whether a node is part of a selector, or of the scores that the vision encoder gives one."""
    scopes = read_built(node)
    return bool(scopes) and scopes[0].startswith(_SELECTORS)


@dataclass(frozen=True)
class Codes:
    """A quantised weight: ``codes`` of its shape, ``scale[channels]`` of the graph's float type, or ``[K / block, N]`` with ``block``
    along ``axis``. ``activation`` is the scale of what it is multiplied with, None where that stays as it is.
    """

    codes: ir.TensorProtocol
    scale: ir.TensorProtocol
    axis: int
    block: int = 0
    activation: float | None = None


@dataclass(frozen=True)
class InsertQuantisers(ir.passes.InPlacePass):
    """Write the products with the weights in ``codes``, by name, with quantised operands. Zero points are 0.

    Before::

        x[.., K] -> MatMul(W[K, N]) -> y

    After::

        x -> QuantizeLinear(s) -> DequantizeLinear(s) -> MatMul(DequantizeLinear(W.q, W.scale)) -> y

    An activation that several products share is quantised once.
    """

    codes: Mapping[str, Codes]

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when a product was rewritten.

        Raises:
            GraphError: two products want different scales of one activation.
        """
        weights: dict[str, ir.Value] = {}
        activations: dict[ir.Value, tuple[float, ir.Value]] = {}
        linears = [linear for linear in find_linears(model) if linear.name in self.codes]
        for linear in linears:
            codes = self.codes[linear.name]
            if linear.name not in weights:
                weights[linear.name] = _restore_weight(model.graph, linear, codes)
            if codes.activation is not None:
                if linear.activation not in activations:
                    restored = _round_trip(model.graph, linear.activation, codes.activation, codes.codes.dtype)
                    activations[linear.activation] = codes.activation, restored
                scale, value = activations[linear.activation]
                if scale != codes.activation:
                    raise GraphError(
                        f"{linear.activation.name!r} is multiplied with weights that ask for scales {scale} and {codes.activation}"
                    )
                linear.node.replace_input_with(0, value)
            linear.node.replace_input_with(1, weights[linear.name])
        for linear in linears:
            if not linear.weight.uses():
                model.graph.initializers.pop(linear.name, None)
        return ir.passes.PassResult(model, modified=bool(linears))


def _restore_weight(graph: ir.Graph, linear: Linear, codes: Codes) -> ir.Value:
    """The weight as the product takes it; its node stands before the first product."""
    name = linear.name
    quantised = _initializer(graph, f"{name}.q", codes.codes)
    scale = _initializer(graph, f"{name}.scale", codes.scale)
    attributes = {"axis": codes.axis} | ({"block_size": codes.block} if codes.block else {})
    node = ir.node("DequantizeLinear", [quantised, scale], attributes, name=f"{name}.dequantize")
    _describe(node.outputs[0], f"{name}.restored", linear.weight.shape, linear.weight.dtype)
    graph.insert_before(linear.node, node)
    return node.outputs[0]


def _round_trip(graph: ir.Graph, activation: ir.Value, step: float, kind: ir.DataType) -> ir.Value:
    name = str(activation.name)
    if activation.dtype is None:
        raise GraphError(f"{name!r} has no dtype: infer shapes before quantising")
    scale = _initializer(graph, f"{name}.scale", ir.tensor(step, dtype=activation.dtype, name=f"{name}.scale"))
    # The code's type is said by the attribute, not by a zero point of 0: ONNX Runtime 1.31 fuses pairs that have one into integer products,
    # whatever their type (8-bit floats too, which is then no valid graph), and gives those it moves across a Reshape an unsigned one.
    quantise = ir.node("QuantizeLinear", [activation, scale], {"output_dtype": kind}, name=f"{name}.quantize")
    _describe(quantise.outputs[0], f"{name}.q", activation.shape, kind)
    dequantise = ir.node("DequantizeLinear", [quantise.outputs[0], scale], name=f"{name}.dequantize")
    _describe(dequantise.outputs[0], f"{name}.restored", activation.shape, activation.dtype)
    producer = activation.producer()
    if producer is None:
        graph.insert_before(graph[0], [quantise, dequantise])
    else:
        graph.insert_after(producer, [quantise, dequantise])
    return dequantise.outputs[0]


def _initializer(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    if (known := graph.initializers.get(name)) is not None:
        return known
    value = ir.val(name, tensor.dtype, [int(axis) for axis in tensor.shape.numpy()], const_value=tensor)
    graph.register_initializer(value)
    return value


def _describe(value: ir.Value, name: str, shape: ir.Shape | None, dtype: ir.DataType | None) -> None:
    value.name, value.shape = name, shape
    value.type = None if dtype is None else ir.TensorType(dtype)
