"""Videos from what users have: folders, animations, lists."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sievert.bundle.errors import ImageError
from sievert.bundle.specs import Film
from sievert.engines.run.videos import FPS, Video, load_video

FILM = Film(frames=3, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), rescale=1 / 255, resample=-1, pixels="pixels", place="<video>")


def frame(level: int, size: tuple[int, int] = (8, 4)) -> Image.Image:
    return Image.new("RGB", size, (level, level, level))


def levels(video: Video) -> list[int]:
    return [int(np.asarray(each)[0, 0, 0]) for each in video.frames]


def test_a_folder_in_the_order_of_its_names(tmp_path: Path):
    for name, level in (("b.png", 20), ("a.png", 10), ("c.jpg", 30)):
        frame(level).save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no picture")
    video = load_video(tmp_path)
    assert levels(video) == [10, 20, 30] and video.fps == FPS
    assert load_video(tmp_path, 4.0).fps == 4.0


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_says_its_rate(tmp_path: Path, suffix: str):
    frames, path = [frame(level) for level in (0, 120, 240)], tmp_path / f"film.{suffix}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=250, lossless=True)
    video = load_video(path)
    assert levels(video) == [0, 120, 240] and video.fps == pytest.approx(4.0)
    assert load_video(str(path), 1.0).fps == 1.0


def test_lists_and_videos_are_taken_as_they_are():
    video = load_video([frame(1), frame(2)], 3.0)
    assert levels(video) == [1, 2] and load_video(video) is video


def test_frames_are_chosen_evenly_from_the_first_to_the_last():
    frames, times = Video(tuple(frame(level) for level in range(8)), 4.0).choose(FILM, (4, 8))
    assert levels(Video(frames)) == [0, 4, 7]
    assert times.frames_indices == [0, 4, 7] and times.timestamps == [0.0, 1.0, 1.75]


def test_what_cannot_be_a_video_is_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "film.mp4").write_bytes(b"\x00" * 64)
    for source, says in (
        (tmp_path / "empty", "folder without pictures"),
        (tmp_path / "gone", "does not exist"),
        (tmp_path / "film.mp4", "read"),
    ):
        with pytest.raises(ImageError, match=says):
            load_video(source)
    with pytest.raises(ImageError, match="more than 0 frames a second"):
        load_video([frame(0)], -2.0)
    with pytest.raises(ImageError, match="a video of 2 frames, but this bundle was exported for 3: .*--frames 2"):
        Video((frame(0), frame(1))).choose(FILM, (4, 8))
    with pytest.raises(ImageError, match="a frame of 8x4 pixels, but this bundle was exported for videos of 16x8"):
        Video((frame(0),) * 3).choose(FILM, (8, 16))


def test_frames_are_resized_where_the_model_brings_all_to_one_size():
    frames, _ = Video((frame(9, (20, 10)),) * 3).choose(FILM.model_copy(update={"resample": 3}), (8, 16))
    assert {each.size for each in frames} == {(16, 8)}
