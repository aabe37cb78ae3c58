"""Attention that a tool spelled out (MatMul, Softmax, MatMul), as one operator again.

Before::

    MatMul(q * s, transpose(k) * s) -> + mask -> Softmax -> MatMul(., v)

After::

    Attention(q, k, v, mask, scale = s * s)

The spelling is matched loosely; that it *is* attention, with this scale and mask
and nothing else, is shown by running it on random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator
from onnx_ir.tape import Tape

from sievert.graph_passes.foreign.match import Mismatch, add_before, at, nodes_of, producer, scalar

_QUERIES, _KEYS = 3, 5
_TOLERANCE: Final = {np.dtype(np.float32): 1e-5}
_COARSE: Final = 2e-2  # 16 bit


@dataclass(frozen=True)
class Spelled:
    """The parts of attention around a softmax: ``q[B, H, S, d]``, ``k`` and ``v`` ``[B, H, T, d]``."""

    q: ir.Value
    k: ir.Value
    v: ir.Value
    mask: ir.Value | None
    scale: float
    output: ir.Value


@dataclass
class _Scores:
    """What was passed on the way back from the softmax to the product."""

    mask: ir.Value | None = None
    scale: float = 1.0
    product: ir.Node | None = None
    seen: list[str] = field(default_factory=list)


def fuse_attention(model: ir.Model) -> Mismatch | int:
    """Replace every softmax over a product of queries and keys; gives how many."""
    count = 0
    for node in nodes_of(model.graph, "Softmax"):
        found = match_attention(model, node)
        if isinstance(found, Mismatch):
            return found
        tape = Tape()
        attention = tape.op(
            "Attention", [found.q, found.k, found.v, *([found.mask] if found.mask is not None else [])], {"scale": found.scale}
        )
        last = found.output.producer()
        assert last is not None  # noqa: S101 - it is a MatMul
        attention.shape, attention.type = found.output.shape, found.output.type
        add_before(model.graph, last, tape)
        ir.convenience.replace_all_uses_with(found.output, attention, replace_graph_outputs=True)
        count += 1
    return count


def match_attention(model: ir.Model, softmax: ir.Node) -> Spelled | Mismatch:
    """The attention around ``softmax``, proved, or where it differs."""
    scores = _walk_back(softmax)
    if isinstance(scores, Mismatch):
        return scores
    assert scores.product is not None  # noqa: S101 - _walk_back ends at one
    q, query_scale = _unscale(scores.product.inputs[0])
    turned, key_scale = _unscale(scores.product.inputs[1])
    key = _untranspose(turned)
    if q is None or key is None:
        return Mismatch("the softmax's scores are no product of queries with transposed keys", at(scores.product))
    k, inner_scale = _unscale(key)
    output = _walk_on(softmax)
    if isinstance(output, Mismatch):
        return output
    assert k is not None and output.inputs[1] is not None  # noqa: S101
    scale = scores.scale * query_scale * key_scale * inner_scale
    found = Spelled(q, k, output.inputs[1], scores.mask, scale, output.outputs[0])
    return _prove(model, found, softmax) or found


def _walk_back(softmax: ir.Node) -> _Scores | Mismatch:
    """From the softmax's input to the product of queries and keys, over a mask, factors and casts."""
    found, value = _Scores(), softmax.inputs[0]
    while value is not None:
        node = value.producer()
        if node is None:
            break
        if node.op_type == "MatMul":
            found.product = node
            return found
        if node.op_type == "Tanh" or "Tanh" in _ops_above(node):
            return Mismatch("attention caps its logits (softcap), which the passes do not carry over yet", at(node))
        if node.op_type == "Cast":
            value = node.inputs[0]
        elif node.op_type in ("Mul", "Div") and (factor := scalar(node.inputs[1])) is not None:
            found.scale *= factor if node.op_type == "Mul" else 1 / factor
            value = node.inputs[0]
        elif node.op_type == "Add" and found.mask is None:
            value, found.mask = _split_mask(node)
        elif node.op_type == "Where" and found.mask is None:
            found.mask, value = node.inputs[0], node.inputs[1]
        else:
            return Mismatch(f"between a softmax and its product stands {node.op_type}, expected a mask, a factor or a cast", at(node))
    return Mismatch("a softmax is not over a product of queries and keys", at(softmax))


def _ops_above(node: ir.Node) -> set[str]:
    """Operators of the nodes that feed ``node`` directly."""
    return {above.op_type for value in node.inputs if value is not None and (above := value.producer()) is not None}


def _split_mask(add: ir.Node) -> tuple[ir.Value | None, ir.Value | None]:
    """Of the operands of an Add, the scores and the mask: the scores are what a product is behind."""
    first, second = add.inputs
    return (first, second) if _is_product(first) else (second, first)


def _is_product(value: ir.Value | None) -> bool:
    while (node := producer(value, "Mul", "Div", "Cast", "Tanh", "MatMul")) is not None:
        if node.op_type == "MatMul":
            return True
        value = node.inputs[0]
    return False


def _unscale(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """``value`` without the constant factors it was multiplied by, and their product."""
    factor = 1.0
    while (node := producer(value, "Mul", "Div")) is not None and (number := scalar(node.inputs[1])) is not None:
        factor *= number if node.op_type == "Mul" else 1 / number
        value = node.inputs[0]
    return value, factor


def _untranspose(value: ir.Value | None) -> ir.Value | None:
    """What the last two axes were swapped of, directly or on a three-dimensional view."""
    node = producer(value, "Transpose", "Reshape")
    if node is None:
        return None
    if node.op_type == "Transpose":
        return node.inputs[0]
    turned = producer(node.inputs[0], "Transpose")
    flat = producer(turned.inputs[0], "Reshape") if turned is not None else None
    return flat.inputs[0] if flat is not None else None


def _walk_on(softmax: ir.Node) -> ir.Node | Mismatch:
    """The product of the softmax with the values, over casts and the guard of rows that are masked entirely."""
    frontier = [softmax.outputs[0]]
    while frontier:
        value = frontier.pop(0)
        for node in dict.fromkeys(node for node, _ in value.uses()):
            if node.op_type == "MatMul" and node.inputs[0] is value:
                return node
            if node.op_type in ("Cast", "IsNaN", "Where"):
                frontier += node.outputs
    return Mismatch("no product with values follows a softmax", at(softmax))


def _prove(model: ir.Model, found: Spelled, softmax: ir.Node) -> Mismatch | None:
    """Run the spelling on random numbers and compare with attention; None where they are equal."""
    shape, dtype = found.q.shape, found.q.dtype
    if shape is None or len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(shape[3], int) or dtype is None:
        return Mismatch(f"the queries have shape {shape}, expected [batch, heads, sequence, size] with heads and size known", at(softmax))
    random = np.random.default_rng(0)
    heads, size, number = shape[1], shape[3], dtype.numpy()
    given: dict[ir.Value, NDArray[Any]] = {
        found.q: random.standard_normal((2, heads, _QUERIES, size)).astype(number),
        found.k: random.standard_normal((2, heads, _KEYS, size)).astype(number),
        found.v: random.standard_normal((2, heads, _KEYS, size)).astype(number),
    }
    allowed = np.tri(_QUERIES, _KEYS, 1, dtype=bool)[None, None]
    if found.mask is not None:
        additive = found.mask.dtype != ir.DataType.BOOL
        given[found.mask] = np.where(allowed, 0, -1e4).astype(number) if additive else allowed
    try:
        graph = ir.convenience.extract(model.graph, list(given), [found.output])
    except ValueError as error:
        return Mismatch(f"what looks like attention reads more than queries, keys, values and a mask: {error}", at(softmax))
    feeds = {str(value.name): array for value, array in given.items()}
    run = ReferenceEvaluator(ir.to_proto(ir.Model(graph, ir_version=10))).run(None, feeds)
    q, k, v = (given[value].astype(np.float64) for value in (found.q, found.k, found.v))
    scores = q @ k.swapaxes(-1, -2) * found.scale
    scores = np.where(allowed, scores, -np.inf) if found.mask is not None else scores
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    expected = (weights / weights.sum(-1, keepdims=True)) @ v
    got = np.asarray(next(iter(run))).astype(np.float64)
    if got.shape == expected.shape and np.abs(got - expected).max() <= _TOLERANCE.get(np.dtype(number), _COARSE):
        return None
    return Mismatch("what looks like attention computes something else on random numbers", at(softmax))
