"""SparseVLM (arXiv 2410.04417, the second version's rule): what the text tokens that speak of the image attend to.

Those tokens, the raters, are found once, on the input embeddings, and carried from cut to cut. Merging of dropped tokens is left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, Literal

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.graph_passes.lengths import sizes
from sievert.graph_passes.op import FLOAT, Op, cast_float, gather_rows
from sievert.graph_passes.selectors.attention import attend_mean, gather_columns, mask_softmax, other_rows
from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs, Tap
from sievert.graph_passes.selectors.options import choice
from sievert.graph_passes.selectors.rank import take_best

RATERS: Final = "raters"


@dataclass(frozen=True)
class SparseVlm(Selector):
    """One TopK of the raters' mean attention in the layer after the cut; ``text``: which tokens may rate."""

    text: Literal["after_image", "all"] = choice("after_image", "all")

    name: ClassVar[str] = "sparsevlm"

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:  # noqa: ARG002 (every layer alike)
        """Query and key of the layer that is cut before, as its attention multiplies them."""
        return Tap("q_rotary", layer), Tap("k_rotary", layer)

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are attention probabilities, the mean over raters and heads; ``raters[B, S]`` (0 or 1) go on to later stages."""
        g = inputs.geometry
        build.push_module("raters")
        raters = inputs.carried[RATERS] if RATERS in inputs.carried else self._find_raters(build.op, inputs)
        build.pop_module()
        scores = attend_mean(build.op, inputs, g.layer, raters)
        return Selection(take_best(build.op, scores, g.keep), scores, {RATERS: raters})

    def _find_raters(self, op: Op, inputs: StageInputs) -> ir.Value:
        """1 at text rows whose share of the visual tokens' similarity is above the text's mean, else at all text rows: [B, S] float32."""
        g = inputs.geometry
        rows = other_rows(op, inputs)  # [B, T]
        text = op.Cast(inputs.text if self.text == "after_image" else inputs.all_text, to=FLOAT)  # [B, S]
        text = gather_columns(op, text, rows)  # [B, T]
        visual, words = (cast_float(op, gather_rows(op, inputs.inputs_embeds, index)) for index in (inputs.visual_index, rows))
        is_text = op.Greater(text, 0.0)
        similarity = op.MatMul(visual, op.Transpose(words, perm=[0, 2, 1]))  # [B, Nv, T]
        share = op.ReduceMean(mask_softmax(op, similarity, op.Unsqueeze(is_text, [1])), [1], keepdims=0)  # [B, T]
        count = op.Max(op.ReduceSum(text, [1], keepdims=1), 1.0)
        mean = op.Div(op.ReduceSum(op.Mul(share, text), [1], keepdims=1), count)
        above = op.Mul(op.Cast(op.Greater(share, mean), to=FLOAT), text)
        some = op.ReduceMax(above, [1], keepdims=1)  # a single text token is not above its own mean
        raters = op.Max(above, op.Mul(text, op.Sub(1.0, some)))
        return op.ScatterElements(op.Expand(0.0, sizes(op, g.batch, g.length)), rows, raters, axis=1)
