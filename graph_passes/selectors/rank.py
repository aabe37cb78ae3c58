"""Pieces that several selectors share: visual rows, masked means over text, and the first choice by score."""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.graph_passes.lowering.limits import LARGEST_TOPK
from sievert.graph_passes.op import FLOAT, Op, cast_float, take_outputs

# Below any norm or score that fp16, bf16 or fp32 activations give; keeps 0/0 out of the graph.
TINY: Final = 1e-30

# Comparisons made at once for one batch row: 16 MiB where they are counted as float32.
LARGEST_BLOCK: Final = 2**22


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


def limit_topk(count: int) -> int:
    """The K of the TopK by which :func:`take_best` takes ``count``, 0 where it needs none."""
    return count if count <= LARGEST_TOPK else 0


def take_best(op: Op, scores: ir.Value, count: int) -> ir.Value:
    """Places of the ``count`` highest of ``scores[B, Nv]``, best first, the lower place first where equal: [B, count] int64."""
    if not limit_topk(count):
        return op.Slice(_sort_by_rank(op, scores), [0], [count], [1])
    return take_outputs(op.TopK(scores, [count], axis=1, largest=1, sorted=1, _outputs=2))[1]


def _sort_by_rank(op: Op, scores: ir.Value) -> ir.Value:
    """All places of ``scores[B, Nv]`` in the order of a stable TopK, by counting for each place those that come before it: [B, Nv] int64.

    Nv^2 comparisons, but no limit on Nv. In blocks, so that no intermediate is large.
    """
    if scores.shape is None or not scores.shape.is_static():
        raise GraphError(f"scores of shape {scores.shape}: ranks are counted for a static [B, Nv]")
    batch, visual = scores.shape.numpy()
    size = min(visual, max(1, LARGEST_BLOCK // visual))
    blocks = [(start, min(start + size, visual)) for start in range(0, visual, size)]
    earlier = {length: _place_earlier(op, length) for length in dict.fromkeys(end - start for start, end in blocks)}
    row, column = op.Unsqueeze(scores, [1]), op.Unsqueeze(scores, [2])  # [B, 1, Nv] and [B, Nv, 1]
    counts = []
    for start, end in blocks:
        block = op.Slice(column, [start], [end], [1])  # [B, b, 1]
        # Equals count before the block, not after it; within it a small triangle tells. A mask of b x Nv would be folded and stored.
        own = op.And(op.Equal(block, op.Slice(row, [start], [end], [2])), earlier[end - start])  # [B, b, b]
        ahead = [own, op.Less(block, op.Slice(row, [start], [visual], [2]))]
        if start:
            ahead.append(op.LessOrEqual(block, op.Slice(row, [0], [start], [2])))
        counts.append(op.ReduceSum(op.Cast(op.Concat(*ahead, axis=2), to=FLOAT), [2], keepdims=0))  # [B, b]
    rank = op.Cast(op.Concat(*counts, axis=1), to=ir.DataType.INT64)  # [B, Nv], a permutation
    places = op.Expand(op.Range(0, visual, 1), [batch, visual])
    return op.ScatterElements(places, rank, places, axis=1)


def _place_earlier(op: Op, size: int) -> ir.Value:
    """Whether column j comes before row i: [b, b] bool."""
    counter = op.Range(0, size, 1)
    return op.Less(counter, op.Unsqueeze(counter, [1]))
