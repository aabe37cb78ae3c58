"""CDPruner (arXiv 2506.10967) as OpenVINO reads it: tokens close to the question and far from one another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.op import Op, cast_float, gather_rows, take_outputs
from sievert.graph_passes.selectors.base import Selection, Selector, StageGeometry, StageInputs
from sievert.graph_passes.selectors.cosine import multiply_rows, normalise_rows
from sievert.graph_passes.selectors.options import choice
from sievert.graph_passes.selectors.rank import mean_text

# The reading's own guards: of the scaling of relevance, and of the square root.
SCALING_EPSILON = 1e-6
LEAST_GAIN = 1e-6


@dataclass(frozen=True)
class CdPruner(Selector):
    """Greedy maximum of the determinant of ``r_i cos_ij r_j`` over the input embeddings, unrolled: K steps.

    ``r`` is the scaled cosine to the mean text embedding; ``text``: whose embeddings make the mean.
    """

    text: Literal["after_image", "all"] = choice("after_image", "all")

    name: ClassVar[str] = "cdpruner"

    def largest_topk(self, visual: int, keep: int) -> int:  # noqa: ARG002 (whatever is kept)
        """1: one token a step."""
        return 1

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the kernel's diagonal."""
        op: Op = build.op
        text = inputs.text if self.text == "after_image" else inputs.all_text
        directions = normalise_rows(op, gather_rows(op, inputs.inputs_embeds, inputs.visual_index))  # [B, Nv, D]
        question = mean_text(op, op.Unsqueeze(cast_float(op, inputs.inputs_embeds), [1]), text)  # [B, 1, 1, D]
        question = normalise_rows(op, op.Reshape(question, [inputs.geometry.batch, 1, -1]))
        relevance = _scale_relevance(op, multiply_rows(op, directions, question))  # [B, Nv, 1]
        weighted = op.Mul(directions, relevance)
        kernel = multiply_rows(op, weighted, weighted)  # [B, Nv, Nv]
        scores = op.ReduceSumSquare(weighted, [2], keepdims=0)  # [B, Nv], the diagonal
        return Selection(_take_greedily(build, inputs.geometry, kernel, scores), scores, {})


def _scale_relevance(op: Op, cosines: ir.Value) -> ir.Value:
    """``cosines[B, Nv, 1]`` to 0..1; all equal gives zeros."""
    bottom = op.ReduceMin(cosines, [1], keepdims=1)
    span = op.Sub(op.ReduceMax(cosines, [1], keepdims=1), bottom)
    return op.Div(op.Sub(cosines, bottom), op.Add(span, SCALING_EPSILON))


def _take_greedily(build: GraphBuilder, g: StageGeometry, kernel: ir.Value, scores: ir.Value) -> ir.Value:
    """Greedy MAP, a row of the Cholesky factor a step: order [B, K].

    ``gains[B, 1, Nv]`` is what each token would multiply the determinant by; a taken one stands at -1, where no gain can be.
    """
    op: Op = build.op
    gains = op.Unsqueeze(scores, [1])
    mark = op.Expand(-1.0, [g.batch, 1, 1])
    taken: list[ir.Value] = []
    factor: ir.Value | None = None  # [B, step, Nv]
    for step in range(g.keep):
        build.push_module(f"step.{step}")
        gain, place = take_outputs(op.TopK(gains, [1], axis=2, largest=1, sorted=1, _outputs=2))  # [B, 1, 1] each
        taken.append(place)
        if step + 1 < g.keep:
            row = op.GatherND(kernel, place, batch_dims=1)  # [B, 1, Nv]
            if factor is not None:
                own = op.GatherElements(factor, op.Expand(place, [g.batch, step, 1]), axis=2)  # [B, step, 1]
                row = op.Sub(row, op.MatMul(op.Reshape(own, [g.batch, 1, step]), factor))
            row = op.Div(row, op.Sqrt(op.Max(gain, LEAST_GAIN)))
            # No entry is larger than the root of its token's gain. Held to that, rounding cannot grow where the gains are used up.
            limit = op.Sqrt(op.Max(gains, 0.0))
            row = op.Max(op.Min(row, limit), op.Neg(limit))
            gains = op.ScatterElements(op.Sub(gains, op.Mul(row, row)), place, mark, axis=2)
            factor = row if factor is None else op.Concat(factor, row, axis=1)
        build.pop_module()
    return op.Reshape(op.Concat(*taken, axis=1), [g.batch, g.keep])
