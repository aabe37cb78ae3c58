"""Sizes of a profile taken from sample prompts and images, as the model's own processor counts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image

import sievert as package
from sievert.bundle.errors import BundleError, ImageError, InputError
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.prompt import Prompter
from sievert.engines.run.videos import Video
from sievert.exporting import examine
from sievert.inspecting import Inspection
from sievert.sampling import count_text, leave_room
from sievert.tables_inspect import describe_sample
from tests.api.conftest import sievert
from tests.tiny_families import make_family

ASK = "which digit is red ?"
LONG = " ".join([ASK] * 4)


def test_the_count_is_the_prompters_and_the_longest_prompt_decides(shared: Path):
    opened = Bundle.open(shared)
    geometry, profile = opened.manifest.geometry, opened.variant("full").profile
    batch = Prompter(opened.path, geometry, profile).prepare([Image.new("RGB", (50, 40))], [ASK])
    template = batch.lengths[0] - profile.visual_tokens
    assert count_text(opened.path, geometry, [ASK]) == template == 8  # five words, and three tokens of the template
    assert count_text(opened.path, geometry, [ASK, LONG]) == 23
    assert [leave_room(tokens) for tokens in (1, 15, 16, 17)] == [16, 16, 16, 32]


def test_prune_takes_its_length_from_a_sample(bundle: Path):
    made = sievert("prune", bundle, "--selector", "random", "--sample-prompt", "red ?", "--sample-prompt", LONG)
    assert made.code == 0, made.all
    profile = Bundle.open(bundle).variant("random-22").profile
    assert (profile.max_text, profile.max_new_tokens) == (32, 8)
    both = sievert("prune", bundle, "--sample-prompt", ASK, "--max-text", 9)
    assert both.code == 2 and "--max-text 9 was given with --sample-prompt" in " ".join(both.err.split()), both.all


def test_inspect_says_what_a_prompt_comes_to(shared: Path):
    said = sievert("inspect", shared, "--sample-prompt", ASK)
    assert said.code == 0, said.all
    words = " ".join(said.out.split())
    assert "The longest sample prompt: 16 visual + 8 text tokens (template included) = 24; those that take it: full, iwp-22" in words
    manifest = Bundle.open(shared).manifest
    found = Inspection(shared, manifest, verified=False, sizes={}, caches={}, lint=(), sample_text={1: 28}, shared_by=1)
    assert "16 visual + 28 text tokens (template included) = 44; no variant takes it; sievert prune --max-text 32" in describe_sample(found)
    assert sievert("inspect", shared, "--sample-prompt", " ").code == 2


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"max_text": 9, "sample_prompts": [ASK]}, "--max-text 9 was given with --sample-prompt"),
        ({"sample_images": ["photo.png"]}, "--sample-image was given without --sample-prompt"),
        ({"sample_images": ["photo.png"], "sample_prompts": [ASK], "images": 2}, "--images 2 was given with --sample-image"),
        ({"sample_images": ["photo.png"], "sample_prompts": [ASK], "frames": 2}, "--sample-image was given with --frames"),
        ({"sample_images": ["nothing.png"], "sample_prompts": [ASK]}, "nothing.png does not exist"),
    ],
)
def test_what_contradicts_a_sample_is_refused_before_the_model_is_read(checkpoint: Path, tmp_path: Path, sizes: dict[str, Any], words: str):
    with pytest.raises(InputError, match=words):
        package.export(checkpoint, tmp_path / "bundle", **sizes)
    assert not (tmp_path / "bundle").exists()


def test_a_sample_has_a_size_where_a_model_takes_several(checkpoint: Path, tmp_path: Path):
    assert examine(checkpoint, sample_size=(64, 96)).geometry.image_height == 32
    anyhow = make_family("qwen2-vl", tmp_path / "qwen", layers=1)
    found = examine(anyhow, sample_size=(64, 96))
    assert (found.geometry.image_height, found.geometry.image_width, found.geometry.visual_tokens) == (64, 96, 24)
    assert examine(anyhow, sample_size=(64, 96), image_size=(64, 64)).geometry.visual_tokens == 16
    # vision start and end stand around the image, and count
    assert count_text(anyhow, found.geometry, [ASK], pictures=[Image.new("RGB", (96, 64))] * 2) == 2 * 2 + 8 - 1
    with pytest.raises(ImageError, match="resize to 96x64"):  # not the same in the processor as the first
        count_text(anyhow, found.geometry, [ASK], pictures=[Image.new("RGB", (96, 64)), Image.new("RGB", (64, 64))])


def test_a_video_stands_in_for_the_frames_that_will_come(tmp_path: Path):
    timed = make_family("qwen3-vl", tmp_path / "qwen", layers=3)
    geometry = examine(timed, image_size=(32, 64), frames=4).geometry
    film = Video((Image.new("RGB", (64, 32)),) * 4)
    prompter = Prompter(timed, geometry, Profile(visual_tokens=geometry.visual_tokens, max_text=64, max_new_tokens=1))
    counted = count_text(timed, geometry, [ASK])
    assert counted == prompter.prepare([film], [ASK]).lengths[0] - geometry.visual_tokens > 8  # timestamps are words


def test_a_folder_without_a_processor(shared: Path, tmp_path: Path):
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        (tmp_path / name).write_bytes((shared / name).read_bytes())
    with pytest.raises(BundleError, match="processor"):
        count_text(tmp_path, Bundle.open(shared).manifest.geometry, [ASK])
