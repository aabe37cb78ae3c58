"""Write Attention out as products and a softmax where TensorRT has no kernel for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_ir as ir

from sievert.graph_passes.lowering.attention import AttentionForm, read_attention, refuse_decomposition, refuse_kernel, refuse_request
from sievert.graph_passes.lowering.rewrite import Rewriter
from sievert.graph_passes.op import FLOAT, Op, cast_float

_LOWEST: Final = float(np.finfo(np.float32).min)


@dataclass(frozen=True)
class DecomposeAttention(ir.passes.InPlacePass):
    """Write out attention that has no fused kernel, in float32; grouped heads are rows of one product, keys are never repeated.

    Before::

        q[B, H, S, d], k[B, G, T, d], v[B, G, T, d], mask -> Attention -> [B, H, S, d]

    After::

        q * scale -> [B, G, H/G * S, d] -> MatMul k^T -> (cap) -> Where(mask) -> Softmax -> MatMul v -> [B, H, S, d]

    Scores are capped before they are masked, as ONNX Runtime does it. Operators that cannot be written out (a cache inside, 3-D operands)
    stay; lint names them.
    """

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """``modified`` when an operator was written out."""
        rewriter, masks = Rewriter(model.graph, "lower.attention"), _Masks()
        for node, form, _ in _find_refused(model):
            rewriter.replace(node, _write_attention(rewriter.op, node, form, masks))
        return ir.passes.PassResult(model, modified=rewriter.apply())

    def ensures(self, model: ir.Model) -> None:
        """No operator is left that TensorRT refuses and that could be written out.

        Raises:
            PostconditionError: one is.
        """
        for node, _, reason in _find_refused(model):
            raise ir.passes.PostconditionError(f"Attention node {node.name!r} was left though TensorRT refuses it: {reason}")


def _find_refused(model: ir.Model) -> Iterator[tuple[ir.Node, AttentionForm, str]]:
    """Operators TensorRT refuses and that can be written out, with the reason it refuses."""
    for node in model.graph:
        if (form := read_attention(node)) is not None:
            reason = refuse_kernel(form) or refuse_request(form)
            if reason and refuse_decomposition(node, form) is None:
                yield node, form, reason


@dataclass(frozen=True)
class _Rows:
    """Numbers of rows that vary, by name, with a value ``[B, H, n, d]`` that has them."""

    of: Mapping[int | str, ir.Value | None]

    def count(self, op: Op, axis: int | str) -> int | ir.Value:
        """The number: an int64 scalar where it varies."""
        return axis if isinstance(axis, int) else op.Squeeze(op.Shape(self.of[axis], start=2, end=3), [0])

    def shape(self, op: Op, *axes: int | str) -> list[int] | ir.Value:
        """A shape for Reshape: at most one that varies is left for it to work out."""
        varying = [axis for axis in axes if isinstance(axis, str)]
        if len(varying) + (-1 in axes) < 2:
            return [axis if isinstance(axis, int) else -1 for axis in axes]
        parts = [[axis] if isinstance(axis, int) else op.Shape(self.of[axis], start=2, end=3) for axis in axes]
        return op.Concat(*parts, axis=0)


class _Masks:
    """Masks in the shapes their layers need, each built once: layers come in the graph's order, so the first one's serves the rest."""

    def __init__(self) -> None:
        self._made: dict[tuple[ir.Value | None, tuple[int | str, ...]], ir.Value] = {}

    def fit(self, op: Op, mask: ir.Value | None, shape: tuple[int | str, ...], rows: _Rows) -> ir.Value:
        """``mask`` in ``shape``, additive ones in float32; None is the causal mask, whose last two axes are query and key."""
        if (mask, shape) not in self._made:
            if mask is None:
                # Made from a counter in the graph: as a constant it would weigh S * S bytes.
                counter = op.Range(0, rows.count(op, shape[-1]), 1)
                made = op.LessOrEqual(op.Unsqueeze(counter, [0]), op.Unsqueeze(counter, [1]))  # [S, T]
            else:
                made = mask if mask.dtype == ir.DataType.BOOL else cast_float(op, mask)
            if mask is None or [str(axis) for axis in mask.shape or ()] != [str(axis) for axis in shape]:
                made = op.Reshape(made, rows.shape(op, *shape))
            self._made[mask, shape] = made
        return self._made[mask, shape]


def _write_attention(op: Op, node: ir.Node, form: AttentionForm, masks: _Masks) -> ir.Value:
    b, h, g, s, d = form.batch, form.heads, form.kv_heads, form.query, form.head_size
    rows = _Rows({form.query: node.inputs[0], form.keys: node.inputs[1]})
    q, k, v = (cast_float(op, value) for value in node.inputs[:3] if value is not None)
    scale = d**-0.5 if form.scale is None else form.scale
    q = op.Reshape(op.Mul(q, scale), [b, g, h // g * s if isinstance(s, int) else -1, d])
    scores = op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2]))  # [B, G, H/G * S, T]
    if form.softcap:
        scores = op.Mul(op.Tanh(op.Div(scores, form.softcap)), form.softcap)
    weights = op.Softmax(_mask_scores(op, scores, form, masks, rows), axis=-1)
    attended = op.Reshape(op.MatMul(weights, v), rows.shape(op, b, h, s, form.value_size))
    return attended if form.dtype == FLOAT else op.Cast(attended, to=form.dtype)


def _mask_scores(op: Op, scores: ir.Value, form: AttentionForm, masks: _Masks, rows: _Rows) -> ir.Value:
    """``scores[B, G, H/G * S, T]`` with the lowest float where a key may not be seen, or plus the additive mask."""
    b, g, s, t = form.batch, form.kv_heads, form.query, form.keys
    group = form.heads // g
    wanted: list[tuple[ir.Value | None, tuple[int | str, ...]]] = []  # with their shapes filled up to [B, H, S, T], each axis full or 1
    if form.mask is not None:
        wanted.append((form.mask, (1,) * (4 - len(form.mask_shape)) + form.mask_shape))
    if form.causal:
        wanted.append((None, (1, 1, s, t)))
    # A mask alike for all heads and queries fits the rows as they are; any other needs the heads of a group on their own axis.
    apart = group > 1 and any(shape[1:3] != (1, 1) for _, shape in wanted)
    if apart:
        scores = op.Reshape(scores, rows.shape(op, b, g, group, s, t))
    for mask, shape in wanted:
        heads: tuple[int | str, ...] = ((1, 1) if shape[1] == 1 else (g, group)) if apart else shape[1:2]
        fitting = masks.fit(op, mask, (shape[0], *heads, *shape[2:]), rows)
        scores = op.Where(fitting, scores, _LOWEST) if fitting.dtype == ir.DataType.BOOL else op.Add(scores, fitting)
    # Of the two that may vary the keys are read off, the queries are what is left.
    return op.Reshape(scores, rows.shape(op, b, g, group * s if isinstance(s, int) else -1, t)) if apart else scores
