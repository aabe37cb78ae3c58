"""VisionZip, dominant part (arXiv 2412.04467): keep the patches that the vision encoder's own summary attends to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from onnxscript import GraphBuilder

from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs, VisionTap
from sievert.graph_passes.selectors.options import choice
from sievert.graph_passes.selectors.rank import take_best


@dataclass(frozen=True)
class VisionZip(Selector):
    """Scores are taken from the encoder's second-last layer. The paper's second part, which merges what is left, is not here.

    ``queries``: the class token's row where the encoder has one and else the mean over all rows (``auto``), or always one of them.
    """

    queries: Literal["auto", "class_token", "mean"] = choice("auto", "class_token", "mean")

    name: ClassVar[str] = "visionzip"

    @property
    def vision_tap(self) -> VisionTap:
        """The encoder's second-last layer."""
        return VisionTap("second_last", self.queries)

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the encoder's, the order is theirs."""
        scores = inputs.require_visual_scores()  # [B, Nv]
        return Selection(take_best(build.op, scores, inputs.geometry.keep), scores, {})
