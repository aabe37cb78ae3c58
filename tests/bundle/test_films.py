"""Frames to pixels, against the formulas of transformers' own video processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from sievert.bundle.films import frame_pixels, rename_pixels, stamp
from sievert.bundle.specs import Film

MEAN, STD = (0.48, 0.45, 0.4), (0.26, 0.27, 0.28)


def film(**fields: Any) -> Film:
    return Film(
        **{"frames": 4, "mean": MEAN, "std": STD, "rescale": 1 / 255, "resample": -1, "pixels": "pixels", "place": "<video>", **fields}
    )


def make_frames(count: int, height: int = 16, width: int = 24) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def normalised(frames: np.ndarray) -> torch.Tensor:
    mean, std = (torch.tensor(values).reshape(3, 1, 1) for values in (MEAN, STD))
    return (torch.tensor(frames).permute(0, 3, 1, 2) / 255 - mean) / std


def test_whole_frames_are_normalised():
    frames = make_frames(3)
    pixels, grid = frame_pixels(film(), frames)
    assert grid is None and pixels.dtype == np.float32
    np.testing.assert_allclose(pixels[0], normalised(frames), atol=1e-5)


@pytest.mark.parametrize("count", [4, 3, 1])
def test_patches_are_those_of_transformers(count: int):
    frames = make_frames(count)
    pixels, grid = frame_pixels(film(patch=4, merge=2, temporal=2), frames)
    whole: Any = Qwen3VLVideoProcessor.patchify
    expected, *sizes = whole(None, normalised(frames)[None], patch_size=4, merge_size=2, temporal_patch_size=2)
    assert list(grid or ()) == sizes == [(count + 1) // 2, 4, 6]
    np.testing.assert_allclose(pixels, expected[0], atol=1e-5)


def test_times_are_those_of_transformers():
    times = stamp(10, [0, 3, 9], 4.0)
    expected = VideoMetadata(total_num_frames=10, fps=4.0, frames_indices=[0, 3, 9])
    assert times.timestamps == expected.timestamps
    assert times.sampled_fps == expected.sampled_fps
    assert times.duration == 2.5


def test_pixels_take_the_name_of_pictures():
    one = np.zeros(1)
    assert list(rename_pixels({"pixels": one, "grid": one}, film())) == ["pixel_values", "grid"]
    assert list(rename_pixels({"pixel_values": one}, None)) == ["pixel_values"]
