"""Numbers of models that nobody makes, for what asks for numbers only."""

from __future__ import annotations

from typing import Any

from sievert.bundle.specs import Geometry


def make_geometry(**changes: Any) -> Geometry:
    """A small decoder of 4 layers; its images have 4 x 4 patches. ``changes`` are other fields, or other numbers for some."""
    numbers: dict[str, Any] = {
        "depth": 4,
        "width": 64,
        "heads": 4,
        "kv_heads": 2,
        "head_size": 16,
        "vocabulary": 96,
        "attention_scale": 0.25,
        "max_positions": 512,
        "image_token_id": 4,
        "pad_token_id": 0,
        "eos_token_ids": (2,),
        "image_height": 32,
        "image_width": 32,
        "channels": 3,
        "grid": (4, 4),
        "visual_tokens": 16,
        "vision_layers": 3,
        "class_tokens": 1,
    }
    return Geometry(**(numbers | changes))
