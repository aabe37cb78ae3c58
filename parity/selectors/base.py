"""What a transcription takes and gives, and how an engine's choices are followed chunk by chunk."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Index = NDArray[np.int64]


@dataclass(frozen=True)
class TokenInputs:
    """One unpadded sample at one stage; all floats are float64.

    ``q``, ``q_rotary``: ``[H, S, d]``; ``k``, ``k_rotary``, ``v``: ``[G, S, d]``, before and after the rotary step, after any q/k norm.
    ``visual[Nv]``: rows of the stage's visual tokens, ascending; ``original[Nv]``: their numbers among the model's ``visual_total``
    visual tokens. ``text``: rows of the text after the first visual token, ``all_text``: of all text. ``scale``: what q.k is
    multiplied by, the ``1/sqrt(d)`` of the formulas.
    """

    q: Array
    q_rotary: Array
    k: Array
    k_rotary: Array
    v: Array
    visual: Index
    original: Index
    visual_total: int
    text: Index
    all_text: Index
    scale: float


@dataclass(frozen=True)
class Choice:
    """``order[K]``: places 0..Nv-1 among the stage's visual tokens as they were taken; ``scores[Nv]``: what the first was chosen by.

    ``condition`` says how much the scaling of the scores magnifies a relative error of what was scaled (1: not at all).
    """

    order: Index
    scores: Array
    condition: float


@dataclass(frozen=True)
class Margin:
    """What counts as a near tie.

    ``score``: relative error allowed to a score before it is scaled; ``similarity``: absolute error allowed to a similarity.
    """

    score: float
    similarity: float


@dataclass(frozen=True)
class Chunk:
    """One chunk of an engine's order, given everything the engine took before it.

    ``gap`` is min(score of the chosen) - max(score of those neither chosen nor taken), infinite where none is left: the chunk is
    a top set where it is not negative. ``excess`` is what remains of a violation when every score moves to the near end of its
    error interval: the chunk is a top set within the margin where it is not positive.
    """

    size: int
    gap: float
    excess: float

    @property
    def exact(self) -> bool:
        """A top set without any margin."""
        return self.gap >= 0

    @property
    def holds(self) -> bool:
        """A top set within the margin."""
        return self.excess <= 0


@dataclass(frozen=True)
class Replay:
    """The engine's order, judged. ``invalid`` names what makes it no selection at all; then there are no chunks."""

    chunks: tuple[Chunk, ...]
    invalid: str | None = None

    @property
    def exact(self) -> bool:
        """Every chunk is a top set without any margin."""
        return self.invalid is None and all(chunk.exact for chunk in self.chunks)

    @property
    def holds(self) -> bool:
        """Every chunk is a top set within the margin."""
        return self.invalid is None and all(chunk.holds for chunk in self.chunks)


class ReferenceSelector(Protocol):
    """A selector with its options, as a frozen dataclass whose fields are the options.

    ``computes`` is False where nothing is scored: a graph then has no scores to show and no order, only what was kept.
    """

    @property
    def computes(self) -> bool:
        """Whether the choice depends on what the model computes."""
        ...

    def select(self, inputs: TokenInputs, keep: int) -> Choice:
        """Choose ``keep`` visual tokens by the formula."""
        ...

    def replay(self, inputs: TokenInputs, keep: int, order: Sequence[int] | Index, margin: Margin) -> Replay:
        """Follow ``order`` and report for each chunk whether it was a top set."""
        ...

    def arrange(self, inputs: TokenInputs, places: Sequence[int] | Index) -> Index:
        """The order in which a set would have been taken: for engines that say which tokens they kept, but not in what order."""
        ...


def invalid_order(order: Index, keep: int, visual: int) -> str | None:
    """Why ``order`` is no selection of ``keep`` among ``visual`` tokens, or None."""
    if order.shape != (keep,):
        return f"{order.shape} places instead of ({keep},)"
    outside = [int(place) for place in order if not 0 <= place < visual]
    if outside:
        return f"place {outside[0]} is not among the {visual} visual tokens"
    if len(set(order.tolist())) != keep:
        places, counts = np.unique(order, return_counts=True)
        return f"place {int(places[counts > 1][0])} was taken more than once"
    return None


def top(scores: Array, count: int) -> list[int]:
    """The places of the ``count`` largest scores in descending order; of equal scores the lower place first."""
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def judge_chunk(chosen: list[int], left: list[int], scores: Array, low: Array, high: Array) -> Chunk:
    """Compare the chosen with those left over; ``low`` and ``high`` bound every score."""
    if not left:
        return Chunk(len(chosen), math.inf, -math.inf)
    gap = min(scores[place] for place in chosen) - max(scores[place] for place in left)
    excess = max(low[place] for place in left) - min(high[place] for place in chosen)
    return Chunk(len(chosen), float(gap), float(excess))
