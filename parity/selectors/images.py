"""Several pictures in one prompt: the tokens of each are ranked as if the others were not there, and share a cut's budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np

from sievert.parity.selectors.base import EXACT, Array, Choice, Index, Margin, Tap, TokenInputs, VisionTap
from sievert.parity.selectors.steps import ReferenceSelector, Scores, Step, Steps


def share_budget(keep: int, counts: Sequence[int]) -> list[int]:
    """``keep`` split in proportion to ``counts``: whole parts first, what is left over by largest fraction, then by place."""
    exact = [Fraction(keep * count, sum(counts)) for count in counts]
    given = [int(part) for part in exact]
    while sum(given) < keep:
        furthest = max(range(len(counts)), key=lambda place: (exact[place] - given[place], -place))
        given[furthest] += 1
    return given


@dataclass(frozen=True)
class _Part:
    """One picture's share of a stage: its tokens stand at the places from ``start`` on."""

    inputs: TokenInputs
    start: int
    keep: int

    @property
    def places(self) -> slice:
        return slice(self.start, self.start + len(self.inputs.visual))

    def spread(self, scores: Scores, total: int) -> Scores:
        """Scores of ``total`` tokens of which the other pictures' can never be taken."""

        def widen(own: Array) -> Array:
            wide = np.full(total, -np.inf)
            wide[self.places] = own
            return wide

        return replace(scores, values=widen(scores.values), low=widen(scores.low), high=widen(scores.high))


@dataclass(frozen=True)
class ByImage(ReferenceSelector):
    """``selector`` for prompts of ``images`` pictures of equally many tokens; the pictures are taken one after the other."""

    selector: ReferenceSelector
    images: int

    @property
    def vision_tap(self) -> VisionTap | None:
        """The selector's."""
        return self.selector.vision_tap

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:
        """The selector's."""
        return self.selector.taps(layer, depth, since)

    def steps(self, inputs: TokenInputs, keep: int, margin: Margin) -> Steps:
        """All steps of the first picture, then of the next."""
        total = len(inputs.visual)
        for part in self._parts(inputs, keep):
            steps, done = self.selector.steps(part.inputs, part.keep, margin), 0
            step = next(steps)
            while True:
                others = tuple(part.spread(other, total) for other in step.others)
                new = yield Step(step.size, part.spread(step.scores, total), others)
                done += step.size
                if done == part.keep:
                    break
                step = steps.send([place - part.start for place in new])

    def select(self, inputs: TokenInputs, keep: int) -> Choice:
        """As each picture's own choice, with the scores of all."""
        bounds = self.bounds(inputs, keep, EXACT)
        return replace(super().select(inputs, keep), scores=bounds.values, condition=bounds.condition)

    def bounds(self, inputs: TokenInputs, keep: int, margin: Margin) -> Scores:
        """Of the first step of every picture."""
        each = [self.selector.bounds(part.inputs, part.keep, margin) for part in self._parts(inputs, keep)]
        return Scores(
            values=np.concatenate([one.values for one in each]),
            low=np.concatenate([one.low for one in each]),
            high=np.concatenate([one.high for one in each]),
            condition=max(one.condition for one in each),
            doubtful=any(one.doubtful for one in each),
        )

    def carry(self, inputs: TokenInputs) -> Mapping[str, Array]:
        """What each picture's selection leaves, for the same picture."""
        parts = enumerate(self._parts(inputs, len(inputs.visual)))
        return {f"{name}/{place}": values for place, part in parts for name, values in self.selector.carry(part.inputs).items()}

    def invalid(self, inputs: TokenInputs, order: Index) -> str | None:
        """Why the selector cannot have made some picture's part of the order."""
        taken = 0
        for place, part in enumerate(self._parts(inputs, len(order))):
            own = order[taken : taken + part.keep] - part.start
            taken += part.keep
            if any(not 0 <= place < len(part.inputs.visual) for place in own):
                return f"picture {place} has {part.keep} places of the order, and not all of them are its own"
            if reason := self.selector.invalid(part.inputs, own):
                return f"picture {place}: {reason}"
        return None

    def _parts(self, inputs: TokenInputs, keep: int) -> list[_Part]:
        each = inputs.visual_total // self.images
        owner = inputs.original // each
        counts = [int((owner == place).sum()) for place in range(self.images)]
        parts = list[_Part]()
        for place, share in enumerate(share_budget(keep, counts)):
            own = owner == place
            scores = inputs.visual_scores
            suffix = f"/{place}"
            part = replace(
                inputs,
                visual=inputs.visual[own],
                original=inputs.original[own] - place * each,
                visual_total=each,
                carried={name.removesuffix(suffix): values for name, values in inputs.carried.items() if name.endswith(suffix)},
                visual_scores=None if scores is None else scores[own],
            )
            parts.append(_Part(part, sum(counts[:place]), share))
        return parts


@dataclass(frozen=True)
class ByImageUnscored(ByImage):
    """For a selector that scores nothing."""

    computes: ClassVar[bool] = False


def by_image(selector: ReferenceSelector, images: int) -> ReferenceSelector:
    """``selector`` for prompts of so many pictures; for one it is the selector itself."""
    if images == 1:
        return selector
    return ByImage(selector, images) if selector.computes else ByImageUnscored(selector, images)
