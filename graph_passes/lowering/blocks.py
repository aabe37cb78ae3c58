"""Causal attention in blocks of queries, for engines whose kernel computes what the mask then hides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import onnx_ir as ir

from sievert.bundle.specs import size_axis
from sievert.graph_passes.lowering.attention import AttentionForm, read_attention, read_options
from sievert.graph_passes.lowering.rewrite import Rewriter
from sievert.graph_passes.op import Op

_ROUND: Final = 8
Bound = int | ir.Value


@dataclass(frozen=True)
class SplitCausalAttention(ir.passes.InPlacePass):
    """Let each block of queries see only the keys up to its own end: of n blocks, n + 1 of 2n parts of the work are left.

    Before::

        q[B, H, S, d], k[B, G, S, d], v[B, G, S, d] -> Attention<is_causal> -> [B, H, S, d]

    After::

        q[.., a:b, :], k[.., :b, :], v[.., :b, :], mask[b - a, b] -> Attention -+
        ...                                                                    +-> Concat -> [B, H, S, d]

    ONNX Runtime 1.31 on the CPU computes all S x S scores of a causal operator. In processor time of one thread, 14 query and 2 kv heads
    of 64, S = 616: 17.7 ms whole; 13.9, 11.9, 11.2 and 10.5 ms in 2, 4, 6 and 10 blocks. Blocks have about ``rows`` rows or more, and
    there are at most ``most``: each one copies the keys it sees. Where S varies with the prompts, there are as many as suit the shortest,
    and their bounds are computed.
    """

    rows: int = 64
    most: int = 12

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when an operator was split."""
        rewriter, shared = Rewriter(model.graph, "lower.blocks"), _Shared()
        shortest = _find_shortest(model.graph)
        for node in model.graph:
            form = read_attention(node)
            if form is not None and self._splits(node, form, shortest):
                rewriter.replace(node, self._split(rewriter.op, node, form.query, shortest, shared))
        return ir.passes.PassResult(model, modified=rewriter.apply())

    def _splits(self, node: ir.Node, form: AttentionForm, shortest: int) -> bool:
        """Whether the operator is causal over fresh keys and nothing else, and long enough for two blocks."""
        alone = all(value is None for value in node.inputs[3:]) and len(node.outputs) == 1 and not form.flat
        least = size_axis(form.query, shortest)
        return alone and form.causal and form.query == form.keys and isinstance(least, int) and least >= 2 * self.rows

    def _split(self, op: Op, node: ir.Node, length: int | str, shortest: int, shared: _Shared) -> ir.Value:
        options = read_options(node)
        query, key, value = node.inputs[:3]
        if length not in shared.bounds:
            fixed = self._blocks(int(size_axis(length, shortest)))
            shared.bounds[length] = fixed if isinstance(length, int) else _share_rows(op, query, len(fixed))
        parts, masks = [], shared.masks
        for start, end in shared.bounds[length]:
            part, keys, values = (
                op.Slice(each, _list(op, first), _list(op, end), [2]) for each, first in ((query, start), (key, 0), (value, 0))
            )
            if (start, end) not in masks:
                rows, columns = op.Unsqueeze(op.Range(start, end, 1), [1]), op.Unsqueeze(op.Range(0, end, 1), [0])
                masks[start, end] = op.LessOrEqual(columns, rows)  # [b - a, b]
            parts.append(op.Attention(part, keys, values, masks[start, end], **options))
        return op.Concat(*parts, axis=2)

    def _blocks(self, length: int) -> list[tuple[int, int]]:
        """First and last row + 1 of each block; all are equal but for the last, which may be shorter."""
        rows = -(-length // min(self.most, length // self.rows))
        rows = -(-rows // _ROUND) * _ROUND
        return [(start, min(length, start + rows)) for start in range(0, length, rows)]


@dataclass
class _Shared:
    """What layers of one length have in common: their blocks, first row and last row + 1, and a mask for each."""

    bounds: dict[int | str, Sequence[tuple[Bound, Bound]]] = field(default_factory=dict)
    masks: dict[tuple[Bound, Bound], ir.Value] = field(default_factory=dict)


def _share_rows(op: Op, query: ir.Value | None, count: int) -> list[tuple[Bound, Bound]]:
    """First and last row + 1 of each of ``count`` blocks of ``query[B, H, S, d]``, where S is known when the graph runs."""
    length = op.Squeeze(op.Shape(query, start=2, end=3), [0])
    bounds: list[Bound] = [0, *(op.Div(op.Mul(length, block), count) for block in range(1, count)), length]
    return list(pairwise(bounds))


def _list(op: Op, bound: Bound) -> list[int] | ir.Value:
    return [bound] if isinstance(bound, int) else op.Unsqueeze(bound, [0])


def _find_shortest(graph: ir.Graph) -> int:
    """How many tokens a prompt has at least, where their number varies: those of its images, ``visual_index[B, Nv]``."""
    for value in graph.inputs:
        if value.name == "visual_index" and value.shape is not None and isinstance(value.shape[1], int):
            return value.shape[1]
    return 0
