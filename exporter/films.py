"""How a checkpoint's processor takes the frames of a video, read from its files: transformers has that part for torchvision only."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import PreTrainedConfig

from sievert.bundle.errors import CheckpointError, InputError, UnsupportedModelError
from sievert.bundle.specs import Film
from sievert.exporter.architectures import ARCHITECTURES
from sievert.exporter.architectures.base import Video
from sievert.exporter.checkpoint import Checkpoint

_FILES: Final = ("video_preprocessor_config.json", "preprocessor_config.json")
_STEPS: Final = ("do_resize", "do_rescale", "do_normalize")


def choose_film(checkpoint: Checkpoint, config: PreTrainedConfig, processor: Any, size: tuple[int, int], frames: int) -> Film:
    """What ``frames`` frames of ``size`` (height, width) become.

    Raises:
        UnsupportedModelError: a family whose videos are not exported.
        CheckpointError: a processor that does not say how.
        InputError: a size or number of frames that the processor would change.
    """
    video = checkpoint.architecture.video
    if video is None:
        able = ", ".join(architecture.name for architecture in ARCHITECTURES if architecture.video is not None)
        raise UnsupportedModelError(f"{checkpoint.given}: videos of {checkpoint.architecture.name} are not exported, only of {able}")
    if frames < 1:
        raise InputError(f"frames={frames}: a video has at least one frame")
    said = _Settings(checkpoint, processor)
    if off := [step for step in _STEPS if said.get(step, True) is False]:
        raise UnsupportedModelError(f"{checkpoint.given}: its processor leaves out a step for videos ({', '.join(off)})")
    cut = said.own("temporal_patch_size") is not None
    if cut:
        _check_patches(checkpoint.given, video, said, size, frames)
    else:
        _check_whole(checkpoint.given, said, size)
    return Film(
        frames=frames,
        mean=_three(said.require("image_mean")),
        std=_three(said.require("image_std")),
        rescale=float(said.get("rescale_factor", 1 / 255)),
        resample=-1 if cut else int(said.get("resample", 3)),
        pixels=video.pixels,
        place=str(getattr(processor, "video_token", "<video>")),
        patch=int(said.require("patch_size")) if cut else 0,
        merge=int(said.require("merge_size")) if cut else 1,
        temporal=int(said.require("temporal_patch_size")) if cut else 1,
        ticks=float(getattr(config.vision_config, "tokens_per_second", 0) or 0) if video.timed else 0.0,
    )


class _Settings:
    """Of the video part of a checkpoint's processor: what its files say, and where they are silent what it does to pictures."""

    def __init__(self, checkpoint: Checkpoint, processor: Any) -> None:
        self._given, self._pictures = checkpoint.given, processor.image_processor
        self._said = _read(checkpoint.folder)

    def own(self, name: str) -> Any:
        """What is said of videos, or of pictures by a processor that has one set of numbers for both."""
        value = self._said.get(name)
        return getattr(self._pictures, name, None) if value is None else value

    def get(self, name: str, default: Any) -> Any:
        """The same, with a default."""
        value = self.own(name)
        return default if value is None else value

    def require(self, name: str) -> Any:
        """The same, or an error."""
        if (value := self.own(name)) is None:
            raise CheckpointError(f"{self._given}: its processor does not say {name} of videos: add video_preprocessor_config.json")
        return value

    def sides(self) -> Mapping[str, Any]:
        """The sizes of videos, under today's names."""
        size = dict(self.require("size"))
        for old, name in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            size[name] = self._said.get(old) or size.get(name)
        return size


def _read(folder: Path) -> Mapping[str, Any]:
    """The fields of the video processor, wherever this version of a checkpoint keeps them."""

    def content(name: str) -> Mapping[str, Any]:
        path = folder / name
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return found if isinstance(found, dict) else {}

    return content("processor_config.json").get("video_processor") or next(filter(None, map(content, _FILES)), {})


def _check_patches(given: str, video: Video, said: _Settings, size: tuple[int, int], frames: int) -> None:
    """Frames that are cut into patches must have a size that the processor leaves as it is: a multiple, within its bounds.

    The rule is ``smart_resize`` of such models' own code, which counts the pixels of a frame, or of all frames where ``video.whole``.
    """
    height, width = size
    temporal, sides = int(said.require("temporal_patch_size")), said.sides()
    side = int(said.require("patch_size")) * int(said.require("merge_size"))
    if height % side or width % side:
        near = "x".join(str(max(side, round(each / side) * side)) for each in size)
        raise InputError(
            f"{given}: frames of {width}x{height} pixels would be resized to multiples of {side}: choose --image-size {near} "
            "(height x width), and give frames of that size"
        )
    if frames % temporal:
        raise InputError(f"{given}: {frames} frames are no multiple of {temporal}, which it joins into one: choose --frames {frames + 1}")
    least, most = sides.get("shortest_edge"), sides.get("longest_edge")
    pixels = height * width * (frames if video.whole else 1)
    if not (least or 0) <= pixels <= (most or pixels):
        raise InputError(
            f"{given}: {frames} frames of {width}x{height} pixels have {pixels} {'in all' if video.whole else 'each'}, and its processor "
            f"resizes what has not {least}..{most}: choose another --image-size{' or --frames' if video.whole else ''}"
        )


def _check_whole(given: str, said: _Settings, size: tuple[int, int]) -> None:
    """Frames that stay whole are all brought to one size, which must be the one asked for."""
    square = said.own("max_image_size")
    sides = {"height": square["longest_edge"], "width": square["longest_edge"]} if square else said.sides()
    height, width = sides.get("height"), sides.get("width")
    if (height, width) != size:
        raise InputError(f"{given}: frames are brought to {width}x{height} pixels: choose --image-size {height}x{width} (height x width)")


def _three(values: Any) -> tuple[float, float, float]:
    first, second, third = map(float, values)
    return first, second, third
