"""DivPrune (arXiv 2503.02175): the tokens that stand farthest apart, taken one by one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.op import Op, gather_rows, take_outputs
from sievert.graph_passes.selectors.base import Selection, Selector, StageGeometry, StageInputs
from sievert.graph_passes.selectors.cosine import multiply_rows, normalise_rows


@dataclass(frozen=True)
class DivPrune(Selector):
    """Max-min diversity of the input embeddings by 1 - cosine, unrolled: K steps of three nodes each. No options."""

    name: ClassVar[str] = "divprune"

    def largest_topk(self, visual: int, keep: int) -> int:  # noqa: ARG002 (whatever is kept)
        """1: one token a step."""
        return 1

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the distances to the nearest neighbour, 0 for a single token."""
        op: Op = build.op
        g = inputs.geometry
        if g.visual == 1:  # without a neighbour
            return Selection(op.Expand(0, [g.batch, 1]), op.Expand(0.0, [g.batch, 1]), {})
        directions = normalise_rows(op, gather_rows(op, inputs.inputs_embeds, inputs.visual_index))  # [B, Nv, D]
        distances = op.Sub(1.0, multiply_rows(op, directions, directions))  # [B, Nv, Nv], 0 to 2
        itself = op.Expand(build.initializer(ir.tensor(np.arange(g.visual).reshape(1, -1, 1)), name="itself"), [g.batch, g.visual, 1])
        nearest = op.ReduceMin(_set_diagonal(op, g, distances, itself, 4.0), [2], keepdims=0)  # [B, Nv]
        # A taken token is below every distance from its own step on: its row says so, and Min never forgets it.
        rows = _set_diagonal(op, g, distances, itself, -1.0)
        left = op.Unsqueeze(nearest, [1])  # [B, 1, Nv]
        taken: list[ir.Value] = []
        for step in range(g.keep):
            build.push_module(f"step.{step}")
            taken.append(take_outputs(op.TopK(left, [1], axis=2, largest=1, sorted=1, _outputs=2))[1])  # [B, 1, 1]
            if step + 1 < g.keep:
                row = op.GatherND(rows, taken[-1], batch_dims=1)  # [B, 1, Nv]
                left = row if step == 0 else op.Min(left, row)
            build.pop_module()
        return Selection(op.Reshape(op.Concat(*taken, axis=1), [g.batch, g.keep]), nearest, {})


def _set_diagonal(op: Op, g: StageGeometry, square: ir.Value, itself: ir.Value, value: float) -> ir.Value:
    """``square[B, Nv, Nv]`` with ``value`` where a token meets itself."""
    # Scattered: an identity matrix would be a constant of 1 MiB and more.
    return op.ScatterElements(square, itself, op.Expand(value, [g.batch, g.visual, 1]), axis=2)
