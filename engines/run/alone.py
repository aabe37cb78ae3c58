"""One graph by itself, with made-up inputs and caches of its own: what is timed, where no prompt is needed.

How long a static graph takes does not depend on what it is fed, but for numbers that are not finite.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import numpy as np

from sievert.bundle.errors import EngineError
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry, TensorSpec
from sievert.engines.run.base import Cache, Session, check_feeds
from sievert.engines.run.dtypes import Array
from sievert.engines.run.memory import Buffer, shape_at

GIVEN: Final = "given_index"
"""Inputs that begin so hold the places of the tokens that are kept, in a graph that does not choose them."""
_PAST: Final = "past_key_values."


class Alone:
    """A loaded graph with its inputs. ``step`` counts decode's tokens from 0; other graphs have no use for it.

    Raises:
        EngineError: an input that nothing is known of.
    """

    def __init__(self, session: Session, geometry: Geometry, profile: Profile) -> None:
        self._session = session
        pasts = [spec for spec in session.inputs if spec.name.startswith(_PAST)]
        self._caches = [Cache(spec.name, "present." + spec.name.removeprefix(_PAST), Buffer(session.memory, spec)) for spec in pasts]
        session.bind(self._caches)
        self._profile = profile
        bound = {past.name for past in pasts}
        made = {spec.name: make_feed(spec, geometry, profile) for spec in session.inputs if spec.name not in bound}
        self._feeds = check_feeds("made-up inputs", session.inputs, bound, made)  # in the graph's types: no run has to cast

    def run(self, step: int = 0) -> dict[str, Array]:
        """Compute once; decode writes its token ``step`` after a full prompt, and starts over where the caches end."""
        feeds = self._feeds
        if "cache_row" in feeds:
            after = step % self._profile.max_new_tokens
            feeds = {**feeds, "cache_row": feeds["cache_row"] + after, "position_ids": feeds["position_ids"] + after}
        return self._session.run(feeds)

    def close(self) -> None:
        """Give back the caches; the graph goes with the object."""
        for cache in self._caches:
            cache.buffer.free()
        self._caches = []


def make_feed(spec: TensorSpec, geometry: Geometry, profile: Profile) -> Array:
    """An input of a variant's graph: prompts of all S tokens, the image after some text and before some, everything else random.

    Raises:
        EngineError: an input that no graph of the contract has.
    """
    shape, rng = shape_at(spec, profile.sequence), np.random.default_rng(0)
    if spec.name.startswith(GIVEN):  # the first ones, which every stage has
        return np.broadcast_to(np.arange(shape[1]), shape).copy()
    if spec.name in ("pixel_values", "image_features", "inputs_embeds") or spec.name.startswith("deepstack."):
        return rng.standard_normal(shape, np.float32)
    makers: Mapping[str, Array] = {
        "input_ids": rng.integers(0, geometry.vocabulary, shape),
        "visual_index": np.broadcast_to(min(4, profile.max_text - 1) + np.arange(profile.visual_tokens), (shape[0], profile.visual_tokens)),
        "visual_scores": rng.random(shape, np.float32),
        "attention_mask": np.ones(shape, np.int64),
        "cache_row": np.full(shape, profile.sequence),
        "position_ids": np.broadcast_to(np.arange(shape[-1]) if shape[-1] > 1 else np.array(profile.sequence), shape),
    }
    if spec.name not in makers:
        raise EngineError(f"nothing is known of the input {spec.name}: this variant was made by another version")
    return makers[spec.name].copy()
