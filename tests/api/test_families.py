"""One family for each mechanism, from a checkpoint to a verdict: tiles, positions of several axes, planes that early layers add.

Two images in each prompt, with words between them. `make families` measures all families.
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
from sievert.bundle.store import Bundle
from sievert.engines.run.prompt import PromptBatch, Prompter
from sievert.parity.verdict import Verdict
from tests.tiny_families import PICTURES, make_family

DYNAMIC = {"NonZero", "Compress", "Unique", "If", "Loop", "Scan", "Shape"}


@dataclass(frozen=True)
class Case:
    """A family that shows a mechanism, and the numbers of its bundle that say so; ``place`` is what a prompt names an image by."""

    place: str
    numbers: Mapping[str, Any]


CASES = {
    "smolvlm": Case("<image>", {"picture": (5, 3, 32, 32), "visual_tokens": 20, "grid": None, "position_axes": 1, "visual_planes": 0}),
    "qwen2.5-vl": Case("<|image_pad|>", {"visual_tokens": 24, "grid": (4, 6), "position_axes": 3, "visual_planes": 0}),
    "qwen3-vl": Case("<|image_pad|>", {"visual_tokens": 24, "grid": (4, 6), "position_axes": 3, "visual_planes": 2}),
}


@pytest.fixture(scope="module", params=CASES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def bundle(family: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with `full` and a pruned variant, beside its checkpoint and data. Not to be changed."""
    folder, (width, height) = tmp_path_factory.mktemp("family"), PICTURES[family]
    checkpoint = make_family(family, folder / "checkpoint", layers=3, vision={"depth": 3} if "qwen" in family else {"num_hidden_layers": 2})
    sizes: dict[str, Any] = {"image_size": (height, width), "images": 2, "batch": 2, "max_text": 40, "max_new_tokens": 3}
    sievert.export(checkpoint, folder / "bundle", cuts=(sievert.Cut(layer=1, keep="40%"),), **sizes)
    rng, place = np.random.default_rng(0), CASES[family].place
    for name in "abc":
        Image.fromarray(rng.integers(0, 256, (height, width, 3), np.uint8)).save(folder / f"{name}.png")
    lines = [
        {"images": ["a.png", "b.png"], "prompt": f"which {place} is red {place} the digit ?"},
        {"images": ["c.png", "a.png"], "prompt": "what colour"},
    ]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "bundle"


def prepare(bundle: Path) -> PromptBatch:
    opened = Bundle.open(bundle)
    prompter = Prompter(bundle, opened.manifest.geometry, opened.variant("full").profile)
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


def test_parity_of_prompts_with_words_between_two_images(bundle: Path):
    checked = sievert.check(bundle, data=bundle.parent / "data.jsonl", tokens=2)
    assert [(outcome.variant, outcome.ran.verdict) for outcome in checked.outcomes] == [("full", Verdict.PASS), ("iwp-40", Verdict.PASS)]
    planes = Bundle.open(bundle).manifest.geometry.visual_planes
    for outcome in checked.outcomes:
        compared = {stage.stage: stage.comparisons for stage in outcome.ran.stages}
        assert compared.get("vision planes", 0) == 2 * planes


def test_the_ids_of_positions_are_the_models_own(bundle: Path):
    """Ids, not only what follows from them: where they are wrong a model goes on to speak fluently."""
    batch, opened = prepare(bundle), Bundle.open(bundle)
    axes = opened.manifest.geometry.position_axes
    if axes == 1:
        assert batch.position_ids.ndim == 2 and batch.shifts == (0, 0)
        return
    kind: Any = getattr(transformers, opened.manifest.source.architecture)
    model = kind.from_pretrained(bundle.parent / "checkpoint").model
    for row, processed in enumerate(batch.processed):
        arrays = {name: torch.as_tensor(processed[name]) for name in ("input_ids", "mm_token_type_ids", "image_grid_thw")}
        expected, delta = model.get_rope_index(**arrays)
        assert expected.shape == (axes, 1, batch.lengths[row])
        np.testing.assert_array_equal(batch.position_ids[:, row, : batch.lengths[row]], expected[:, 0])
        assert batch.shifts[row] == int(delta)
