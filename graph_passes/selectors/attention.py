"""Attention as a layer about to run, or run already, gives it to visual tokens: only the rows of the map that a score reads.

All of it in float32, over the real keys that a row sees in that layer; grouped query heads meet their kv head without repeating it.
"""

from __future__ import annotations

from typing import Final

import onnx_ir as ir

from sievert.graph_passes.lengths import Length, sizes
from sievert.graph_passes.op import FLOAT, Op, cast_float
from sievert.graph_passes.selectors.base import StageInputs, Tap
from sievert.graph_passes.selectors.rank import gather_visual
from sievert.graph_passes.sight import Places, see

# The lowest float32: a softmax gives it exactly 0 next to any other logit, and a row of nothing else stays finite.
LOWEST: Final = -3.4028234663852886e38


def attend_last(op: Op, inputs: StageInputs, layer: int) -> ir.Value:
    """Mean over heads of the attention that the last real row pays to visual tokens in ``layer``: [B, Nv] float32."""
    real = op.Cast(inputs.real, to=ir.DataType.INT64)
    last = op.Sub(op.ReduceSum(real, [1], keepdims=1), 1)  # [B, 1], padding stands at the end
    row = op.Squeeze(_attend(op, inputs, layer, last, 1), [1])  # [B, S]
    return gather_columns(op, row, inputs.visual_index)


def attend_mean(op: Op, inputs: StageInputs, layer: int, weights: ir.Value) -> ir.Value:
    """Mean over heads, and over the rows where ``weights[B, S]`` float32 is 1, of the attention paid to visual tokens in ``layer``.

    ``weights`` are 0 or 1, and 0 at visual rows. Gives ``[B, Nv]`` float32, zeros where no weight is 1.
    """
    rows = other_rows(op, inputs)  # [B, T]
    weights = gather_columns(op, weights, rows)
    share = op.Div(weights, op.Max(op.ReduceSum(weights, [1], keepdims=1), 1.0))
    attention = _attend(op, inputs, layer, rows, inputs.geometry.others)  # [B, T, S]
    mean = op.Squeeze(op.MatMul(op.Unsqueeze(share, [1]), attention), [1])  # [B, S]
    return gather_columns(op, mean, inputs.visual_index)


def other_rows(op: Op, inputs: StageInputs) -> ir.Value:
    """The rows that are no image's, ascending: [B, T] int64.

    Before visual token i stand ``visual_index[i] - i`` others, so other m comes after all the visual tokens where that is m or less.
    """
    g, visual = inputs.geometry, inputs.visual_index if inputs.all_visual_index is None else inputs.all_visual_index
    others = op.Range(0, g.others.count(op), 1)  # [T]
    before = op.Sub(visual, op.Range(0, g.visual + g.other_images, 1))  # [B, Nv]
    passed = op.LessOrEqual(op.Unsqueeze(before, [1]), op.Unsqueeze(others, [1]))  # [B, T, Nv]
    count = op.ReduceSum(op.Cast(passed, to=FLOAT), [2], keepdims=0)
    return op.Add(op.Cast(count, to=ir.DataType.INT64), others)


def gather_columns(op: Op, values: ir.Value, columns: ir.Value) -> ir.Value:
    """Columns ``columns[B, n]`` of ``values[B, S]``: [B, n]."""
    return op.GatherElements(values, columns, axis=1)


def mask_softmax(op: Op, logits: ir.Value, allowed: ir.Value) -> ir.Value:
    """Softmax over the last axis of ``logits`` where ``allowed`` (bool, broadcast), 0 elsewhere; finite even where nothing is allowed."""
    return op.Softmax(op.Where(allowed, logits, LOWEST), axis=-1)


def _attend(op: Op, inputs: StageInputs, layer: int, rows: ir.Value, count: int | Length) -> ir.Value:
    """Mean over heads of the attention of rows ``rows[B, n]`` to all rows: [B, n, S] float32; ``count`` is n."""
    g = inputs.geometry
    query = gather_visual(op, inputs.taps[Tap("q_rotary", layer)], op.Unsqueeze(rows, [2]))  # [B, n, H, d]
    query = op.Mul(op.Transpose(query, perm=[0, 2, 1, 3]), g.attention_scale)
    query = op.Reshape(query, [g.batch, g.kv_heads, -1, g.head_size])  # [B, G, H/G * n, d], heads of one kv head side by side
    key = cast_float(op, op.Transpose(inputs.taps[Tap("k_rotary", layer)], perm=[0, 1, 3, 2]))  # [B, G, d, S]
    logits = op.Reshape(op.MatMul(query, key), sizes(op, g.batch, g.heads, count, g.length))
    if g.softcap:
        logits = op.Mul(op.Tanh(op.Div(logits, g.softcap)), g.softcap)
    visible = op.And(_see(op, inputs, layer, rows), op.Unsqueeze(inputs.real, [1]))
    return op.ReduceMean(mask_softmax(op, logits, op.Unsqueeze(visible, [1])), [1], keepdims=0)


def _see(op: Op, inputs: StageInputs, layer: int, rows: ir.Value) -> ir.Value:
    """Which rows each of ``rows[B, n]`` sees in ``layer``: [B, n, S]."""
    sight, places = inputs.sights.of(layer), inputs.places
    if sight.causal or places is None:
        return op.LessOrEqual(op.Range(0, inputs.geometry.length.count(op), 1), op.Unsqueeze(rows, [2]))
    block = None if places.block is None else gather_columns(op, places.block, rows)
    return see(op, sight, Places(gather_columns(op, places.row, rows), block), places)
