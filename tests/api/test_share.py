"""Two image sizes of one model, the weights once: from the command line to verdicts."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sievert as package
from sievert.bundle.store import Bundle
from tests.api.conftest import sievert
from tests.tiny_families import make_family

ASK = "which digit is red ?"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle for pictures of 64x64 pixels, beside its checkpoint."""
    folder = tmp_path_factory.mktemp("share")
    make_family("qwen2-vl", folder / "checkpoint", layers=2)
    package.export(folder / "checkpoint", folder / "small", image_size=(64, 64), cuts=(), max_text=16, max_new_tokens=2)
    return folder / "small"


@pytest.fixture(scope="module")
def wide(small: Path) -> Path:
    """A bundle for two pictures of 64x96 pixels, over the weights of the other. The last test removes that."""
    rng = np.random.default_rng(0)
    samples: list[object] = []
    for name in ("a.png", "b.png"):
        Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)).save(small.parent / name)
        samples += ["--sample-image", small.parent / name]
    made = sievert(
        *("export", small.parent / "checkpoint", small.parent / "wide", "--share-weights", small, *samples, "--sample-prompt", ASK),
        *("--max-new-tokens", 2, "--layer", 1, "--keep", "25%"),
    )
    assert made.code == 0, made.all
    return small.parent / "wide"


def test_the_sample_decides_every_size(wide: Path):
    bundle = Bundle.open(wide)
    profile, geometry = bundle.variant("full").profile, bundle.manifest.geometry
    assert (geometry.image_height, geometry.image_width) == (64, 96)
    assert (profile.images, profile.visual_tokens, profile.max_text) == (2, 48, 16)  # 11 tokens, rounded up


def test_the_weights_are_one_file_and_what_differs_stands_beside_it(small: Path, wide: Path):
    one, two = Bundle.open(small, verify="full"), Bundle.open(wide, verify="full")
    assert one.weights_path.samefile(two.weights_path)
    own = {weight.name for weight in two.manifest.weights if weight.file}
    assert own and all(name.startswith("vision_encoder.") for name in own)
    assert {weight.name for weight in two.manifest.weights} - own <= {weight.name for weight in one.manifest.weights}
    assert f"--share-weights {small}" in two.manifest.history[0].command
    said = sievert("inspect", wide)
    assert said.code == 0 and "weights (one file, shared by 2 bundles)" in said.out, said.all


def test_what_cannot_be_shared_is_refused_before_the_model_is_read(small: Path):
    checkpoint, out = small.parent / "checkpoint", small.parent / "none"
    for arguments, words in (
        ((out, "--dtype", "float16"), "holds float32 weights and this export float16 ones"),
        ((small, "--force"), "share its weights with itself"),
        ((out,), "is no bundle"),
    ):
        other = small if words != "is no bundle" else checkpoint
        wrong = sievert("export", checkpoint, *arguments, "--image-size", "64x64", "--share-weights", other)
        assert wrong.code == 2 and words in " ".join(wrong.err.split()), wrong.all
    assert not out.exists()


def test_steps_and_verdicts_over_shared_weights_and_without_the_other_bundle(small: Path, wide: Path):
    package.quantise(wide, variant="full", format="int8-weights")  # reads the shared file
    shutil.rmtree(small)
    assert Bundle.open(wide, verify="full").weights_path.stat().st_nlink == 1
    checked = sievert("check", wide, "--variant", "iwp-25", "--samples", 1, "--tokens", 1)
    assert checked.code == 0 and "PASS over all that ran" in checked.out, checked.all
