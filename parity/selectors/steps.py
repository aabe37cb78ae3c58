"""How every transcription chooses, and how an engine's choices are followed: step by step, each the top of the scores it finds."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from sievert.parity.selectors.base import EXACT, Array, Choice, Index, Margin, Tap, TokenInputs, VisionTap


@dataclass(frozen=True)
class Scores:
    """``values[Nv]``, what every one of them may be instead within the margin, and their :attr:`Choice.condition`.

    ``doubtful``: they are made of a choice that a near tie may turn, so that they may be off by more than rounding.
    """

    values: Array
    low: Array
    high: Array
    condition: float = 1.0
    doubtful: bool = False


@dataclass(frozen=True)
class Step:
    """``size`` tokens are taken, the highest of ``scores`` that are left.

    ``others``: scores that would decide instead where an earlier near tie, which the order does not show, was broken the other way.
    """

    size: int
    scores: Scores
    others: tuple[Scores, ...] = ()


Steps = Generator[Step, list[int], None]
"""Yields the steps one by one and is sent the places that were taken in each."""


@dataclass(frozen=True)
class Chunk:
    """One step of an engine's order, given everything the engine took before it.

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


class ReferenceSelector(ABC):
    """A selector with its options, as a frozen dataclass whose fields are the options.

    ``computes`` is False where nothing is scored: a graph then has no scores to show and no order, only what was kept.
    """

    computes: ClassVar[bool] = True

    @property
    def vision_tap(self) -> VisionTap | None:
        """What it reads of the vision encoder."""
        return None

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:  # noqa: ARG002 (some read nothing)
        """What it reads of the decoder at a cut before ``layer`` of ``depth``, the cut before it being before ``since`` (0: none)."""
        return ()

    @abstractmethod
    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """The formula: what each step chooses by, given what was taken before it."""

    def carry(self, inputs: TokenInputs) -> Mapping[str, Array]:  # noqa: ARG002 (most carry nothing)
        """Values ``[S]`` for later stages."""
        return {}

    def invalid(self, inputs: TokenInputs, order: Index) -> str | None:  # noqa: ARG002 (most take any set)
        """Why this selector cannot have made ``order``, which repeats nothing and names tokens that exist."""
        return None

    def select(self, inputs: TokenInputs, keep: int) -> Choice:
        """Choose ``keep`` visual tokens by the formula."""
        order, scores = self._take(inputs, keep, set())
        return Choice(order, scores.values, scores.condition, self.carry(inputs))

    def arrange(self, inputs: TokenInputs, places: Sequence[int] | Index) -> Index:
        """The order in which a set would have been taken: for engines that say which tokens they kept, but not in what order."""
        others = set(range(len(inputs.visual))) - {int(place) for place in places}
        return self._take(inputs, len(places), others)[0]

    def replay(self, inputs: TokenInputs, keep: int, order: Sequence[int] | Index, margin: Margin) -> Replay:
        """Follow ``order`` and report for each chunk whether it was a top set."""
        taken_order = np.asarray(order, np.int64)
        reason = invalid_order(taken_order, keep, len(inputs.visual)) or self.invalid(inputs, taken_order)
        if reason is not None:
            return Replay((), reason)
        chunks, taken, steps = list[Chunk](), set[int](), self.steps(inputs, keep, margin)
        step = next(steps)
        while True:
            new = [int(place) for place in taken_order[len(taken) : len(taken) + step.size]]
            taken.update(new)
            left = [place for place in range(len(inputs.visual)) if place not in taken]
            own, *others = (judge_chunk(new, left, scores) for scores in (step.scores, *step.others))
            chunks.append(Chunk(own.size, own.gap, min(chunk.excess for chunk in (own, *others))))
            if len(taken) == keep:
                return Replay(tuple(chunks))
            step = steps.send(new)

    def bounds(self, inputs: TokenInputs, keep: int, margin: Margin) -> Scores:
        """The scores of the first step and their error intervals."""
        return next(self.steps(inputs, keep, margin)).scores

    def _take(self, inputs: TokenInputs, keep: int, excluded: set[int]) -> tuple[Index, Scores]:
        """``keep`` places in the order they are taken, and the scores of the first step."""
        order, steps = list[int](), self.steps(inputs, keep, EXACT)
        step = first = next(steps)
        while True:
            new = top(step.scores.values, step.size, excluded | set(order))
            order += new
            if len(order) == keep:
                return np.array(order, np.int64), first.scores
            step = steps.send(new)


class TopK(ReferenceSelector):
    """The ``keep`` highest of one list of scores, each a sum of positive terms.

    ``magnified``: how much larger a score's relative error may be than that of what it is computed from.
    """

    magnified: ClassVar[float] = 1.0

    @abstractmethod
    def score(self, inputs: TokenInputs) -> Array:
        """``[Nv]``, none negative."""

    def interval(self, inputs: TokenInputs, scores: Array, margin: Margin) -> Scores:  # noqa: ARG002 (some need the inputs)
        """The relative error; what is smaller than a float32 may be anything down to 0."""
        error = self.magnified * margin.score
        smallest = float(np.finfo(np.float32).tiny) if error else 0.0
        return Scores(scores, scores * (1 - error) - smallest, scores * (1 + error) + smallest, self.magnified * float(scores.max()))

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """One."""
        scores = self.score(inputs)
        if not np.isfinite(scores).all():
            raise ValueError("a score is not a finite number")
        yield Step(keep, self.interval(inputs, scores, margin))


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


def top(scores: Array, count: int, excluded: set[int]) -> list[int]:
    """The places of the ``count`` largest scores in descending order; of equal scores the lower place first."""
    left = [place for place in range(len(scores)) if place not in excluded]
    return sorted(left, key=lambda place: (-scores[place], place))[:count]


def judge_chunk(chosen: list[int], left: list[int], scores: Scores) -> Chunk:
    """Compare the chosen with those left over."""
    if not left:
        return Chunk(len(chosen), math.inf, -math.inf)
    gap = scores.values[chosen].min() - scores.values[left].max()
    excess = scores.low[left].max() - scores.high[chosen].min()
    return Chunk(len(chosen), float(gap), float(excess))
