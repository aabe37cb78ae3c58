"""One bundle of a tiny random LLaVA, two pictures, and questions about them."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sievert
from sievert.bundle.plan import Plan
from sievert.bundle.store import Bundle
from sievert.calibration.collection import Collection
from sievert.exporter.write import write_bundle
from sievert.graph_passes.prune import add_variant
from sievert.planning import make_profile
from tests.tiny_llava import export_tiny

PROMPTS = ("which digit is red ?", "what is the colour ?", "which ?", "what is the digit ?", "is the digit green ?")


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with the variants full, iwp-22, pair (batch 2), slots (batch 2, three decode slots) and two (batch 2, two images in each
    prompt). Not to be changed.
    """
    bundle = write_bundle(export_tiny("clip-llama")[1], tmp_path_factory.mktemp("calibration") / "bundle")
    profile = make_profile(bundle.manifest.geometry, max_text=24, max_new_tokens=8)
    add_variant(bundle, name="full", plan=Plan(), profile=profile)
    path = bundle.path
    sievert.prune(path, cuts=[sievert.Cut(keep="22%")])
    sievert.prune(path, cuts=[sievert.Cut(selector="visionzip")], name="pair", batch=2)
    sievert.prune(path, cuts=(), name="slots", batch=2, decode_batch=3)
    sievert.prune(path, cuts=[sievert.Cut(keep="28%")], name="two", batch=2, images=2)
    return path


@pytest.fixture(scope="session")
def collected(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Collection:
    """A real picture, ``a.png`` beside the data, and questions through iwp-22. Not to be changed."""
    folder = tmp_path_factory.mktemp("quantise")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3)).astype(np.uint8)).save(folder / "a.png")
    lines = [json.dumps({"image": "a.png", "prompt": prompt}) for prompt in PROMPTS[:3]]
    (folder / "questions.jsonl").write_text("\n".join(lines) + "\n")
    return sievert.collect(made, folder / "questions.jsonl", variant="iwp-22", decode_steps=1, out=folder / "data")


@pytest.fixture
def bundle(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Five questions about two pictures, after an empty line."""
    folder = tmp_path / "data"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for name in "ab":
        Image.fromarray(rng.integers(0, 256, (9, 12, 3)).astype(np.uint8)).resize((120, 90)).save(folder / f"{name}.png")
    lines = [json.dumps({"image": f"{'ab'[i % 2]}.png", "prompt": prompt}) for i, prompt in enumerate(PROMPTS)]
    path = folder / "questions.jsonl"
    path.write_text("\n" + "\n".join(lines) + "\n")
    return path


def edit_weight(bundle: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Change the one weight of a float32 bundle whose name holds ``name``, hashes included."""
    manifest = Bundle.open(bundle).manifest
    (weight,) = [each for each in manifest.weights if name in each.name]
    path = bundle / manifest.weights_file
    content = bytearray(path.read_bytes())
    place = slice(weight.offset, weight.offset + weight.nbytes)
    content[place] = change(np.frombuffer(bytes(content[place]), np.float32)).astype(np.float32).tobytes()
    path.write_bytes(content)
    raw = json.loads((bundle / "sievert.json").read_text())
    (entry,) = [each for each in raw["weights"] if each["name"] == weight.name]
    entry["sha256"] = hashlib.sha256(bytes(content[place])).hexdigest()
    raw["files"][manifest.weights_file]["sha256"] = hashlib.sha256(bytes(content)).hexdigest()
    (bundle / "sievert.json").write_text(json.dumps(raw))
