"""Pictures from files nobody vouched for."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps

from sievert.bundle.errors import ImageError

FORMATS: Final = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
"""What is opened. Pillow knows more, some of which start other programs (EPS starts Ghostscript)."""

# What Pillow's decoders are known to raise on broken files, beyond its own OSError.
_DECODE_ERRORS = (OSError, SyntaxError, ValueError, TypeError, EOFError, IndexError, KeyError, OverflowError, struct.error, zlib.error)


def load_image(source: Path | str | Image.Image) -> Image.Image:
    """The first frame of a picture as RGB, turned upright as its EXIF data says.

    ``source`` is a local file or a picture already in memory.

    Raises:
        ImageError: no such file, not one of :data:`FORMATS`, damaged, or more pixels than Pillow's limit for safe decoding.
    """
    if isinstance(source, Image.Image):
        _refuse_bomb("the picture", source.size)
        return _decode("the picture", source)
    if isinstance(source, str) and "://" in source:
        raise ImageError(f"image {source!r} is an address: download it and give the file's path")
    path = Path(source)
    if not path.is_file():
        raise ImageError(f"image {path} {'is not a file' if path.exists() else 'does not exist'}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, at half of what Pillow raises for
            with Image.open(path, formats=FORMATS) as picture:
                _refuse_bomb(path.name, picture.size)
                return _decode(path.name, picture)
    except Image.DecompressionBombError as error:
        raise ImageError(f"image {path.name}: {error}") from error
    except _DECODE_ERRORS as error:
        raise ImageError(f"image {path.name} cannot be read ({error}): give a {', '.join(FORMATS)} file") from error


def _decode(name: str, picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture).convert("RGB")
    except _DECODE_ERRORS as error:
        raise ImageError(f"image {name} is damaged: {error}") from error


def _refuse_bomb(name: str, size: tuple[int, int]) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    if limit is not None and size[0] * size[1] > limit:
        raise ImageError(f"image {name} has {size[0]}x{size[1]} pixels, more than the {limit} that are decoded safely: make it smaller")
