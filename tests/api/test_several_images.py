"""Two images in each prompt, from the command line: exported, checked, asked, evaluated, compared and drawn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sievert.bundle.store import Bundle
from sievert.drawing import Panel, Row, draw_kept
from sievert.running import number_patches
from tests.api.conftest import sievert

ASK = "which digit is red ?"


@pytest.fixture(scope="module")
def pair(checkpoint: Path, place: Path) -> Path:
    """A bundle for two images in each prompt. Not to be changed."""
    bundle = place / "pair"
    made = sievert(
        *("export", checkpoint, bundle, "--images", 2, "--batch", 2, "--max-text", 24, "--max-new-tokens", 4),
        *("--layer", 1, "--keep", "28%", "--layer", 3, "--keep", 5),
    )
    assert made.code == 0, made.all
    assert "9 of 32 from layer 1 on" in made.out and "2 images" in made.out
    return bundle


@pytest.fixture(scope="module")
def other(place: Path) -> Path:
    pixels = np.random.default_rng(1).integers(0, 256, (50, 40, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(place / "other.png")
    return place / "other.png"


def test_the_manifest_says_it_and_parity_passes(pair: Path) -> None:
    variant = Bundle.open(pair).variant("iwp-28-k5")
    assert (variant.profile.images, variant.profile.visual_tokens) == (2, 32)
    assert variant.graphs["vision_encoder"].inputs[0].shape == (2, 2, 3, 32, 32)
    checked = sievert("check", pair, "--samples", 3, "--tokens", 3)
    assert checked.code == 0 and "FAIL" not in checked.out and "AMBIGUOUS" not in checked.out, checked.all


def test_questions_about_two_images(pair: Path, picture: Path, other: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "kept.png"
    two = ("--image", picture, "--image", other)
    said = sievert("run", pair, *two, "--prompt", ASK, "--show-kept", drawn)
    assert said.code == 0 and "9 of 32 visual tokens from layer 1 on, 5 of 32" in said.err, said.all
    with Image.open(drawn) as image:
        assert image.width > 3 * 2 * 448  # the pictures, and two stages of them
    raw = sievert("run", pair, *two, "--prompt", "which <image> is <image> ?", "--raw-prompt")
    assert raw.code == 0, raw.all
    for images, words in ((two[:2], "1 image for a prompt"), ((*two, *two[:2]), "3 images for a prompt")):
        wrong = sievert("run", pair, *images, "--prompt", ASK)
        assert wrong.code == 2 and f"{words}, but this variant takes 2 per prompt" in " ".join(wrong.err.split()), wrong.all


def test_data_lines_with_several_images(pair: Path, picture: Path, other: Path, tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    lines = [{"images": [str(picture), str(other)], "prompt": ASK}, {"images": [str(other), str(picture)], "prompt": "which ?"}]
    data.write_text("\n".join(map(json.dumps, lines)))
    checked = sievert("check", pair, "--variant", "iwp-28-k5", "--data", data, "--tokens", 2)
    assert checked.code == 0 and "PASS" in checked.out, checked.all
    asked = sievert("eval", pair, "--data", data, "--out", tmp_path / "eval")
    assert asked.code == 0 and "9 of 32" in asked.out, asked.all
    assert "photo.png" in (tmp_path / "eval" / "answers.csv").read_text()
    for line, words in (
        ({"image": str(picture), "prompt": ASK}, "line 1: 1 image for a prompt"),
        ({"image": "a", "images": ["b"], "prompt": ASK}, "line 1: it has both image and images"),
        ({"images": [], "prompt": ASK}, "line 1: image and prompt must be texts, images a list of texts"),
        ({"images": "a.png", "prompt": ASK}, "images a list of texts"),
    ):
        data.write_text(json.dumps(line))
        wrong = sievert("eval", pair, "--data", data, "--out", tmp_path / "wrong")
        assert wrong.code == 2 and words in " ".join(wrong.err.split()), wrong.all


def test_selectors_are_compared_on_two_images(pair: Path, picture: Path, other: Path, tmp_path: Path) -> None:
    drawn = tmp_path / "two.png"
    arguments = ("--image", picture, "--image", other, "--prompt", ASK, "--selectors", "random,uniform", "--keep", "9", "--out", drawn)
    said = sievert("compare-selectors", pair, *arguments)
    assert said.code == 0 and "9 of 32" in said.out, said.all
    assert drawn.exists()


def test_a_variant_for_another_number_of_images(bundle: Path, picture: Path, tmp_path: Path) -> None:
    made = sievert("prune", bundle, "--selector", "random", "--keep", "25%", "--images", 3)
    assert made.code == 0 and "random-25-3-images" in made.out and "12 of 48" in made.out, made.all
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"image": str(picture), "prompt": ASK}))
    wrong = sievert("eval", bundle, "--data", data, "--variant", "random-25-3-images")
    assert wrong.code == 2 and "takes 3 images per prompt and 'full' takes 1" in " ".join(wrong.err.split()), wrong.all
    refused = sievert("prune", bundle, "--selector", "random", "--keep", 2, "--images", 3)
    assert refused.code == 2 and "choose 3..48" in refused.err, refused.all


def test_patches_are_numbered_on_and_drawn_in_their_own_image(pair: Path) -> None:
    geometry = Bundle.open(pair).manifest.geometry
    assert number_patches(geometry, np.array([0, 15, 16, 31])) == (0, 15, 16, 31)
    kept_class_token = geometry.model_copy(update={"visual_tokens": 17})
    assert number_patches(kept_class_token, np.array([0, 1, 16, 17, 18, 33])) == (-1, 0, 15, -2, 16, 31)
    white = Image.new("RGB", (448, 448), "white")
    row = Row("?", "!", (Panel("one", frozenset({3, 4 + 0, -2})),))
    drawn = np.asarray(draw_kept([white, white], (2, 2), [row]))
    left = drawn[:, 16 + 2 * 448 + 4 + 16 :]  # the panel: two pictures with a gap
    body = left[2 * 23 + 16 + 10 : 2 * 23 + 16 + 440]
    assert body[20, 20].max() < 128 and body[400, 400].min() == 255  # the first keeps its last patch
    assert body[20, 452 + 20].min() == 255 and body[400, 452 + 400].max() < 128  # the second its first
