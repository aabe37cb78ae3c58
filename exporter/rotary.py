"""Rotary embedding that the tracer spelled out, as one operator again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from onnxscript.rewriter import MatchResult, RewriteRuleSet, pattern


@dataclass(frozen=True)
class FuseRotary(InPlacePass):
    """Rotary embedding spelled out becomes one operator; its tables stay in float32 up to the cast.

    Before: ``x * cast(cos([f, f])) + [-x2, x1] * cast(sin([f, f]))``. After: ``RotaryEmbedding(x, cast(cos(f)), cast(sin(f)))``.
    The exporter has such a rule of its own, which stops at a cast and at a factor: it serves float32 with plain tables only.
    """

    def call(self, model: ir.Model) -> PassResult:
        """Fuse."""
        count = RewriteRuleSet([pattern.RewriteRule(_spelled_out, _fused, _check, remove_nodes=False)]).apply_to_model(model)
        return PassResult(model, count > 0)


def _spelled_out(
    op: Any, x: Any, cos: Any, sin: Any, start1: Any, end1: Any, start2: Any, end2: Any, axes: Any, steps: Any, heads: Any
) -> Any:
    first = op.Slice(x, start1, end1, axes, steps)
    second = op.Slice(x, start2, end2, axes, steps)
    rotated = op.Concat(op.Neg(second), first, axis=-1)
    return x * op.Unsqueeze(cos, heads) + rotated * op.Unsqueeze(sin, heads)


def _fused(op: Any, x: ir.Value, cos: ir.Value, sin: ir.Value, **_: Any) -> Any:
    assert x.shape is not None  # noqa: S101 - _check has looked
    return op.RotaryEmbedding(x, _half_table(op, cos), _half_table(op, sin), interleaved=0, num_heads=x.shape[1])


def _check(
    _context: Any,
    *,
    x: ir.Value,
    cos: ir.Value,
    sin: ir.Value,
    start1: ir.Value,
    end1: ir.Value,
    start2: ir.Value,
    end2: ir.Value,
    axes: ir.Value,
    steps: ir.Value,
    heads: ir.Value,
    **_: Any,
) -> MatchResult:
    result = MatchResult()
    if x.shape is None or len(x.shape) != 4 or not isinstance(x.shape[1], int) or not isinstance(x.shape[3], int):
        return result.fail("x is not [B, H, S, d] with H and d known", x)
    half = x.shape[3] // 2
    if (_number(start1), _number(end1), _number(start2)) != (0, half, half) or (_number(end2) or 0) < 2 * half:
        return result.fail("x is not cut into two halves", x)
    if _number(heads) != 1 or _number(axes) not in (3, -1) or _number(steps) != 1:
        return result.fail("other axes than heads and elements", x)
    for table, function in ((cos, "Cos"), (sin, "Sin")):
        if (reason := _table_reason(table, function)) is not None:
            return result.fail(reason, table)
    return result


def _number(value: ir.Value) -> int | None:
    tensor = ir.convenience.get_const_tensor(value)
    return int(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _table_reason(value: ir.Value, function: str) -> str | None:
    """Why ``value`` is no table ``cast(factor * function([f, f]))``, casts and factor optional; None if it is one."""
    node = value.producer()
    if node is None:
        return "the table is given, not computed"
    if node.op_type == "Cast" or (node.op_type == "Mul" and ir.convenience.get_const_tensor(_input(node, 1)) is not None):
        return _table_reason(_input(node, 0), function)
    if node.op_type != function:
        return f"the table comes from {node.op_type}, expected {function}"
    angles = _input(node, 0).producer()
    if angles is None or angles.op_type != "Concat" or len(angles.inputs) != 2 or angles.inputs[0] is not angles.inputs[1]:
        return "the angles are not repeated for both halves"
    return None


def _half_table(op: Any, value: ir.Value) -> Any:
    """The same table of the angles ``f`` alone."""
    node = value.producer()
    assert node is not None  # noqa: S101 - _table_reason has looked
    if node.op_type == "Cast":
        return op.Cast(_half_table(op, _input(node, 0)), to=node.attributes["to"].as_int())
    if node.op_type == "Mul":
        return op.Mul(_half_table(op, _input(node, 0)), node.inputs[1])
    angles = _input(node, 0).producer()
    assert angles is not None  # noqa: S101
    return getattr(op, node.op_type)(angles.inputs[0])


def _input(node: ir.Node, place: int) -> ir.Value:
    value = node.inputs[place]
    assert value is not None  # noqa: S101 - required inputs of these operators
    return value
