"""SparseVLM (arXiv 2410.04417, the rule of its second version): attention of those text tokens that the picture speaks to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from sievert.parity.selectors.base import EXACT, Array, Index, Margin, Tap, Text, TokenInputs
from sievert.parity.selectors.shared import attention, softmax
from sievert.parity.selectors.steps import Scores, TopK

RATERS = "raters"  # 1 where a row rates, else 0
LEAD = "raters_lead"  # (m_t - mean) / (m_t + mean): how far a row is from rating or not


@dataclass(frozen=True)
class SparseVlm(TopK):
    """``score_i``: mean over raters and heads of layer p's attention to visual token i.

    ``m_t``: mean over visual i of the softmax over text rows t of ``e_i . e_t``, on the input embeddings. Raters are the rows with
    ``m_t`` above the mean, all where none is. They are chosen at the first cut and carried on.
    """

    text: Text = "after_image"

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:  # noqa: ARG002
        """Queries and keys of the layer itself."""
        return ("q_rotary", layer), ("k_rotary", layer)

    def score(self, inputs: TokenInputs) -> Array:
        """The raters' mean."""
        raters = np.flatnonzero(self._ratings(inputs)[RATERS])
        scores: Array = attention(inputs, inputs.layer, raters)[:, inputs.visual].mean(axis=0)
        return scores

    def carry(self, inputs: TokenInputs) -> Mapping[str, Array]:
        """The raters, and how clearly they are that."""
        return self._ratings(inputs)

    def interval(self, inputs: TokenInputs, scores: Array, margin: Margin) -> Scores:
        """Whether a row rates is a decision with near ties of its own: the means over all the sets of raters there may be."""
        plain = super().interval(inputs, scores, margin)
        ratings = self._ratings(inputs)
        if margin == EXACT or LEAD not in ratings:
            return plain
        rows = inputs.text_rows(self.text)
        near = np.abs(ratings[LEAD][rows]) <= margin.score
        if not near.any():
            return plain
        # Rows far above the mean rate, near ones may; where none is far above, none at all may be, and then all rate.
        surely = rows[~near & (ratings[LEAD][rows] > 0)]
        weights = attention(inputs, inputs.layer, rows)[:, inputs.visual]
        certain, maybe = weights[np.isin(rows, surely)], weights[near]
        low, high = _least_mean(certain, maybe), -_least_mean(-certain, -maybe)
        if len(surely) == 0:
            low, high = np.minimum(low, weights.mean(axis=0)), np.maximum(high, weights.mean(axis=0))
        wide = super().interval(inputs, low, margin), super().interval(inputs, high, margin)
        return Scores(scores, np.minimum(plain.low, wide[0].low), np.maximum(plain.high, wide[1].high), plain.condition, doubtful=True)

    def _ratings(self, inputs: TokenInputs) -> dict[str, Array]:
        """``[S]``: the raters an earlier cut chose, or those of what is left now."""
        carried = {name: inputs.carried[name] for name in (RATERS, LEAD) if name in inputs.carried}
        if RATERS in carried:
            return carried
        rows = inputs.text_rows(self.text)
        relevance = self._relevance(inputs, rows)
        mean = relevance.mean()
        raters, lead = np.zeros((2, len(inputs.embeds)))
        raters[rows] = relevance > mean
        if not raters.any():
            raters[rows] = 1.0
        lead[rows] = (relevance - mean) / (relevance + mean)
        return {RATERS: raters, LEAD: lead}

    def _relevance(self, inputs: TokenInputs, rows: Index) -> Array:
        """``m[T]``."""
        text, total = inputs.embeds[rows], np.zeros(len(rows))
        for row in inputs.visual:
            total += softmax((text * inputs.embeds[row]).sum(axis=1))
        mean: Array = total / len(inputs.visual)
        return mean


def _least_mean(certain: Array, maybe: Array) -> Array:
    """``[N]``: the least mean of each column over all rows of ``certain`` and any of ``maybe``, at least one row in all."""
    count, total = len(certain), certain.sum(axis=0)
    means = [total / count] if count else []
    for row in np.sort(maybe, axis=0):  # the least of every column first: the mean falls as long as they lie below it
        count, total = count + 1, total + row
        means.append(total / count)
    least: Array = np.min(means, axis=0)
    return least
