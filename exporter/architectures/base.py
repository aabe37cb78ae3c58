"""What the exporter must know of a model family: names and numbers, no behaviour."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """One family of checkpoints.

    ``model_class`` is the class in ``architectures`` of ``config.json`` and in transformers. ``towers`` maps the model type of each
    vision tower to its leading class tokens; ``decoders`` are model types. The paths lead to modules of the loaded model.
    ``feature_layer`` and ``feature_select`` are keys of the config; ``leading_dropped`` maps each value of the latter to the number
    of leading rows it drops from the tower's hidden states. ``rope_types`` are those whose tables do not depend on the data.
    """

    name: str
    model_class: str
    towers: Mapping[str, int]
    decoders: tuple[str, ...]
    vision_tower: str
    projector: str
    language_model: str
    embedding: str
    head: str
    feature_layer: str
    feature_select: str
    leading_dropped: Mapping[str, int]
    rope_types: tuple[str, ...] = ("default", "linear", "llama3", "yarn")

    def __str__(self) -> str:
        return f"{self.model_class} (towers: {', '.join(self.towers)}; decoders: {', '.join(self.decoders)})"
