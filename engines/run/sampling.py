"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sievert.bundle.errors import EngineError, InputError
from sievert.engines.run.dtypes import Array


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: ``temperature`` 0 takes the likeliest; above, one is drawn from the smallest set of tokens whose
    probabilities sum to ``top_p``. The same ``seed`` gives the same tokens, row by row, whatever else is in the batch.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not (0.0 <= self.temperature < np.inf):
            raise InputError(f"temperature={self.temperature}: give 0 (always the likeliest token) or more")
        if not (0.0 < self.top_p <= 1.0):
            raise InputError(f"top_p={self.top_p}: give a share of probability above 0 and at most 1")
        if self.seed < 0:
            raise InputError(f"seed={self.seed}: give 0 or a positive number")

    def generator(self, row: int) -> np.random.Generator:
        """The source of chance for one row."""
        return np.random.default_rng((self.seed, row))

    def choose(self, logits: Array, generator: np.random.Generator) -> int:
        """The next token, from ``logits[V]``. Equal logits: the lower token wins.

        Raises:
            EngineError: the logits are not finite.
        """
        if not np.isfinite(logits).all():
            raise EngineError(
                "the logits hold NaN or infinity: a 16-bit graph overflowed or an engine is wrong, run `sievert check` on this variant"
            )
        if self.temperature == 0.0:
            return int(np.argmax(logits))
        scaled = (logits.astype(np.float64) - logits.max()) / self.temperature
        probabilities = np.exp(scaled)
        probabilities /= probabilities.sum()
        order = np.argsort(-probabilities, kind="stable")
        sums = np.cumsum(probabilities[order])
        count = int(np.searchsorted(sums, self.top_p, side="left")) + 1  # the first set that reaches top_p
        sums = sums[:count]  # one too long where rounding keeps the whole sum below top_p: slicing does not mind
        place = int(np.searchsorted(sums, generator.random() * sums[-1], side="right"))
        return int(order[min(place, len(sums) - 1)])
