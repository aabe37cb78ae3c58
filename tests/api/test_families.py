"""One family for each mechanism, from a checkpoint to a verdict: tiles, positions of several axes, planes that early layers add.

Two images in each prompt, with words between them, or a video. `make families` measures all families.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers
from PIL import Image

import sievert
from sievert.bundle.films import GRID, SECONDS
from sievert.bundle.store import Bundle
from sievert.engines.run.prompt import PromptBatch, Prompter
from sievert.engines.run.videos import load_video
from sievert.parity.verdict import Verdict
from tests.api.conftest import sievert as command
from tests.tiny_families import PICTURES, make_family

DYNAMIC = {"NonZero", "Compress", "Unique", "If", "Loop", "Scan", "Shape"}


@dataclass(frozen=True)
class Case:
    """A family that shows a mechanism, and the numbers of its bundle that say so; ``place`` is what a prompt names an image by."""

    place: str
    numbers: Mapping[str, Any]
    sizes: Mapping[str, Any]
    vision: Mapping[str, Any]


CASES = {
    "smolvlm": Case(
        "<image>",
        {"picture": (5, 3, 32, 32), "visual_tokens": 20, "grid": None, "position_axes": 1, "visual_planes": 0, "film": None},
        {"images": 2},
        {"num_hidden_layers": 2},
    ),
    "qwen2.5-vl": Case(
        "<|video_pad|>",
        {"picture": (64, 384), "layout": {GRID: (2, 4, 8)}, "visual_tokens": 16, "grid": None, "position_axes": 3, "visual_planes": 0},
        {"frames": 4, "image_size": (32, 64)},
        {"depth": 3, "tokens_per_second": 3},
    ),
    "qwen3-vl": Case(
        "<|image_pad|>",
        {"visual_tokens": 24, "grid": (4, 6), "position_axes": 3, "visual_planes": 2, "film": None},
        {"images": 2},
        {"depth": 3},
    ),
}


@pytest.fixture(scope="module", params=CASES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with `full` and a pruned variant, beside its checkpoint and pictures. Not to be changed."""
    folder, (width, height), case = tmp_path_factory.mktemp("family"), PICTURES[family], CASES[family]
    checkpoint = make_family(family, folder / "checkpoint", layers=3, vision=case.vision)
    sizes: dict[str, Any] = {"image_size": (height, width), "batch": 2, "max_text": 40, "max_new_tokens": 3, **case.sizes}
    sievert.export(checkpoint, folder / "bundle", cuts=(sievert.Cut(layer=1, keep="40%"),), **sizes)
    rng = np.random.default_rng(0)
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    (folder / "film").mkdir()
    for number in range(7):
        Image.fromarray(rng.integers(0, 256, (32, 64, 3), np.uint8)).save(folder / "film" / f"{number}.png")
    lines = [
        {"images": ["a.png", "b.png"], "prompt": f"which {case.place} is red {case.place} the digit ?"},
        {"images": ["c.png", "a.png"], "prompt": "what colour"},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "bundle"


def prepare(family: str, bundle: Path) -> PromptBatch:
    opened = Bundle.open(bundle)
    prompter = Prompter(bundle, opened.manifest.geometry, opened.variant("full").profile)
    if CASES[family].sizes.get("frames"):
        film = load_video(bundle.parent / "film", fps=5.0)
        return prompter.prepare([film], ["what colour", f"which {CASES[family].place} is red"])
    lines = [json.loads(line) for line in (bundle.parent / "data.jsonl").read_text().splitlines()]
    return prompter.prepare([[bundle.parent / name for name in line["images"]] for line in lines], [line["prompt"] for line in lines])


def test_the_numbers_of_the_mechanism(family: str, bundle: Path):
    geometry = Bundle.open(bundle).manifest.geometry
    assert {name: getattr(geometry, name) for name in CASES[family].numbers} == CASES[family].numbers


def test_graphs_are_static(bundle: Path):
    opened = Bundle.open(bundle)
    for variant in ("full", "iwp-40"):
        for entry in opened.variant(variant).graphs.values():
            graph = ir.load(bundle / entry.file).graph
            assert not DYNAMIC & {node.op_type for node in graph.all_nodes()}
            assert all(value.shape is not None and value.shape.is_static() for value in (*graph.inputs, *graph.outputs))


def test_parity_of_a_video_or_of_prompts_with_words_between_two_images(family: str, bundle: Path):
    given: dict[str, Any] = {"samples": 2} if CASES[family].sizes.get("frames") else {"data": bundle.parent / "data.jsonl"}
    checked = sievert.check(bundle, tokens=2, **given)
    assert [(outcome.variant, outcome.ran.verdict) for outcome in checked.outcomes] == [("full", Verdict.PASS), ("iwp-40", Verdict.PASS)]
    planes = Bundle.open(bundle).manifest.geometry.visual_planes
    for outcome in checked.outcomes:
        compared = {stage.stage: stage.comparisons for stage in outcome.ran.stages}
        assert compared.get("vision planes", 0) == 2 * planes


def test_the_ids_of_positions_are_the_models_own(family: str, bundle: Path):
    """Ids, not only what follows from them: where they are wrong a model goes on to speak fluently."""
    batch, opened = prepare(family, bundle), Bundle.open(bundle)
    axes = opened.manifest.geometry.position_axes
    if axes == 1:
        assert batch.position_ids.ndim == 2 and batch.shifts == (0, 0)
        return
    kind: Any = getattr(transformers, opened.manifest.source.architecture)
    model = kind.from_pretrained(bundle.parent / "checkpoint").model
    for row, processed in enumerate(batch.processed):
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", GRID, SECONDS)
        arrays = {name: torch.as_tensor(processed[name]) for name in names if name in processed}
        expected, delta = model.get_rope_index(**arrays)
        assert expected.shape == (axes, 1, batch.lengths[row])
        np.testing.assert_array_equal(batch.position_ids[:, row, : batch.lengths[row]], expected[:, 0])
        assert batch.shifts[row] == int(delta)


def test_questions_from_the_command_line(family: str, bundle: Path, tmp_path: Path):
    film, picture = bundle.parent / "film", bundle.parent / "a.png"
    if not CASES[family].sizes.get("frames"):
        wrong = command("run", bundle, "--video", film, "--prompt", "what")
        assert wrong.code == 2 and "a video, but this variant takes images" in wrong.err, wrong.all
        Image.open(picture).resize((64, 16)).save(tmp_path / "wide.png")
        wrong = command("run", bundle, *("--image", tmp_path / "wide.png") * 2, "--prompt", "what")
        assert wrong.code == 2 and "images of 64x16 pixels became" in " ".join(wrong.err.split()), wrong.all
        return
    for source in (("--video", film), ("--video", film, "--fps", 5), [word for _ in range(4) for word in ("--image", film / "0.png")]):
        said = command("run", bundle, *source, "--prompt", "what colour")
        assert said.code == 0 and "6 of 16" in said.err, said.all
    for arguments, words in (
        (("--image", film / "0.png"), "a video of 1 frames, but this bundle was exported for 4"),
        (("--image", picture) * 4, "a frame of 96x64 pixels, but this bundle was exported for videos of 64x32"),
        (("--video", tmp_path), "is a folder without pictures"),
        (("--video", film, "--image", picture), "either --image, once for each image, or --video"),
        (("--video", film, "--fps", -1), "more than 0 frames a second"),
        ((), "either --image, once for each image, or --video"),
    ):
        wrong = command("run", bundle, *arguments, "--prompt", "what")
        assert wrong.code == 2 and words in " ".join(wrong.err.split()), wrong.all
    refused = command("prune", bundle, "--selector", "random", "--keep", "50%", "--images", 2)
    assert refused.code == 2 and "a prompt of this bundle has one video" in refused.err, refused.all
