"""Videos as frames: a folder of pictures, an animated picture, or a list; nothing is decoded that Pillow does not decode."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image, ImageSequence

from sievert.bundle.errors import ImageError
from sievert.bundle.films import FrameTimes, stamp
from sievert.bundle.specs import Film
from sievert.engines.run.images import FORMATS, load_image

FPS: Final = 2.0
"""Frames a second of what does not say it itself."""
_MOST: Final = 4096
_SUFFIXES: Final = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class Video:
    """Frames in their order, RGB, ``fps`` of them a second."""

    frames: tuple[Image.Image, ...]
    fps: float = FPS

    def choose(self, film: Film, size: tuple[int, int]) -> tuple[tuple[Image.Image, ...], FrameTimes]:
        """As many frames as the film has, evenly from the first to the last, of ``size`` (height, width); and when they are.

        Raises:
            ImageError: fewer frames, or frames of another size where the film takes no other.
        """
        if len(self.frames) < film.frames:
            raise ImageError(
                f"a video of {len(self.frames)} frames, but this bundle was exported for {film.frames}: give more, or export with "
                f"--frames {len(self.frames)}"
            )
        chosen = np.linspace(0, len(self.frames) - 1, film.frames).round().astype(int)
        return tuple(_fit(self.frames[index], film, size) for index in chosen), stamp(len(self.frames), chosen.tolist(), self.fps)


def load_video(source: Video | Path | str | Sequence[Path | str | Image.Image], fps: float = 0.0) -> Video:
    """A video from a folder of pictures (in the order of their names), an animated GIF or WebP, or a list of pictures.

    ``fps`` are frames a second; 0 takes what an animation says itself, :data:`FPS` of others.

    Raises:
        ImageError: no such place, no pictures there, one that cannot be read, or ``fps`` below 0.
    """
    if fps < 0 or fps != fps:
        raise ImageError(f"fps={fps:g}: a video has more than 0 frames a second")
    if isinstance(source, Video):
        return source
    if isinstance(source, Path | str):
        path = Path(source)
        if not path.is_dir():
            return _load_animation(path, fps)
        source = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
        if not source:
            raise ImageError(f"video {path} is a folder without pictures: put its frames there, named in their order")
    if len(source) > _MOST:
        raise ImageError(f"a video of {len(source)} frames, more than {_MOST}: give fewer")
    return Video(tuple(load_image(each) for each in source), fps or FPS)


def _load_animation(path: Path, fps: float) -> Video:
    load_image(path)  # refuses what is no picture, or too large
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as picture:
                if (count := getattr(picture, "n_frames", 1)) > _MOST:
                    raise ImageError(f"video {path.name} has {count} frames, more than {_MOST}: give fewer")
                frames, seconds = list[Image.Image](), 0.0
                for frame in ImageSequence.Iterator(picture):
                    frames.append(frame.convert("RGB"))
                    seconds += float(frame.info.get("duration", 0)) / 1000  # some formats say it when a frame is decoded
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        raise ImageError(f"video {path.name} cannot be read ({error}): give a folder of pictures, or an animated GIF or WebP") from error
    return Video(tuple(frames), fps or (len(frames) / seconds if seconds else FPS))


def _fit(frame: Image.Image, film: Film, size: tuple[int, int]) -> Image.Image:
    height, width = size
    if frame.size == (width, height):
        return frame
    if film.resample < 0:
        raise ImageError(
            f"a frame of {frame.width}x{frame.height} pixels, but this bundle was exported for videos of {width}x{height}: resize them, "
            f"or export with --image-size {frame.height}x{frame.width} (height x width)"
        )
    return frame.resize((width, height), Image.Resampling(film.resample))
