"""PyramidDrop: the attention of the prompt's last token, in the layer that is the first to run on the kept tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sievert.parity.selectors.base import Array, Tap, TokenInputs
from sievert.parity.selectors.shared import attention
from sievert.parity.selectors.steps import TopK


@dataclass(frozen=True)
class PyramidDrop(TopK):
    """``score_i``: mean over heads of layer p's attention of the last row to visual token i."""

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:  # noqa: ARG002
        """Queries and keys of the layer itself."""
        return ("q_rotary", layer), ("k_rotary", layer)

    def score(self, inputs: TokenInputs) -> Array:
        """One row of the map."""
        last = np.array([len(inputs.embeds) - 1])
        scores: Array = attention(inputs, inputs.layer, last)[0, inputs.visual]
        return scores
