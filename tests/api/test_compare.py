"""`sievert compare-selectors`: one question with every selector, in memory, drawn in one picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sievert as package
from sievert.bundle.errors import EngineError
from sievert.bundle.store import Bundle
from sievert.drawing import Tile, draw_tiles
from sievert.engines.run.pipeline import Pipeline
from sievert.engines.run.rtx import TensorRT
from sievert.graph_passes.selectors.registry import SELECTORS
from tests.api.conftest import content, sievert
from tests.api.test_bad_input import refused

ASK = "which digit is red ?"


def test_every_selector_is_tried_or_refused_with_the_reason(bundle: Path, picture: Path, tmp_path: Path):
    before = content(bundle)
    said = sievert("compare-selectors", bundle, "--image", picture, "--prompt", ASK, "--max-new-tokens", 2, "--out", tmp_path / "all.png")
    assert said.code == 0, said.all
    assert content(bundle) == before
    scheduled = {name for name, entry in SELECTORS.items() if entry.schedule.shares}  # three cuts do not fit four layers
    for name in SELECTORS:
        (line,) = [line for line in said.out.splitlines() if line.split()[:1] == [name]]
        assert ("not tried: 3 cuts need 5 layers" in line) is (name in scheduled)
        assert ("4 of 16 from layer" in line) is (name not in scheduled)
    drawn = Image.open(tmp_path / "all.png")
    panels = 1 + len(SELECTORS) - len(scheduled)
    assert drawn.width > 448 * int(panels**0.5) and drawn.height > 448 * int(panels**0.5)


def test_a_preview_says_and_keeps_what_the_variant_does(bundle: Path, picture: Path):
    names = ["iwp", "visionzip", "transprune"]
    found = package.compare_selectors(bundle, picture, ASK, selectors=names, keep="5", layer=0)
    assert [each.selector for each in found.compared] == ["iwp", "visionzip"] and list(found.refused) == ["transprune"]
    for each in found.compared:
        made = package.prune(bundle, cuts=[package.Cut(keep="5", layer=0, selector=each.selector)])
        assert made.variant.plan == each.plan
        (answer,) = package.run(bundle, picture, [ASK], variant=made.name).answers
        assert (answer.text.strip(), answer.kept) == (each.answer, (each.kept,))
    (unpruned,) = package.run(bundle, picture, [ASK], variant="full").answers
    assert found.answer == unpruned.text.strip()


def test_a_scheduled_selector_makes_one_cut_where_both_are_given(shared: Path, picture: Path):
    found = package.compare_selectors(shared, picture, ASK, selectors=["pyramiddrop"], keep="25%", layer=2, max_new_tokens=1)
    assert [(stage.layer, stage.keep) for stage in found.compared[0].plan.stages] == [(2, 4)] and len(found.compared[0].kept) == 4


def test_one_keep_is_one_cut_and_one_budget_for_every_selector(shared: Path, picture: Path):
    found = package.compare_selectors(shared, picture, ASK, keep="25%", max_new_tokens=1)
    cuts = {each.selector: [(stage.layer, stage.keep) for stage in each.plan.stages] for each in found.compared}
    assert cuts.keys() == SELECTORS.keys() and not found.refused
    assert {keep for stages in cuts.values() for _, keep in stages} == {4} and {len(stages) for stages in cuts.values()} == {1}
    assert cuts["pyramiddrop"] == cuts["sparsevlm"] == cuts["transprune"] == cuts["iwp"] == [(1, 4)]
    assert {each.plan.positions for each in found.compared} == {"keep"}
    assert "seventh of the depth" in " ".join(sievert("compare-selectors", "--help").out.replace("│", " ").split())


def test_a_prompt_without_a_question_is_a_reason_not_the_end(shared: Path, picture: Path):
    found = package.compare_selectors(shared, picture, f"{ASK} <image>", template=False, max_new_tokens=1)
    assert {"uniform", "divprune", "visionzip"} <= {each.selector for each in found.compared}
    assert "no text after the image" in found.refused["iwp"] and found.answer is not None
    options = ("--raw-prompt", "--max-new-tokens", 1, "--selectors", "iwp")
    refused("compare-selectors", shared, "--image", picture, "--prompt", f"{ASK} <image>", *options, says="no text after the image")


def test_show_kept_draws_every_stage_of_any_selector(bundle: Path, picture: Path, tmp_path: Path):
    cuts = [package.Cut("50%", 0, "visionzip"), package.Cut("25%", 1, "pyramiddrop"), package.Cut("2", 3, "sparsevlm")]
    made = package.prune(bundle, cuts=cuts)
    options = ("--variant", made.name, "--image", picture, "--prompt", ASK, "--max-new-tokens", 1, "--show-kept", tmp_path / "kept.png")
    said = sievert("run", bundle, *options)
    assert said.code == 0, said.all
    assert Image.open(tmp_path / "kept.png").width > 4 * 448
    (answer,) = package.run(bundle, picture, [ASK], variant=made.name, max_new_tokens=1).answers
    first, second, third = map(set, answer.kept)
    assert (len(first), len(second), len(third)) == (8, 4, 2) and third < second < first


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (("--selectors", "iwp,best"), ("'best'", "iwp")),
        (("--keep", "0.22"), "keep=0.22 is ambiguous"),
        (("--keep", "99", "--layer", 1), "choose 1..16"),
        (("--layer", "first"), ("--layer 'first'", "auto")),
        (("--selectors", "iwp", "--layer", 4), ("layer=4", "choose 0..3")),
        (("--selectors", "pyramiddrop", "--layer", "1"), "neither --layer nor --keep"),
        (("--selectors", "fastv,visionzip", "--layer", 0, "--keep", "0%"), "above 0%"),
        (("--out", "compare.jpg"), ".png"),
        (("--out", "no/folder/compare.png"), "no folder"),
        (("--prompt", " "), "the prompt is empty"),
        (("--prompt", "w1 " * 40), "this variant takes 24"),
        (("--max-new-tokens", 9), ("max_new_tokens=9", "1..8")),
        (("--image", "missing.png"), "does not exist"),
        (("--image", "one.png", "--image", "two.png"), "2 images for a prompt, but this variant takes 1 per prompt"),
    ],
)
def test_compare_refuses_what_it_cannot_try(shared: Path, picture: Path, tmp_path: Path, options: tuple[object, ...], says: str):
    image = () if "--image" in options else ("--image", picture)
    given = [*image, "--prompt", ASK, "--out", tmp_path / "compare.png", *options]
    refused("compare-selectors", shared, *given, says=says, keeps=shared)
    assert list(tmp_path.iterdir()) == []


def test_graphs_in_memory_are_for_runtimes_that_read_onnx(shared: Path):
    with pytest.raises(EngineError, match="graphs in memory run with the engine onnxruntime"):
        Pipeline(Bundle.open(shared), "full", TensorRT("tensorrt-rtx"), graphs={"prefill": b""})
    with pytest.raises(EngineError, match="refused the graph"):
        Pipeline(Bundle.open(shared), "full", graphs={"prefill": b"no graph"})


def test_tiles_are_dimmed_where_patches_were_dropped():
    white = Image.new("RGB", (32, 32), "white")
    drawn = np.asarray(draw_tiles([white], (2, 2), ASK, [Tile("all", "x", None), Tile("one", "y", frozenset({3}))]))
    bright = (drawn == 255).all(axis=2)
    assert 448 * 448 < bright.sum() < 448 * 448 * 1.26
