"""What a graph takes and gives, in terms no runtime is needed for."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    import onnx_ir as ir


SEQUENCE: Final = "sequence"
"""The one axis of a variant's graphs that may be named: how many tokens the prompts at hand have, where its text is dynamic."""


def name_axis(dropped: int) -> str:
    """The axis of a sequence that is ``dropped`` tokens shorter than the prompts: :data:`SEQUENCE`, or ``sequence - 12``."""
    return f"{SEQUENCE} - {dropped}" if dropped else SEQUENCE


def size_axis(axis: int | str, sequence: int) -> int | str:
    """The size of an axis for prompts of ``sequence`` tokens; unchanged where it does not vary with them."""
    whole, _, dropped = str(axis).partition(" - ")
    return sequence - int(dropped or 0) if whole == SEQUENCE else axis


class Record(BaseModel):
    """A frozen value of the manifest; unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class TensorSpec(Record):
    """One input or output of a graph: ONNX dtype name in lower case (``float32``, ``int64``...), fixed or named axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


def describe_values(values: Iterable[ir.Value]) -> tuple[TensorSpec, ...]:
    """Specs of a graph's inputs or outputs; symbolic axes keep their names.

    Raises:
        ValueError: a value without a name, dtype or shape.
    """
    specs = []
    for value in values:
        if not value.name or value.dtype is None or value.shape is None:
            raise ValueError(f"{value.name!r} has dtype {value.dtype} and shape {value.shape}: a graph's interface needs both")
        shape = tuple(axis if isinstance(axis, int) else str(axis.value) for axis in value.shape)
        specs.append(TensorSpec(name=value.name, dtype=np.dtype(value.dtype.numpy()).name, shape=shape))
    return tuple(specs)


class Film(Record):
    """How one video's frames become a model's pixels: ``frames`` RGB frames of the geometry's height and width, each number times
    ``rescale``, less ``mean``, by ``std``.

    Where ``patch`` is not 0 they are cut into patches of that side, ``merge * merge`` of which make one token, ``temporal`` frames deep.
    ``resample`` is Pillow's filter that brings frames of other sizes to this one, -1 where such are refused. ``pixels`` and ``place`` are
    the model's own names: of the array, and of the token that marks a video in a prompt. ``ticks`` are what a second counts in positions
    of several axes, 0 where a frame counts 1.
    """

    frames: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    resample: int
    pixels: str
    place: str
    patch: int = 0
    merge: int = 1
    temporal: int = 1
    ticks: float = 0.0


class Geometry(Record):
    """The numbers of a model that every stage needs. Units are tokens, layers, heads, elements and pixels.

    ``attention_scale`` is what the decoder multiplies q.k by (1/sqrt(d) in most models); ``eos_token_ids`` are the stop
    tokens of the generation config. An image of ``image_height x image_width`` pixels becomes ``picture``, the shape of its
    ``pixel_values``, with ``layout``, the other numbers the processor gives it (its grid, its size), and ``visual_tokens``. ``grid`` is
    their patch grid (rows, columns), None where they are not one grid: tiles, or line breaks between them. ``vision_layers`` is the
    depth of a vision encoder whose attention can be read, 0 of others; ``class_tokens`` stand before its patches.
    ``position_axes`` is how many numbers a token's position has: 1, or 3 (time, height, width) where rotary embedding takes three.
    ``visual_planes`` is how many of the first layers add features of the pictures to their output (DeepStack). ``two_way`` tells the tokens
    of a prompt that see one another in both directions: none, those of the same image, or all of the prompt. ``first_position`` is the
    position of row 0. A model exported for videos has a ``film``; then all this is of one video in place of an image. ``images`` is how
    many images a prompt has whose images become that, 0 where it makes no difference.
    """

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    attention_scale: float
    max_positions: int
    image_token_id: int
    pad_token_id: int
    eos_token_ids: tuple[int, ...]
    image_height: int
    image_width: int
    channels: int
    grid: tuple[int, int] | None
    visual_tokens: int
    picture: tuple[int, ...] = ()
    layout: dict[str, tuple[int, ...]] = {}
    vision_layers: int = 0
    class_tokens: int = 0
    position_axes: int = 1
    visual_planes: int = 0
    two_way: Literal["none", "images", "prompt"] = "none"
    first_position: int = 0
    images: int = 0
    film: Film | None = None

    @property
    def picture_shape(self) -> tuple[int, ...]:
        """``picture``; in bundles made before it was recorded ``[C, H, W]``."""
        return self.picture or (self.channels, self.image_height, self.image_width)
