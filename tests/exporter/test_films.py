"""Which frames a checkpoint takes: those that transformers' own rules leave as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as resize_each
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as resize_all

from sievert.bundle.errors import InputError, SievertError, UnsupportedModelError
from sievert.bundle.specs import Geometry
from sievert.exporter.export import examine_checkpoint
from tests.tiny_families import make_family
from tests.tiny_llava import make_tiny_llava

LEAST, MOST = 32 * 32, 128 * 128
"""Pixels of a frame, or of all frames, in the processors of the tiny families."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    names = ("qwen2.5-vl", "qwen3-vl", "smolvlm", "llava-onevision", "idefics3")
    return {name: make_family(name, tmp_path_factory.mktemp(name), layers=1) for name in names}


def examine(folder: Path, size: tuple[int, int], frames: int) -> Geometry:
    return examine_checkpoint(folder, image_size=size, frames=frames).geometry


def test_numbers_of_a_video(folders: dict[str, Path]):
    paired = examine(folders["qwen2.5-vl"], (32, 64), 4)
    assert (paired.picture, paired.visual_tokens, paired.image_token_id, paired.images) == ((64, 384), 16, 7, 1)
    assert paired.film is not None and (paired.film.patch, paired.film.merge, paired.film.temporal) == (8, 2, 2)
    pooled = examine(folders["llava-onevision"], (32, 32), 3)
    assert (pooled.picture, pooled.visual_tokens, pooled.image_token_id) == ((3, 3, 32, 32), 3 * 4 + 1, 5)
    tiles = examine(folders["smolvlm"], (32, 32), 3)
    assert (tiles.picture, tiles.visual_tokens, tiles.image_token_id) == ((3, 3, 32, 32), 3 * 4, 4)
    assert (
        pooled.film is not None
        and tiles.film is not None
        and (pooled.film.pixels, tiles.film.pixels) == ("pixel_values_videos", "pixel_values")
    )


@pytest.mark.parametrize("size", [(32, 64), (16, 32), (30, 64), (32, 512), (32, 528), (64, 64), (128, 128), (144, 128), (16, 64), (96, 96)])
@pytest.mark.parametrize("name", ["qwen2.5-vl", "qwen3-vl"])
def test_sizes_are_taken_that_transformers_would_leave_alone(folders: dict[str, Path], name: str, size: tuple[int, int]):
    frames, bounds = 4, {"factor": 16, "min_pixels": LEAST, "max_pixels": MOST}
    kept = (resize_each(*size, **bounds) if name == "qwen2.5-vl" else resize_all(frames, *size, temporal_factor=2, **bounds)) == size
    if kept:
        assert examine(folders[name], size, frames).film is not None
    else:
        with pytest.raises(InputError, match="choose"):
            examine(folders[name], size, frames)


@pytest.mark.parametrize(
    ("name", "size", "frames", "kind", "says"),
    [
        ("idefics3", (64, 64), 4, UnsupportedModelError, "videos of idefics3 are not exported, only of llava-onevision"),
        ("qwen2.5-vl", (30, 70), 4, InputError, "would be resized to multiples of 16: choose --image-size 32x64"),
        ("qwen2.5-vl", (32, 64), 3, InputError, "3 frames are no multiple of 2"),
        ("qwen3-vl", (96, 96), 4, InputError, "have 36864 in all"),
        ("llava-onevision", (32, 64), 4, InputError, "frames are brought to 32x32 pixels: choose --image-size 32x32"),
        ("qwen2.5-vl", (32, 64), -1, InputError, "at least one frame"),
    ],
)
def test_what_is_refused(folders: dict[str, Path], name: str, size: tuple[int, int], frames: int, kind: type[SievertError], says: str):
    with pytest.raises(kind, match=says):
        examine(folders[name], size, frames)


def test_a_model_of_images_alone(tmp_path: Path):
    with pytest.raises(UnsupportedModelError, match="videos of llava are not exported"):
        examine_checkpoint(make_tiny_llava(tmp_path, layers=1), frames=4)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_settings_of_videos_come_from_wherever_a_checkpoint_keeps_them(tmp_path: Path):
    folder = make_family("qwen2.5-vl", tmp_path, layers=1)
    path = folder / "processor_config.json"
    own = json.loads(path.read_text())["video_processor"]
    edit(path, lambda content: content.pop("video_processor"))
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**own, "image_mean": [0.1, 0.2, 0.3]}))
    film = examine(folder, (32, 64), 4).film
    assert film is not None and film.mean == (0.1, 0.2, 0.3)
    bounds = {"min_pixels": 32 * 64 + 1, "max_pixels": MOST}  # the names of older checkpoints
    (folder / "video_preprocessor_config.json").write_text(json.dumps({"temporal_patch_size": 2, **bounds}))
    with pytest.raises(InputError, match="resizes what has not 2049..16384"):
        examine(folder, (32, 64), 4)
    (folder / "video_preprocessor_config.json").write_text(json.dumps({**own, "do_normalize": False}))
    with pytest.raises(UnsupportedModelError, match="leaves out a step for videos .do_normalize"):
        examine(folder, (32, 64), 4)
