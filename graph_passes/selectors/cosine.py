"""Cosines between rows, for the selectors that compare tokens with one another."""

from __future__ import annotations

import onnx_ir as ir

from sievert.graph_passes.op import Op, cast_float
from sievert.graph_passes.selectors.rank import TINY


def normalise_rows(op: Op, rows: ir.Value) -> ir.Value:
    """``rows[..., D]`` at length 1, in float32; a row of zeros stays one, so that its cosine with everything is 0."""
    rows = cast_float(op, rows)
    return op.Div(rows, op.Max(op.ReduceL2(rows, [-1], keepdims=1), TINY))


def multiply_rows(op: Op, left: ir.Value, right: ir.Value) -> ir.Value:
    """Products of all pairs of rows of ``left[B, M, D]`` and ``right[B, N, D]``: [B, M, N], cosines where the rows have length 1."""
    return op.MatMul(left, op.Transpose(right, perm=[0, 2, 1]))
