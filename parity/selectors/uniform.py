"""``uniform``: a stride over the visual tokens that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sievert.parity.selectors.base import Margin, TokenInputs
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps


@dataclass(frozen=True)
class Uniform(ReferenceSelector):
    """Places ``floor((i + 0.5) Nv / K)`` for i in 0..K-1."""

    computes: ClassVar[bool] = False

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:  # noqa: ARG002
        """One, without near ties: the stride's places score 1, the others 0."""
        Nv = len(inputs.visual)
        scores = np.zeros(Nv)
        scores[[(2 * i + 1) * Nv // (2 * keep) for i in range(keep)]] = 1.0  # the same floor, without rounding
        yield Step(keep, Scores(scores, scores, scores))
