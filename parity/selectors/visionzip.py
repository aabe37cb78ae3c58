"""VisionZip (arXiv 2412.04467), its dominant tokens: the class token's attention in the vision encoder's second-last layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from sievert.parity.selectors.base import Array, TokenInputs, VisionTap
from sievert.parity.selectors.shared import vision_scores
from sievert.parity.selectors.steps import TopK


@dataclass(frozen=True)
class VisionZip(TopK):
    """``queries``: ``auto`` is the class token where the encoder has one, else the mean over all rows."""

    queries: Literal["auto", "class_token", "mean"] = "auto"

    @property
    def vision_tap(self) -> VisionTap:
        """The second-last layer, whichever feeds the projector."""
        return VisionTap("second_last", self.queries)

    def score(self, inputs: TokenInputs) -> Array:
        """As the encoder says."""
        return vision_scores(inputs)
