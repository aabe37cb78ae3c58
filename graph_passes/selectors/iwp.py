"""IWP, implicit weight pruning (arXiv 2604.00757): keep tokens whose weight updates are large toward the question and not duplicated.

Softmax attention is a linear layer whose hidden weight is a sum of rank-1 updates, one per token. The magnitude of a visual token's
update, seen from the mean text query, ranks it; tokens are taken in growing chunks, each of which lowers the rank of what resembles it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.op import Op, gather_rows, take_outputs
from sievert.graph_passes.selectors.base import Selection, Selector, StageGeometry, StageInputs, Tap
from sievert.graph_passes.selectors.options import choice, flag, number
from sievert.graph_passes.selectors.rank import TINY, gather_visual, limit_topk, mean_text, take_best


@dataclass(frozen=True)
class Iwp(Selector):
    """The paper's selector; every field is an option.

    ``first_chunk`` and ``growth`` size the chunks; ``strength`` and ``floor`` shape the penalty of what resembles the newest chunk (with
    strength 0 there is none, and the graph is a plain TopK of the magnitude). ``head_norm``: one maximum over all heads subtracted before
    exp (exact), or a softmax of each head over the visual tokens. ``scaling``: how the magnitude comes to [0, 1]. ``text``: whose queries
    count. ``duplication``: how the similarities of the kv heads become one. The last two are the paper's ablations of rotary embedding.
    """

    first_chunk: int = number(2, at_least=1)
    growth: int = number(2, at_least=1)
    strength: float = number(5.0, at_least=0.0)
    floor: float = number(0.01, above=0.0, at_most=1.0)
    head_norm: Literal["global", "softmax"] = choice("global", "softmax")
    scaling: Literal["minmax", "max"] = choice("minmax", "max")
    text: Literal["after_image", "all"] = choice("after_image", "all")
    duplication: Literal["mean_of_squares", "square_of_mean"] = choice("mean_of_squares", "square_of_mean")
    magnitude_rotary: bool = flag(False)
    duplication_rotary: bool = flag(True)

    name: ClassVar[str] = "iwp"

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:  # noqa: ARG002 (every layer alike)
        """q, k and v of the layer that is cut before, with and without rotary as the options ask."""
        rotary = [self.magnitude_rotary] + [self.duplication_rotary] * (self.strength > 0)
        return (
            Tap("q_rotary" if self.magnitude_rotary else "q", layer),
            *(Tap("k_rotary" if turned else "k", layer) for turned in sorted(set(rotary))),
            Tap("v", layer),
        )

    def chunks(self, keep: int) -> tuple[int, ...]:
        """How many tokens each round takes; their sum is ``keep``. Known when the graph is built, so the rounds are unrolled."""
        if self.strength == 0:
            return (keep,)
        sizes: list[int] = []
        size = self.first_chunk
        while (left := keep - sum(sizes)) > 0:
            sizes.append(min(size, left))
            size *= self.growth
        return tuple(sizes)

    def largest_topk(self, visual: int, keep: int) -> int:  # noqa: ARG002 (no TopK over all tokens)
        """The largest chunk that is taken by a TopK."""
        return max(limit_topk(size) for size in self.chunks(keep))

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the scaled magnitudes; the order is that of the rounds."""
        op: Op = build.op
        g = inputs.geometry
        build.push_module("magnitude")
        rows = op.Unsqueeze(inputs.visual_index, [2])  # [B, Nv, 1]
        values = gather_visual(op, inputs.taps[Tap("v", g.layer)], rows)  # [B, Nv, G, d]
        keys = self._gather_keys(op, inputs, rows, self.magnitude_rotary)  # [B, Nv, G, d]
        norms = op.ReduceL2(values, [3], keepdims=1)  # [B, Nv, G, 1]
        scores = self._scale_scores(op, self._measure_magnitude(op, inputs, keys, norms))  # [B, Nv]
        build.pop_module()
        chunks = self.chunks(g.keep)
        if len(chunks) == 1:
            return Selection(take_best(op, scores, g.keep), scores, {})
        build.push_module("duplication")
        if self.duplication_rotary != self.magnitude_rotary:
            keys = self._gather_keys(op, inputs, rows, self.duplication_rotary)
        points, columns = _embed_tokens(op, g, op.Div(values, op.Max(norms, TINY)), keys)
        build.pop_module()
        return Selection(self._take_chunks(build, g, scores, points, columns), scores, {})

    def _gather_keys(self, op: Op, inputs: StageInputs, rows: ir.Value, rotary: bool) -> ir.Value:
        return gather_visual(op, inputs.taps[Tap("k_rotary" if rotary else "k", inputs.geometry.layer)], rows)

    def _measure_magnitude(self, op: Op, inputs: StageInputs, keys: ir.Value, norms: ir.Value) -> ir.Value:
        """Sum over query heads of exp(mean query . key) * ||value||: [B, Nv], up to a factor that the scaling removes."""
        g = inputs.geometry
        query = inputs.taps[Tap("q_rotary" if self.magnitude_rotary else "q", g.layer)]
        query = mean_text(op, query, inputs.text if self.text == "after_image" else inputs.all_text)  # [B, H, 1, d]
        query = op.Mul(op.Reshape(query, [g.batch, g.kv_heads, g.heads // g.kv_heads, g.head_size]), g.attention_scale)
        logits = op.MatMul(query, op.Transpose(keys, perm=[0, 2, 3, 1]))  # [B, G, H/G, Nv]
        if self.head_norm == "softmax":
            weights = op.Softmax(logits, axis=-1)
        else:
            # One maximum for all heads: a factor that the scaling removes. One for each head would weigh the heads anew.
            weights = op.Exp(op.Sub(logits, op.ReduceMax(logits, [1, 2, 3], keepdims=1)))
        return op.ReduceSum(op.Mul(weights, op.Transpose(norms, perm=[0, 2, 3, 1])), [1, 2], keepdims=0)

    def _scale_scores(self, op: Op, scores: ir.Value) -> ir.Value:
        """``scores[B, Nv]`` to [0, 1]; all equal (or a single one) gives zeros under minmax."""
        top = op.ReduceMax(scores, [1], keepdims=1)  # [B, 1]
        if self.scaling == "max":
            return op.Div(scores, op.Max(top, TINY))
        bottom = op.ReduceMin(scores, [1], keepdims=1)
        # The method guards with 1e-12 * max, which is below float32 resolution: two scores are equal or differ by more.
        return op.Div(op.Sub(scores, bottom), op.Max(op.Sub(top, bottom), TINY))

    def _take_chunks(self, build: GraphBuilder, g: StageGeometry, scores: ir.Value, points: ir.Value, columns: ir.Value) -> ir.Value:
        """Chunk by chunk the best that are left, each chunk penalising what resembles it: order [B, K]."""
        op: Op = build.op
        chunks = self.chunks(g.keep)
        newest = order = take_best(op, scores, chunks[0])  # [B, b]
        for done, size in enumerate(chunks[1:], start=1):
            build.push_module(f"round.{done}")
            similarity = _compare_chunk(op, newest, points, columns)  # [B, G, b, Nv]
            scores = op.Mul(scores, self._penalise(op, g, similarity))  # [B, Nv]
            # Marked anew each round: a mark left in the scores would shrink with them.
            marks = op.Expand(-1.0, [g.batch, sum(chunks[:done])])
            newest = take_best(op, op.ScatterElements(scores, order, marks, axis=1), size)
            order = op.Concat(order, newest, axis=1)  # [B, b + ...]
            build.pop_module()
        return order

    def _penalise(self, op: Op, g: StageGeometry, similarity: ir.Value) -> ir.Value:
        """max(floor, 1 - strength * the highest joint similarity to the chunk) of ``similarity[B, G, b, Nv]``: [B, Nv]."""
        if self.duplication == "mean_of_squares":
            squares = op.ReduceSumSquare(similarity, [1], keepdims=0)  # [B, b, Nv], G times the mean
            share = self.strength / g.kv_heads
        else:
            total = op.ReduceSum(similarity, [1], keepdims=0)
            squares, share = op.Mul(total, total), self.strength / g.kv_heads**2
        return op.Max(op.Sub(1.0, op.Mul(op.ReduceMax(squares, [1], keepdims=0), share)), self.floor)


def _embed_tokens(op: Op, g: StageGeometry, directions: ir.Value, keys: ir.Value) -> tuple[ir.Value, ir.Value]:
    """Points ``[B, Nv, 2G, d+2]`` and columns ``[B, 2G, d+2, Nv]`` whose products are cosines (first G) and -distance^2 / 2 (last G).

    With h = ||k||^2 / 2, (k, -h, 1) . (k, 1, -h) = -||k_i - k_j||^2 / 2: a round then needs one gather and one product.
    ``directions`` are unit values, ``keys`` both ``[B, Nv, G, d]``.
    """
    # Distances do not see a common shift, but their cancellation in float32 does: key biases of some models are in the hundreds.
    centred = op.Sub(keys, op.ReduceMean(keys, [1], keepdims=1))
    scaled = op.Mul(centred, g.attention_scale**0.5)
    minus_h = op.Mul(op.ReduceSumSquare(scaled, [3], keepdims=1), -0.5)  # [B, Nv, G, 1]
    values = op.Pad(directions, [0, 2], 0.0, [3])  # [B, Nv, G, d+2]
    points = op.Pad(op.Concat(scaled, minus_h, axis=3), [0, 1], 1.0, [3])
    columns = op.Concat(op.Pad(scaled, [0, 1], 1.0, [3]), minus_h, axis=3)
    return op.Concat(values, points, axis=2), op.Transpose(op.Concat(values, columns, axis=2), perm=[0, 2, 3, 1])


def _compare_chunk(op: Op, newest: ir.Value, points: ir.Value, columns: ir.Value) -> ir.Value:
    """cos(v_i, v_j) * exp(-||k_i - k_j||^2 * scale / 2) of the chunk ``newest[B, b]`` with every token: [B, G, b, Nv]."""
    chunk = op.Transpose(gather_rows(op, points, newest), perm=[0, 2, 1, 3])  # [B, 2G, b, d+2]
    cosines, exponents = take_outputs(op.Split(op.MatMul(chunk, columns), axis=1, num_outputs=2, _outputs=2))
    return op.Mul(cosines, op.Exp(op.Min(exponents, 0.0)))
