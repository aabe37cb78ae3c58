"""FoPru (arXiv 2411.14164): the attention that patches receive in the vision encoder, single patches or whole rows of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from sievert.bundle.errors import PlanError
from sievert.parity.selectors.base import Array, Index, Margin, TokenInputs, VisionTap
from sievert.parity.selectors.shared import vision_scores
from sievert.parity.selectors.steps import Steps, TopK


@dataclass(frozen=True)
class FoPru(TopK):
    """``strategy``: ``rank`` takes the patches of the highest significance, ``row`` the rows of the picture with the highest sum of it.

    ``queries``: the paper's formula could not be read; our reading is the mean over all queries, the other the class token's row.
    """

    strategy: Literal["rank", "row"] = "rank"
    queries: Literal["mean", "class_token"] = "mean"

    @property
    def vision_tap(self) -> VisionTap:
        """The layer that feeds the projector."""
        return VisionTap("feature", self.queries)

    def score(self, inputs: TokenInputs) -> Array:
        """Each patch's own significance, or that of its row."""
        significance = vision_scores(inputs)
        if self.strategy == "rank":
            return significance
        return np.repeat(self._split(inputs, significance).sum(axis=1), inputs.grid[1])

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """One, of whole rows where rows are taken."""
        if self.strategy == "row" and keep % inputs.grid[1]:
            raise PlanError(f"keep={keep} is no multiple of the {inputs.grid[1]} patches of a row")
        yield from super().steps(inputs, keep, margin)

    def invalid(self, inputs: TokenInputs, order: Index) -> str | None:
        """Rows are taken as a whole, one after the other, from left to right."""
        if self.strategy == "rank":
            return None
        columns = inputs.grid[1]
        if len(order) % columns:
            return f"{len(order)} patches are no whole rows of {columns}"
        for row in order.reshape(-1, columns):
            if row.tolist() != list(range(row[0], row[0] + columns)) or row[0] % columns:
                return f"row {int(row[0]) // columns} of the picture is taken in part or not from left to right"
        return None

    def _split(self, inputs: TokenInputs, significance: Array) -> Array:
        """``[rows, columns]``."""
        if len(significance) != inputs.grid[0] * inputs.grid[1]:
            raise PlanError(f"{len(significance)} visual tokens are no grid of {inputs.grid[0]} x {inputs.grid[1]}: rows need all of them")
        return significance.reshape(inputs.grid)
