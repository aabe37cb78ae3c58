"""``random``: the floor every method must beat, the same permutation in every implementation by definition."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sievert.parity.selectors.base import Margin, TokenInputs
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps


@dataclass(frozen=True)
class Random(ReferenceSelector):
    """``numpy.random.default_rng(seed).permutation(Nv)`` of the original visual tokens: the first ``keep`` that are left."""

    seed: int = 0

    computes: ClassVar[bool] = False

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:  # noqa: ARG002
        """One, without near ties: the first of the permutation scores Nv, its last 1."""
        permutation = np.random.default_rng(self.seed).permutation(inputs.visual_total)
        place_of = {int(token): place for place, token in enumerate(permutation)}
        scores = np.array([inputs.visual_total - place_of[int(token)] for token in inputs.original], np.float64)
        yield Step(keep, Scores(scores, scores, scores))
