"""PyramidDrop (arXiv 2410.17247): what the last token of the prompt would attend to, recomputed at each of several cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.attention import attend_last
from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs, Tap
from sievert.graph_passes.selectors.rank import take_best


@dataclass(frozen=True)
class PyramidDrop(Selector):
    """One TopK of one row of the map that the layer after the cut would compute. No options."""

    name: ClassVar[str] = "pyramiddrop"

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:  # noqa: ARG002 (every layer alike)
        """Query and key of the layer that is cut before, as its attention multiplies them."""
        return Tap("q_rotary", layer), Tap("k_rotary", layer)

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the row's attention probabilities, the mean over heads; the order is theirs."""
        scores = attend_last(build.op, inputs, inputs.geometry.layer)
        return Selection(take_best(build.op, scores, inputs.geometry.keep), scores, {})
