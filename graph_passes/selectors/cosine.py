"""Cosines between rows, for the selectors that compare tokens with one another."""

from __future__ import annotations

import onnx_ir as ir

from sievert.graph_passes.selectors.rank import TINY, Op, cast_float


def gather_rows(op: Op, stream: ir.Value, index: ir.Value) -> ir.Value:
    """Rows ``index[B, N]`` of ``stream[B, S, D]``: [B, N, D] float32."""
    return cast_float(op, op.GatherND(stream, op.Unsqueeze(index, [2]), batch_dims=1))


def normalise_rows(op: Op, rows: ir.Value) -> ir.Value:
    """``rows[..., D]`` float32 at length 1; a row of zeros stays one, so that its cosine with everything is 0."""
    return op.Div(rows, op.Max(op.ReduceL2(rows, [-1], keepdims=1), TINY))


def multiply_rows(op: Op, left: ir.Value, right: ir.Value) -> ir.Value:
    """Products of all pairs of rows of ``left[B, M, D]`` and ``right[B, N, D]``: [B, M, N], cosines where the rows have length 1."""
    return op.MatMul(left, op.Transpose(right, perm=[0, 2, 1]))
