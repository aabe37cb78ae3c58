"""What a processor makes of pictures, brought to one form: so many pictures, each of the same shape."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

PIXELS: Final = "pixel_values"
OF_TEXT: Final = frozenset({"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"})
"""A processor's arrays that are about tokens; whatever else it returns is about pictures."""
_FEW: Final = 16  # numbers of a picture: sizes and grids; more is a mask
_IMAGE_AXES: Final = 3


@dataclass(frozen=True)
class Pictures:
    """``pixels[M, *picture]`` float32, ``layout`` the other numbers of each picture (grids, sizes), ``masked``: masks that hide pixels."""

    pixels: NDArray[np.float32]
    layout: tuple[Mapping[str, tuple[int, ...]], ...]
    masked: tuple[str, ...]


def split_pictures(values: Mapping[str, Any], count: int) -> Pictures:
    """The arrays of ``count`` pictures of one prompt, all of one shape, picture by picture. Numbers that are not so many are of the prompt
    as a whole, and each picture's.

    Processors write ``pixel_values`` as ``[M, C, H, W]``, ``[M, tiles, C, H, W]``, ``[1, M * tiles, C, H, W]``, ``[M * tiles, C, H, W]`` or
    ``[M * patches, n]``; a picture is what is left of its axes without leading ones.

    Raises:
        ValueError: pixels, or numbers of the layout, that are not so many times the same shape.
    """
    pixels = np.asarray(values[PIXELS], np.float32)
    while pixels.ndim > _IMAGE_AXES and pixels.shape[0] == 1:
        pixels = pixels[0]
    picture: tuple[int, ...] = pixels.shape
    if count > 1 or pixels.ndim > _IMAGE_AXES:
        tiles, rest = divmod(pixels.shape[0], count)
        if rest:
            raise ValueError(f"{count} images became {pixels.shape}, which is not {count} times one shape: give images of one size")
        picture = (tiles, *pixels.shape[1:]) if tiles > 1 or pixels.ndim < _IMAGE_AXES else pixels.shape[1:]
    layout: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count)]
    masked = []
    for name in sorted(values.keys() - OF_TEXT - {PIXELS}):
        array = np.asarray(values[name])
        if array.size > _FEW * count:
            masked += [name] if not array.all() else []
            continue
        if array.dtype.kind == "f":  # seconds of a video: not of its shape
            continue
        rows = np.broadcast_to(array.reshape(1, -1), (count, array.size)) if array.size % count else array.reshape(count, -1)
        for own, row in zip(layout, rows, strict=True):
            own[name] = tuple(int(number) for number in row)
    return Pictures(pixels.reshape(count, *picture), tuple(layout), tuple(masked))


def first_picture(values: Mapping[str, Any], count: int) -> dict[str, NDArray[Any]]:
    """What a processor made of ``count`` pictures of one prompt, as if there were the first alone; arrays of text are left out."""
    first = {}
    for name in sorted(values.keys() - OF_TEXT):
        array = np.asarray(values[name])
        axis = next((axis for axis, size in enumerate(array.shape) if size > 1), 0)
        if array.ndim and array.shape[axis] % count == 0:
            array = array.take(range(array.shape[axis] // count), axis)
        first[name] = array
    return first


def same_layout(one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether two pictures of one shape and one number of tokens are encoded alike.

    Grids must be equal. Sizes need not: what a size decides beyond the shape (which rows and columns are padding) the number of tokens
    tells too.
    """
    grids = {name for name in one.keys() | other.keys() if "grid" in name}
    return one.keys() == other.keys() and all(one[name] == other[name] for name in grids)
