"""A video's frames to what a model's processor would make of them, in numpy.

The processors of transformers find a video's tokens, timestamps and intervals themselves; only the part that turns frames into pixels is
written for torchvision. :class:`FrameProcessor` stands in its place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sievert.bundle.specs import Film

GRID: Final = "video_grid_thw"
SECONDS: Final = "second_per_grid_ts"


@dataclass
class FrameTimes:
    """When the chosen frames are, under the names of transformers' own metadata: ``frames_indices`` among ``total_num_frames``, of which
    there are ``fps`` a second.
    """

    total_num_frames: int
    fps: float
    frames_indices: list[int]

    @property
    def duration(self) -> float:
        """Of the whole video, in seconds."""
        return self.total_num_frames / self.fps

    @property
    def timestamps(self) -> list[float]:
        """Of each chosen frame, in seconds."""
        return [index / self.fps for index in self.frames_indices]

    @property
    def sampled_fps(self) -> float:
        """Chosen frames per second."""
        return len(self.frames_indices) / self.total_num_frames * self.fps


class FrameProcessor:
    """What a processor has as its video processor: one video of frames that have the film's size already."""

    def __init__(self, film: Film, times: FrameTimes) -> None:
        self._film, self._times = film, times
        self.num_frames, self.fps = film.frames, times.sampled_fps
        self.merge_size, self.temporal_patch_size, self.patch_size = film.merge, film.temporal, film.patch

    def __call__(self, videos: Sequence[NDArray[np.uint8]], **_: Any) -> dict[str, Any]:
        """``videos[1][F, H, W, 3]`` to the pixels under their own name, the grid of their patches if they have one, and the times."""
        pixels, grid = frame_pixels(self._film, videos[0])
        made: dict[str, Any] = {self._film.pixels: pixels, "video_metadata": [self._times]}
        return made if grid is None else {**made, GRID: np.array([grid])}


def process_film(
    processor: Any, film: Film, frames: Sequence[Image.Image], times: FrameTimes, text: str, **options: Any
) -> dict[str, NDArray[Any]]:
    """A prompt about one video through a model's own processor: its arrays by name.

    ``frames`` are RGB, all of the film's size and as many as it has. Raises what the processor raises.
    """
    before = getattr(processor, "video_processor", None)
    processor.video_processor = FrameProcessor(film, times)
    try:
        made = processor(text=[text], videos=[np.stack([np.asarray(frame) for frame in frames])], return_tensors="np", **options)
    finally:
        processor.video_processor = before
    arrays = {name: np.asarray(made[name]) for name in made}
    if SECONDS in arrays:
        arrays[SECONDS] = arrays[SECONDS].astype(np.float32)  # as PyTorch gives it: positions are cut to integers
    return arrays


def frame_pixels(film: Film, frames: NDArray[np.uint8]) -> tuple[NDArray[np.float32], tuple[int, int, int] | None]:
    """``frames[F, H, W, 3]`` to ``[1, F, 3, H, W]``; or to ``[patches, 3 * temporal * patch**2]`` with their grid (time, rows, columns).

    Patches stand in the order that towers merge them in: square by square of ``merge * merge``. Of a number of frames that ``temporal``
    does not divide the last one is repeated.
    """
    mean, std = (np.array(values, np.float32).reshape(3, 1, 1) for values in (film.mean, film.std))
    pixels = (frames.transpose(0, 3, 1, 2).astype(np.float32) * np.float32(film.rescale) - mean) / std  # [F, 3, H, W]
    if not film.patch:
        return pixels[None], None
    p, m, T = film.patch, film.merge, film.temporal
    pixels = np.concatenate([pixels, *[pixels[-1:]] * (-len(pixels) % T)])
    times, rows, columns = len(pixels) // T, pixels.shape[2] // p, pixels.shape[3] // p
    split = pixels.reshape(times, T, 3, rows // m, m, p, columns // m, m, p)
    patches = split.transpose(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return np.ascontiguousarray(patches).reshape(times * rows * columns, -1), (times, rows, columns)


def stamp(count: int, chosen: Sequence[int], fps: float) -> FrameTimes:
    """The times of the frames ``chosen`` of ``count``."""
    return FrameTimes(count, fps, [int(index) for index in chosen])


def rename_pixels(arrays: Mapping[str, NDArray[Any]], film: Film | None) -> dict[str, NDArray[Any]]:
    """The arrays with a video's pixels under the name that pictures' have."""
    name = "pixel_values" if film is None else film.pixels
    return {("pixel_values" if key == name else key): value for key, value in arrays.items()}
