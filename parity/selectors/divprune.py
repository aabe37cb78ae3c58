"""DivPrune (arXiv 2503.02175): the tokens that lie farthest from each other."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sievert.parity.selectors.base import Margin, TokenInputs
from sievert.parity.selectors.shared import cosines
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps


@dataclass(frozen=True)
class DivPrune(ReferenceSelector):
    """Max-min diversity by ``1 - cos`` on the input embeddings: first the token whose nearest neighbour is farthest, then one by one
    the token farthest from those taken.
    """

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """A minimum of distances has no larger an error than one of them."""
        distances = 1 - cosines(inputs.embeds[inputs.visual])
        Nv = len(distances)
        apart = distances + np.diag(np.full(Nv, np.inf))
        nearest = apart.min(axis=1) if Nv > 1 else np.zeros(1)
        for step in range(keep):
            (new,) = yield Step(1, Scores(nearest, nearest - margin.similarity, nearest + margin.similarity))
            nearest = distances[new].copy() if step == 0 else np.minimum(nearest, distances[new])
