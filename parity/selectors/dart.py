"""DART (arXiv 2502.11494): a few pivots of large norm, each taking what resembles it least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sievert.bundle.errors import PlanError
from sievert.parity.selectors.base import Array, Index, Margin, Tap, Text, TokenInputs
from sievert.parity.selectors.shared import cosine
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps

_PIVOTS = 4  # of the visual tokens, and of the text


@dataclass(frozen=True)
class Dart(ReferenceSelector):
    """Pivots are the 4 visual and the 4 text tokens of largest ``||k||_1``, in descending order.

    ``on``: the keys of the layer before the cut, compared by the final norm of the stream that enters it; or the input embeddings.
    """

    on: Literal["keys", "embeddings"] = "keys"
    text: Text = "after_image"

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:  # noqa: ARG002
        """Keys of the layer before, and the normed stream."""
        if self.on == "embeddings":
            return ()
        if layer == 0:
            raise PlanError("dart on keys reads the layer before the cut: there is none before layer 0; on=embeddings can cut there")
        return ("k_rotary", layer - 1), ("final_normed", layer)

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """The visual pivots one by one; then every pivot takes its share of the rest at once."""
        norms, vectors = self._read(inputs)
        scores = norms[inputs.visual]
        bounded = Scores(scores, scores * (1 - margin.score), scores * (1 + margin.score), float(scores.max()))
        taken = list[int]()
        for _ in range(min(_PIVOTS, keep)):
            taken += yield Step(1, bounded)
        rows = inputs.text if self.text == "after_image" else inputs.all_text
        candidates = [[int(inputs.visual[place])] for place in taken] + _text_pivots(rows, norms[rows], margin.score)
        share, over = divmod(keep - len(taken), len(candidates))
        for number, pivots in enumerate(candidates):
            size = share + (number < over)
            if size == 0:
                return
            own, *others = (self._distances(vectors, pivot, inputs.visual, margin) for pivot in pivots)
            yield Step(size, own, tuple(others))

    def _read(self, inputs: TokenInputs) -> tuple[Array, Array]:
        """``||k||_1`` ``[S]`` and the vectors that are compared ``[S, D]``."""
        if self.on == "embeddings":
            return np.abs(inputs.embeds).sum(axis=1), inputs.embeds
        keys = inputs.tap("k_rotary", inputs.layer - 1)
        return np.abs(keys).sum(axis=2).sum(axis=0), inputs.tap("final_normed")

    def _distances(self, vectors: Array, pivot: int, visual: Index, margin: Margin) -> Scores:
        """The less a token resembles the pivot, the higher."""
        values = -cosine(vectors[visual], vectors[pivot])
        return Scores(values, values - margin.similarity, values + margin.similarity)


def _text_pivots(rows: Index, norms: Array, error: float) -> list[list[int]]:
    """For each text pivot, the row of that rank, and after it those rows that rounding may put there: an order does not show which."""
    order: Sequence[int] = sorted(range(len(rows)), key=lambda place: (-norms[place], place))
    low, high = norms * (1 - error), norms * (1 + error)
    found = []
    for rank, own in enumerate(order[:_PIVOTS]):
        # As many rows as its rank may lie above it, and no more than its rank surely do.
        near = [
            place for place in order if place != own and (low > high[place]).sum() <= rank <= (high >= low[place]).sum() - 1 and error > 0
        ]
        found.append([int(rows[place]) for place in (own, *near)])
    return found
