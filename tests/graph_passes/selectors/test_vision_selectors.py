"""FoPru and VisionZip: what they take by given scores, what their keeps mean, and what they refuse."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.specs import Geometry
from sievert.graph_passes.selectors.base import StageInputs, VisionTap
from sievert.graph_passes.selectors.fopru import FoPru
from sievert.graph_passes.selectors.registry import SELECTORS, make
from sievert.graph_passes.selectors.schedule import EMBEDDINGS
from sievert.graph_passes.selectors.visionzip import VisionZip
from sievert.planning import Cut, make_plan
from tests.bundle.small import GEOMETRY
from tests.graph_passes.selectors.harness import make_geometry, random_feeds, run_standalone

MODEL = GEOMETRY.model_copy(update={"grid": (6, 8), "visual_tokens": 48, "vision_layers": 24, "class_tokens": 1})
ROWS = FoPru(strategy="row")


def stage_of(selector: str = "fopru", *, layer: int = 0, keep: int = 8, options: dict[str, Any] | None = None) -> Stage:
    return Stage(selector=selector, layer=layer, keep=keep, requested=str(keep), options=options or {})


def test_taps_and_schedules() -> None:
    assert FoPru().vision_tap == VisionTap("feature", "mean")
    assert FoPru(queries="class_token").vision_tap == VisionTap("feature", "class_token")
    assert VisionZip().vision_tap == VisionTap("second_last", "auto")
    assert VisionZip(queries="mean").vision_tap == VisionTap("second_last", "mean")
    for name in ("fopru", "visionzip"):
        assert make(name, {}).taps(0, 28) == ()
        assert SELECTORS[name].schedule == EMBEDDINGS
    assert {name for name in SELECTORS if make(name, {}).vision_tap is not None} == {"fopru", "visionzip"}


@pytest.mark.parametrize("selector", [FoPru(), VisionZip()])
def test_the_highest_scores_are_taken_and_the_lower_place_of_equals(selector: FoPru | VisionZip) -> None:
    geometry = make_geometry(visual=12, keep=5, batch=2, layer=0)
    scores = np.array([[0.1, 0.9, 0.3, 0.9, 0.0, 0.2, 0.3, 0.3, 0.8, 0.0, 0.0, 0.1], np.linspace(0, 1, 12)], np.float32)
    result = run_standalone(selector, geometry, random_feeds(geometry, 0) | {"visual_scores": scores})
    assert result.order.tolist() == [[1, 3, 8, 2, 6], [11, 10, 9, 8, 7]]
    np.testing.assert_array_equal(result.scores, scores)


def test_rows_are_taken_whole_and_by_their_sums() -> None:
    """The second row holds the highest token, the third the highest sum; two rows are equal."""
    geometry = make_geometry(visual=12, keep=9, grid=(4, 3), layer=0)
    grid = np.array([[0.1, 0.2, 0.1], [0.9, 0.0, 0.0], [0.5, 0.5, 0.5], [0.2, 0.1, 0.1]], np.float32)
    result = run_standalone(ROWS, geometry, random_feeds(geometry, 1) | {"visual_scores": grid.reshape(1, 12)})
    assert result.order.tolist() == [[6, 7, 8, 3, 4, 5, 0, 1, 2]]
    np.testing.assert_allclose(result.scores[0], np.repeat(grid.sum(1), 3), rtol=1e-6)


@pytest.mark.parametrize(("keep", "batch"), [(8, 1), (24, 3), (48, 2)])
def test_rows_of_random_scores(keep: int, batch: int) -> None:
    geometry = make_geometry(visual=48, keep=keep, batch=batch, grid=(6, 8), layer=0)
    feeds = random_feeds(geometry, 2)
    result = run_standalone(ROWS, geometry, feeds)
    sums = feeds["visual_scores"].reshape(batch, 6, 8).sum(2)
    best = np.argsort(-sums, axis=1, kind="stable")[:, : keep // 8]
    np.testing.assert_array_equal(result.order, (best[..., None] * 8 + np.arange(8)).reshape(batch, keep))


@pytest.mark.parametrize(
    ("requested", "tokens", "rows"),
    [("22%", 11, 8), ("25%", 12, 16), ("50%", 24, 24), ("1%", 1, 8), (" 100% ", 48, 48), ("16", 16, 16)],
)
def test_keeps(requested: str, tokens: int, rows: int) -> None:
    """25 % of 6 rows is 1.5, which rounds half up."""
    assert [selector.resolve_keep(requested, MODEL) for selector in (FoPru(), VisionZip(), ROWS)] == [tokens, tokens, rows]


@pytest.mark.parametrize(
    ("requested", "words"),
    [
        ("12", "keep=12 but strategy=row keeps whole rows of 8 tokens: choose a multiple of 8, such as 16"),
        ("1", "choose a multiple of 8, such as 8"),
        ("49", "keep=49 but the model has 48 visual tokens"),
        ("0%", "above 0%"),
        ("0.22", "write 22% for a share"),
    ],
)
def test_keeps_that_are_no_rows(requested: str, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ROWS.resolve_keep(requested, MODEL)


def changed(**update: Any) -> Geometry:
    return MODEL.model_copy(update=update)


@pytest.mark.parametrize(
    ("stage", "model", "words"),
    [
        (stage_of(layer=1), MODEL, "selector fopru scores in the vision encoder.* before layer 0, .* layer 1: use layer 0"),
        (stage_of("visionzip", layer=1), MODEL, "selector visionzip scores in the vision encoder"),
        (stage_of(options={"queries": "class_token"}), changed(class_tokens=0), "no class token .* use queries=mean"),
        (stage_of("visionzip", options={"queries": "class_token"}), changed(class_tokens=0), "no class token .* use queries=mean"),
        (stage_of("visionzip"), changed(vision_layers=0), "this bundle was made without: export the model again"),
        (stage_of(options={"queries": "class_token"}), changed(vision_layers=0), "export the model again"),
        (stage_of("visionzip"), changed(vision_layers=1), "reads the second-last layer of the vision encoder, which has but one"),
        (stage_of(keep=12, options={"strategy": "row"}), MODEL, "multiple of 8"),
        (stage_of(options={"strategy": "row"}), changed(visual_tokens=49), r"6 x 8 patches, but .* 49 visual tokens .* use strategy=rank"),
        (stage_of("fopru", options={"strategy": "column"}), MODEL, "strategy='column' must be rank or row"),
        (stage_of("visionzip", options={"queries": "all"}), MODEL, "queries='all' must be auto or class_token or mean"),
    ],
)
def test_stages_that_cannot_be_made(stage: Stage, model: Geometry, words: str) -> None:
    with pytest.raises(PlanError, match=words):
        make(stage.selector, stage.options).check(stage, model)


@pytest.mark.parametrize(
    ("stage", "model"),
    [
        (stage_of(), changed(vision_layers=0, class_tokens=0)),
        (stage_of(options={"strategy": "row", "queries": "class_token"}), MODEL),
        (stage_of(), changed(visual_tokens=49)),
        (stage_of("visionzip"), changed(class_tokens=0)),
        (stage_of("visionzip", options={"queries": "mean"}), changed(vision_layers=2)),
    ],
)
def test_stages_that_can(stage: Stage, model: Geometry) -> None:
    make(stage.selector, stage.options).check(stage, model)


def test_scores_that_nobody_gave() -> None:
    geometry = make_geometry(visual=4, keep=2, layer=3)
    nothing: Any = None
    inputs = StageInputs(geometry, nothing, nothing, nothing, nothing, nothing, nothing, {}, {})
    with pytest.raises(PlanError, match="no scores of the vision encoder before layer 3"):
        inputs.require_visual_scores()


def test_plans_cut_before_layer_0_and_keep_what_the_selector_can() -> None:
    plan = make_plan(MODEL, [Cut(selector="fopru", keep="25%", options={"strategy": "row"})])
    assert plan == Plan(stages=(Stage(selector="fopru", layer=0, keep=16, requested="25%", options={"strategy": "row"}),))
    (stage,) = make_plan(MODEL, [Cut(selector="visionzip")]).stages
    assert (stage.layer, stage.keep, stage.requested) == (0, 11, "22%")
    with pytest.raises(PlanError, match="before layer 0"):
        make_plan(MODEL, [Cut(selector="fopru", layer=1, keep="8")])
    with pytest.raises(PlanError, match="ascending order"):
        make_plan(MODEL, [Cut(selector="uniform", layer=0, keep="16"), Cut(selector="fopru", layer=0, keep="8")])
