"""FastV (arXiv 2403.06764): the attention of the prompt's last token, in the layer before the cut."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sievert.bundle.errors import PlanError
from sievert.parity.selectors.base import Array, Tap, TokenInputs
from sievert.parity.selectors.shared import attention
from sievert.parity.selectors.steps import TopK


@dataclass(frozen=True)
class FastV(TopK):
    """``score_i``: mean over heads of layer l-1's attention of the last row to visual token i."""

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:  # noqa: ARG002
        """Queries and keys of the layer before."""
        if layer == 0:
            raise PlanError("fastv reads the attention of the layer before the cut: there is none before layer 0")
        return ("q_rotary", layer - 1), ("k_rotary", layer - 1)

    def score(self, inputs: TokenInputs) -> Array:
        """One row of the map."""
        last = np.array([len(inputs.embeds) - 1])
        scores: Array = attention(inputs, inputs.layer - 1, last)[0, inputs.visual]
        return scores
