"""Which rows of a sequence are what, and which survive a cut: index arithmetic of the splice. Of all sizes S alone may vary.

Every function takes the op builder and values, and returns values; dimensions are those of the graphs' contract (B, S, Nv, K).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import onnx_ir as ir

from sievert.graph_passes.lengths import Length, sizes
from sievert.graph_passes.op import Op
from sievert.graph_passes.sight import TwoWay


@dataclass(frozen=True)
class Rows:
    """The sequence that enters a stage. ``length`` is S, ``visual`` is Nv; all values are int64 or bool.

    ``visual_index[B, Nv]`` ascending rows of this sequence, ``original_visual[B, Nv]`` the same tokens counted among the
    model's visual tokens, ``original_row[B, S]`` rows of the unpruned sequence, ``position_ids[B, S]`` or ``[A, B, S]`` of
    ``position_axes`` A, ``is_visual[B, S]``, ``text[B, S]`` real text after the first visual token, ``all_text[B, S]`` all real text,
    ``real[B, S]`` all but padding; ``carried`` float32 values ``[B, S]`` that selectors left. ``block[B, S]`` numbers the tokens that see
    one another both ways, -1 for others; None in models without. ``first_position`` is the position of row 0.
    """

    batch: int
    length: Length
    visual: int
    visual_index: ir.Value
    original_visual: ir.Value
    original_row: ir.Value
    position_ids: ir.Value
    position_axes: int
    is_visual: ir.Value
    text: ir.Value
    all_text: ir.Value
    real: ir.Value
    carried: Mapping[str, ir.Value]
    block: ir.Value | None = None
    first_position: int = 0


@dataclass(frozen=True)
class Cut:
    """The outcome of a stage: the rows that go on, where they came from, and the kept tokens' rows of the original sequence ``[B, K]``."""

    rows: Rows
    source: ir.Value  # [B, S'] int64: row of the stage's sequence each row of the next one comes from
    kept_index: ir.Value


def describe_rows(
    op: Op,
    *,
    batch: int,
    length: Length,
    visual: int,
    attention_mask: ir.Value,
    visual_index: ir.Value,
    position_ids: ir.Value,
    position_axes: int = 1,
    first_position: int = 0,
    two_way: TwoWay = "none",
) -> Rows:
    """The unpruned sequence, from prefill's inputs."""
    counter = _make_counter(op, length)  # [1, S]
    is_visual = op.Greater(_scatter_ones(op, op.Expand([0], sizes(op, batch, length)), visual_index, (batch, visual)), 0)
    real = op.Greater(attention_mask, 0)  # [B, S]
    all_text = op.And(real, op.Not(is_visual))
    first = op.Slice(visual_index, [0], [1], [1])  # [B, 1]
    text = op.And(all_text, op.Greater(counter, first))
    return Rows(
        batch=batch,
        length=length,
        visual=visual,
        visual_index=visual_index,
        original_visual=op.Expand(_make_counter(op, visual), [batch, visual]),
        original_row=op.Expand(counter, sizes(op, batch, length)),
        position_ids=position_ids,
        position_axes=position_axes,
        is_visual=is_visual,
        text=text,
        all_text=all_text,
        real=real,
        carried={},
        block=_number_blocks(op, is_visual, real, two_way),
        first_position=first_position,
    )


def cut_rows(op: Op, rows: Rows, order: ir.Value, keep: int, *, compact: bool, carried: Mapping[str, ir.Value]) -> Cut:
    """Drop every visual token but those at places ``order[B, K]``; text and padding stay, everything in its old order."""
    batch, length, visual = rows.batch, rows.length, rows.visual
    after = length.less(visual - keep)
    no_places = op.Expand([0], [batch, visual])
    taken = _scatter_ones(op, no_places, order, (batch, keep))  # [B, Nv]
    places = _order_kept_first(op, taken, (batch, visual), keep)[0]  # [B, K] ascending
    kept = op.GatherElements(rows.visual_index, places, axis=1)  # [B, K] rows of this sequence
    stays = _scatter_ones(op, op.Cast(op.Not(rows.is_visual), to=ir.DataType.INT64), kept, (batch, keep))  # [B, S]
    source, slot = _order_kept_first(op, stays, (batch, length), after)
    position_ids = gather_positions(op, rows, source, (batch, after))
    if compact:
        first = rows.first_position
        numbers = op.Unsqueeze(op.Range(first, after.less(-first).count(op), 1), [0])
        position_ids = op.Expand(numbers, sizes(op, batch, after))
    position_ids.shape = ir.Shape([*([rows.position_axes] if rows.position_axes > 1 else ()), batch, after.axis])
    following = replace(
        rows,
        length=after,
        visual=keep,
        visual_index=op.GatherElements(slot, kept, axis=1),
        original_visual=op.GatherElements(rows.original_visual, places, axis=1),
        original_row=op.GatherElements(rows.original_row, source, axis=1),
        position_ids=position_ids,
        is_visual=_gather_flags(op, rows.is_visual, source),
        text=_gather_flags(op, rows.text, source),
        all_text=_gather_flags(op, rows.all_text, source),
        real=_gather_flags(op, rows.real, source),
        carried={name: op.GatherElements(value, source, axis=1) for name, value in {**rows.carried, **carried}.items()},
        block=None if rows.block is None else op.GatherElements(rows.block, source, axis=1),
    )
    return Cut(following, source, op.GatherElements(rows.original_row, kept, axis=1))


def _number_blocks(op: Op, is_visual: ir.Value, real: ir.Value, two_way: str) -> ir.Value | None:
    """``block[B, S]`` int64. An image is a run of visual tokens: as many words stand before each of them."""
    int64 = ir.DataType.INT64
    if two_way == "none":
        return None
    if two_way == "prompt":
        return op.Sub(op.Cast(real, to=int64), 1)
    words = op.CumSum(op.Cast(op.Not(is_visual), to=int64), 1)
    return op.Where(is_visual, words, -1)


def gather_positions(op: Op, rows: Rows, source: ir.Value, shape: tuple[int, int | Length]) -> ir.Value:
    """Positions of the rows ``source`` of ``shape`` ``[B, n]``, each with all its axes: ``[B, n]`` or ``[A, B, n]``."""
    axes = rows.position_axes
    index = source if axes == 1 else op.Expand(source, sizes(op, axes, *shape))
    return op.GatherElements(rows.position_ids, index, axis=1 if axes == 1 else 2)


def _order_kept_first(op: Op, flags: ir.Value, shape: tuple[int, int | Length], count: int | Length) -> tuple[ir.Value, ir.Value]:
    """Stable partition of n columns by ``flags[B, n]`` (int64, ``count`` ones a row).

    Returns the first ``count`` columns of the partition ``[B, count]``, and each column's slot ``[B, n]``. A permutation is scattered, as
    long as the data: TensorRT refuses indices longer than the data, and no sort or TopK limits n.
    """
    counter = _make_counter(op, shape[1])  # [1, n]
    ones_so_far = op.CumSum(flags, 1)  # [B, n]
    zeros_so_far = op.Sub(op.Add(counter, 1), ones_so_far)
    slot = op.Sub(op.Where(op.Greater(flags, 0), ones_so_far, op.Add(zeros_so_far, _number(op, count))), 1)
    spread = op.Expand(counter, sizes(op, *shape))
    columns = op.ScatterElements(spread, slot, spread, axis=1)
    return op.Slice(columns, [0], sizes(op, count), [1]), slot


def _scatter_ones(op: Op, data: ir.Value, index: ir.Value, shape: tuple[int, int]) -> ir.Value:
    """``data[B, n]`` int64 with ones at the columns ``index`` of ``shape``."""
    return op.ScatterElements(data, index, op.Expand([1], list(shape)), axis=1)


def _gather_flags(op: Op, flags: ir.Value, source: ir.Value) -> ir.Value:
    # Through int64: full TensorRT documents no GatherElements of booleans.
    return op.Greater(op.GatherElements(op.Cast(flags, to=ir.DataType.INT64), source, axis=1), 0)


def _make_counter(op: Op, length: int | Length) -> ir.Value:
    """0..n-1 as ``[1, n]`` int64."""
    return op.Unsqueeze(op.Range(0, _number(op, length), 1), [0])


def _number(op: Op, count: int | Length) -> int | ir.Value:
    return count.count(op) if isinstance(count, Length) else count
