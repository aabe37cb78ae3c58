"""What the exporter must know of a model family: names and numbers, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Tower:
    """A vision tower of pictures of one size, traced for any number of them; its attention can be read by selectors.

    ``encoder`` and ``projector`` lead to modules of the loaded model, ``feature_layer`` and ``feature_select`` are keys of the config;
    ``leading_dropped`` maps each value of the latter to the number of leading rows it drops from the tower's hidden states.
    """

    encoder: str
    projector: str
    feature_layer: str
    feature_select: str
    leading_dropped: Mapping[str, int]


@dataclass(frozen=True)
class TwoWay:
    """Tokens of a prompt that see one another in both directions: each picture's own, or all of the ``prompt``.

    The model is told by its ``token_type_ids``: ``token_type`` for those tokens, ``other`` for the rest.
    """

    tokens: Literal["images", "prompt"]
    token_type: int
    other: int


@dataclass(frozen=True)
class Video:
    """How a family takes a video: the processor's array ``pixels``, the model's method ``features`` of it, ``visual`` as the key of the id
    of visual tokens in the config.

    ``whole``: the processor's bounds on pixels are those of all frames together. ``timed``: positions count the seconds between frames.
    """

    pixels: str = "pixel_values_videos"
    features: str = "get_video_features"
    visual: str = "video_token_id"
    whole: bool = False
    timed: bool = False


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints.

    ``model_class`` is the class in ``architectures`` of ``config.json`` and in transformers. ``towers`` maps the model type of each
    vision tower to its leading class tokens; ``decoders`` are model types. Without a ``tower`` the vision encoder is whatever the model
    does to one picture of the size that was asked for, ``image_size`` (height, width) by default, or the configuration's own where
    that is None too. ``rope_types`` are those whose tables do not depend on the data. ``processor`` names a class of transformers that
    makes the same of pictures and text, where the family's own cannot be had without what it needs for videos. Without a ``video`` there
    is no export for videos. ``two_way`` is for models whose attention is not causal everywhere; their sliding windows stay in the graph.
    ``first_position`` is the position of row 0.
    """

    name: str
    model_class: str
    towers: Mapping[str, int]
    decoders: tuple[str, ...]
    tower: Tower | None = None
    image_size: tuple[int, int] | None = None
    processor: str = ""
    two_way: TwoWay | None = None
    first_position: int = 0
    video: Video | None = None
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")

    def __str__(self) -> str:
        return f"{self.model_class} (towers: {', '.join(self.towers)}; decoders: {', '.join(self.decoders)})"
