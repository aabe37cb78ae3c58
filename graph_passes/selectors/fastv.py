"""FastV (arXiv 2403.06764): what the last token of the prompt attended to, in the layer before the cut."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Stage
from sievert.bundle.specs import Geometry
from sievert.graph_passes.selectors.attention import attend_last
from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs, Tap
from sievert.graph_passes.selectors.rank import take_best


@dataclass(frozen=True)
class FastV(Selector):
    """One TopK of one row of the map of layer l-1, which has run. No options."""

    name: ClassVar[str] = "fastv"

    def taps(self, layer: int, depth: int, since: int = 0) -> tuple[Tap, ...]:  # noqa: ARG002 (every layer alike)
        """Query and key of the layer before the cut, as its attention multiplied them."""
        return Tap("q_rotary", layer - 1), Tap("k_rotary", layer - 1)

    def check(self, stage: Stage, model: Geometry) -> None:
        """Refuse a cut before layer 0: no attention has run there.

        Raises:
            PlanError: names the layers that would do.
        """
        if stage.layer < 1:
            raise PlanError(
                f"layer={stage.layer}, but fastv reads the attention of the layer before the cut: choose 1..{model.depth - 1}, "
                "or pyramiddrop, which reads the layer that is cut before"
            )

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """Scores are the row's attention probabilities, the mean over heads; the order is theirs."""
        scores = attend_last(build.op, inputs, inputs.geometry.layer - 1)
        return Selection(take_best(build.op, scores, inputs.geometry.keep), scores, {})
