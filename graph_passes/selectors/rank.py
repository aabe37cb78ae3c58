"""Pieces that several selectors share: visual rows, masked means over text, and the first choice by score."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, Protocol, cast

import onnx_ir as ir

FLOAT: Final = ir.DataType.FLOAT

# Below any norm or score that fp16, bf16 or fp32 activations give; keeps 0/0 out of the graph.
TINY: Final = 1e-30


class Op(Protocol):
    """onnxscript's OpBuilder, with a type for what its operators return."""

    def __getattr__(self, op_type: str) -> Callable[..., ir.Value]: ...


def cast_float(op: Op, value: ir.Value) -> ir.Value:
    """``value`` in float32; strong typing wants the cast written, and a cast to the same type is left out."""
    return value if value.dtype == FLOAT else op.Cast(value, to=FLOAT)


def mean_text(op: Op, rows: ir.Value, text: ir.Value) -> ir.Value:
    """Mean of ``rows[B, H, S, d]`` over the true columns of ``text[B, S]``: [B, H, 1, d] float32, zeros where none is true."""
    weights = op.Cast(text, to=FLOAT)  # [B, S]
    count = op.Max(op.ReduceSum(weights, [1], keepdims=1), 1.0)  # [B, 1]
    mean_weights = op.Unsqueeze(op.Div(weights, count), [1, 2])  # [B, 1, 1, S]
    return op.MatMul(mean_weights, cast_float(op, rows))


def gather_visual(op: Op, tap: ir.Value, rows: ir.Value) -> ir.Value:
    """Rows ``rows[B, Nv, 1]`` of ``tap[B, G, S, d]``: [B, Nv, G, d] float32, heads innermost but one.

    GatherND takes one batch axis (TensorRT allows no more), so the sequence comes second; in a decoder this transpose meets the
    one that split the heads, and both vanish. Gathered before the cast: a fifth of the rows or less is often all that is read.
    """
    return cast_float(op, op.GatherND(op.Transpose(tap, perm=[0, 2, 1, 3]), rows, batch_dims=1))


def take_best(op: Op, scores: ir.Value, count: int) -> ir.Value:
    """Places of the ``count`` highest of ``scores[B, Nv]``, best first, the lower place first where equal: [B, count] int64."""
    return take_outputs(op.TopK(scores, [count], axis=1, largest=1, sorted=1, _outputs=2))[1]


def take_outputs(values: ir.Value) -> Sequence[ir.Value]:
    """What an operator of several outputs really returned."""
    return cast("Sequence[ir.Value]", values)
