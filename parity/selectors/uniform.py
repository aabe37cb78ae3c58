"""``uniform``: a stride over the visual tokens that are left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sievert.parity.selectors.base import Choice, Index, Margin, Replay, TokenInputs, invalid_order, judge_chunk


@dataclass(frozen=True)
class Uniform:
    """Places ``floor((i + 0.5) Nv / K)`` for i in 0..K-1."""

    computes: ClassVar[bool] = False

    def select(self, inputs: TokenInputs, keep: int) -> Choice:
        """Take the stride's places in ascending order; they score 1, the others 0."""
        Nv = len(inputs.visual)
        order = [(2 * i + 1) * Nv // (2 * keep) for i in range(keep)]  # the same floor, without rounding
        scores = np.zeros(Nv)
        scores[order] = 1.0
        return Choice(np.array(order, np.int64), scores, 1.0)

    def replay(self, inputs: TokenInputs, keep: int, order: Sequence[int] | Index, margin: Margin) -> Replay:  # noqa: ARG002
        """One chunk without near ties: no score was computed."""
        taken = np.asarray(order, np.int64)
        reason = invalid_order(taken, keep, len(inputs.visual))
        if reason is not None:
            return Replay((), reason)
        scores = self.select(inputs, keep).scores
        left = [place for place in range(len(scores)) if place not in set(taken.tolist())]
        return Replay((judge_chunk(taken.tolist(), left, scores, scores, scores),))

    def arrange(self, inputs: TokenInputs, places: Sequence[int] | Index) -> Index:  # noqa: ARG002
        """``places``, ascending."""
        return np.sort(np.asarray(places, np.int64))
