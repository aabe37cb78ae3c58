"""``random``: the floor every method must beat, the same permutation in every implementation by definition."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sievert.parity.selectors.base import Array, Choice, Index, Margin, Replay, TokenInputs, invalid_order, judge_chunk, top


@dataclass(frozen=True)
class Random:
    """``numpy.random.default_rng(seed).permutation(Nv)`` of the original visual tokens: the first ``keep`` that are left."""

    seed: int = 0

    computes: ClassVar[bool] = False

    def select(self, inputs: TokenInputs, keep: int) -> Choice:
        """Take the tokens in the order of the permutation."""
        scores = self._scores(inputs)
        return Choice(np.array(top(scores, keep), np.int64), scores, 1.0)

    def replay(self, inputs: TokenInputs, keep: int, order: Sequence[int] | Index, margin: Margin) -> Replay:  # noqa: ARG002
        """One chunk without near ties: no score was computed."""
        taken = np.asarray(order, np.int64)
        reason = invalid_order(taken, keep, len(inputs.visual))
        if reason is not None:
            return Replay((), reason)
        scores = self._scores(inputs)
        left = [place for place in range(len(scores)) if place not in set(taken.tolist())]
        return Replay((judge_chunk(taken.tolist(), left, scores, scores, scores),))

    def arrange(self, inputs: TokenInputs, places: Sequence[int] | Index) -> Index:
        """``places`` in the order of the permutation."""
        scores = self._scores(inputs)
        return np.array(sorted(places, key=lambda place: -scores[place]), np.int64)

    def _scores(self, inputs: TokenInputs) -> Array:
        """Nv for the first of the permutation, 1 for its last."""
        permutation = np.random.default_rng(self.seed).permutation(inputs.visual_total)
        place_of = {int(token): place for place, token in enumerate(permutation)}
        return np.array([inputs.visual_total - place_of[int(token)] for token in inputs.original], np.float64)
