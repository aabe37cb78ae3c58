"""What the vision encoder says of its patches: the attention they receive in one of its layers, in float64."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from sievert.bundle.errors import PlanError, UnsupportedModelError
from sievert.parity.hooks import watch_outputs
from sievert.parity.selectors.base import Array, VisionTap


@contextmanager
def watch_vision(model: Any, taps: Collection[VisionTap]) -> Iterator[dict[VisionTap, Array]]:
    """Collect the scores ``[Nv]`` of a prompt's pictures that are encoded in the block; they are there when the block has ended.

    Raises:
        PlanError: the class token of an encoder that has none, or an encoder without such a layer.
    """
    found = dict[VisionTap, Array]()
    tower: Any = model.model.vision_tower if taps else None
    attentions = {tap: tower.encoder.layers[_layer(model, tap)].self_attn for tap in taps}
    watched = {(tap, name): getattr(attentions[tap], f"{name}_proj") for tap in taps for name in ("q", "k")}
    with watch_outputs({f"{tap}.{name}": module for (tap, name), module in watched.items()}) as seen:
        yield found
    for tap in taps:
        attention = attentions[tap]
        dropped, pictures = int(model.config.vision_feature_select_strategy == "default"), list[Array]()
        for rows in zip(*(seen[f"{tap}.{name}"].double().numpy() for name in ("q", "k")), strict=True):  # one picture after the other
            q, k = (each.reshape(-1, attention.num_heads, attention.head_dim).transpose(1, 0, 2) for each in rows)
            pictures.append(_received(q, k, attention.scale, only_first=_reads_class_token(tower, tap))[dropped:])
        found[tap] = np.concatenate(pictures)


def patch_grid(model: Any) -> tuple[int, int] | None:
    """Rows and columns of a picture's patches; None of a tower that takes pictures of any size."""
    vision = model.config.vision_config
    if not hasattr(vision, "image_size"):
        return None
    sides, patches = (size if isinstance(size, (list, tuple)) else (size, size) for size in (vision.image_size, vision.patch_size))
    return int(sides[0]) // int(patches[0]), int(sides[1]) // int(patches[1])


def _layer(model: Any, tap: VisionTap) -> int:
    """The encoder layer a tap means. Of several that feed the projector it is the last that runs."""
    depth = len(model.model.vision_tower.encoder.layers)
    if tap.layer == "second_last":
        layer = depth - 2
    else:
        features = model.config.vision_feature_layer
        states = [features] if isinstance(features, int) else list(features)
        layer = max(state % (depth + 1) for state in states) - 1  # state 0 is what enters the first layer
    if layer < 0:
        raise PlanError(f"the vision encoder has {depth} layers, and none of them is the one these scores are of")
    return layer


def _reads_class_token(tower: Any, tap: VisionTap) -> bool:
    has_one = hasattr(tower.embeddings, "class_embedding")
    if tap.queries == "class_token" and not has_one:
        raise PlanError(f"queries=class_token, but {type(tower).__name__} has no class token: choose queries=mean")
    return has_one and tap.queries != "mean"


def _received(q: Array, k: Array, scale: float, *, only_first: bool) -> Array:
    """``[N]``: the mean attention over heads and over all rows, or in the first row."""
    if q.shape[0] != k.shape[0]:
        raise UnsupportedModelError("a vision encoder with grouped heads")
    total = np.zeros(k.shape[1])
    for queries, keys in zip(q, k, strict=True):
        logits = (queries[:1] if only_first else queries) @ keys.T * scale
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        total += (weights / weights.sum(axis=1, keepdims=True)).mean(axis=0)
    mean: Array = total / len(q)
    return mean
