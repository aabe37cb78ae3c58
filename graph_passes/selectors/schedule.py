"""Where a selector's paper cuts, for a decoder of any depth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import PositionPolicy


@dataclass(frozen=True)
class Schedule:
    """Cuts before ``layers`` (counted from 0) of a decoder of ``depth`` layers.

    ``shares`` are what each cut leaves of the original visual tokens, from 0 to 1; none where the paper leaves the share to the user.
    """

    depth: int
    layers: tuple[int, ...]
    shares: tuple[float, ...] = ()
    positions: PositionPolicy = "keep"


EMBEDDINGS = Schedule(1, (0,))
"""Before layer 0: what scores the vision encoder's output never enters the decoder."""
SEVENTH = Schedule(28, (4,))
"""A seventh of the depth: the IWP paper's layer."""


def scale_layers(layers: Sequence[int], depth: int, to: int) -> tuple[int, ...]:
    """Layers of a decoder of ``depth`` layers for one of ``to``: scaled, rounded half up, then forced strictly increasing from 1.

    Layer 0 stays layer 0.

    Raises:
        PlanError: the decoder has fewer layers than cuts + 2, so that nothing would run before, between or after them.
    """
    if tuple(layers) == (0,):
        return (0,)
    if to < len(layers) + 2:
        raise PlanError(f"{len(layers)} cuts need {len(layers) + 2} layers or more, but the decoder has {to}: use fewer cuts")
    scaled: list[int] = []
    for layer in layers:
        nearest = (2 * layer * to + depth) // (2 * depth)
        scaled.append(max(nearest, scaled[-1] + 1 if scaled else 1))
    # A short decoder may push the last ones over the end: they move back, still one apart.
    last = [min(layer, to - len(scaled) + place) for place, layer in enumerate(scaled)]
    return tuple(last)
