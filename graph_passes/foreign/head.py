"""The lm_head as ``find_decoder`` reads it: its weight stands as ``[V, D]``, so that a tied one is the embedding table.

Before::

    hidden[B, S, D] -> MatMul(W[D, V]) -> logits

After::

    hidden[B, S, D] -> MatMul(Transpose(W.T[V, D])) -> logits
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from sievert.graph_passes.foreign.match import Mismatch, at, producer

_NORMS = ("RMSNormalization", "LayerNormalization")
_TRANSPOSED = (1, 0)


def turn_head(model: ir.Model) -> Mismatch | bool:
    """Put the transpose in; False where it was there."""
    graph = model.graph
    value: ir.Value | None = next(output for output in graph.outputs if output.name == "logits")
    node = value.producer() if value is not None else None
    while node is not None and node.op_type == "Cast":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "MatMul":
        if node is not None and node.op_type in _NORMS:
            return Mismatch("the graph ends with the final norm, without an lm_head: export the model that gives logits", at(node))
        capped = _find_cap(node)
        if capped is not None:
            return Mismatch("the logits are capped (softcap), which the passes do not carry over yet", at(capped))
        return Mismatch("the logits do not come from the lm_head's MatMul: a bias, a factor or a slice follows it", at(node))
    weight = node.inputs[1]
    turn = producer(weight, "Transpose")
    if turn is not None and turn.inputs[0] is not None and turn.inputs[0].is_initializer():
        return False
    if weight is None or not weight.is_initializer() or weight.const_value is None or len(weight.const_value.shape) != 2:
        return Mismatch("the lm_head's weight is no matrix of its own", at(node))
    tensor = weight.const_value
    name = f"{weight.name}.T"
    rows, columns = (size for size in tensor.shape if isinstance(size, int))
    shape = ir.Shape([columns, rows])

    def evaluate() -> ir.TensorProtocol:
        return ir.Tensor(np.ascontiguousarray(tensor.numpy().T), dtype=tensor.dtype, name=name)

    turned = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape)
    turned.const_value = ir.LazyTensor(evaluate, dtype=tensor.dtype, shape=shape, name=name)
    graph.register_initializer(turned)
    transpose = ir.node("Transpose", [turned], {"perm": _TRANSPOSED})
    transpose.outputs[0].shape, transpose.outputs[0].type = weight.shape, ir.TensorType(tensor.dtype)
    graph.insert_before(node, transpose)
    node.replace_input_with(1, transpose.outputs[0])
    return True


def _find_cap(node: ir.Node | None) -> ir.Node | None:
    """The Tanh within a few nodes before the logits."""
    for _ in range(4):
        if node is None or node.op_type == "Tanh":
            return node
        behind = [above for value in node.inputs if value is not None and (above := value.producer()) is not None]
        node = behind[0] if behind else None
    return None
