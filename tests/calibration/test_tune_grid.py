"""Which plans a search may choose from."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sievert.bundle.errors import PlanError
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.calibration.tune_grid import FLOORS, KEEPS, Grid, cut_line, make_lines, refine, vary_options
from sievert.graph_passes.selectors import registry
from tests.geometries import make_geometry


@pytest.fixture
def model() -> tuple[Geometry, Profile]:
    """A small decoder of 4 layers; its images have 4 x 4 patches."""
    return make_geometry(), Profile(visual_tokens=16, max_text=24, max_new_tokens=8)


def test_every_selector_is_tried_before_layers_of_the_first_half_and_the_floors_are_not(model: tuple[Geometry, Profile]):
    deep = replace_depth(model[0], 28), model[1]
    lines = make_lines(Grid(), *deep).lines
    assert {line.selector for line in lines} == set(registry.SELECTORS) - set(FLOORS)
    assert {line.layers[0] for line in lines if line.selector == "iwp"} == {0, 2, 4, 6, 10, 14}
    assert {line.layers for line in lines if line.selector in ("divprune", "visionzip", "fopru")} == {(0,)}
    schedules = {line.selector: line.layers for line in lines if len(line.layers) > 1}
    assert set(schedules) == {"pyramiddrop", "sparsevlm", "transprune"} and schedules["pyramiddrop"] == (7, 14, 21)
    for line in lines:
        kept = [plan.stages[-1].keep for plan in line.plans]
        assert kept == sorted(set(kept)) and kept[-1] < model[1].visual_tokens


def replace_depth(geometry: Geometry, depth: int) -> Geometry:
    return geometry.model_copy(update={"depth": depth})


def test_what_a_selector_cannot_make_is_listed_with_the_reason(model: tuple[Geometry, Profile]):
    made = make_lines(Grid(("iwp", "fastv"), (0, 1), ("50%",)), *model)
    assert [(line.selector, line.layers) for line in made.lines] == [("iwp", (0,)), ("iwp", (1,)), ("fastv", (1,))]
    assert list(made.refused) == ["fastv before layer 0"] and "choose 1..3" in made.refused["fastv before layer 0"]


@pytest.mark.parametrize(
    ("grid", "says"),
    [
        (Grid(("visionzip",), (2,), KEEPS), "nothing is left to search: .*before layer 0 only"),
        (Grid(("iwp",), (1,), ("100%",)), "would keep everything"),
        (Grid(("iwp",), (4,), KEEPS), "layer=4 but the decoder has 4 layers: choose 0..3"),
        (Grid(("iwp",), (1,), ("22%", "17")), "keep=17 but the model has 16 visual tokens"),
        (Grid(("iwp",), (1,), ("0%",)), "above 0%"),
        (Grid(("iwp",), (1,), ("0.5",)), "ambiguous"),
        (Grid(("iwp",), (1,), ()), "no keep is given"),
        (Grid(("none",), (1,), KEEPS), "no selector 'none'"),
    ],
)
def test_a_grid_that_holds_nothing_is_refused(model: tuple[Geometry, Profile], grid: Grid, says: str):
    with pytest.raises(PlanError, match=says):
        make_lines(grid, *model)


def test_leaders_are_varied_one_option_at_a_time_and_never_by_their_seed(model: tuple[Geometry, Profile]):
    (line,) = make_lines(Grid(("iwp",), (1,), ("25%", "50%")), *model).lines
    varied = vary_options(line, ("25%", "50%"), *model)
    assert all(len(other.options) == 1 and len(other.plans) == 2 for other in varied)
    tried = {(key, value) for other in varied for key, value in other.options.items()}
    assert {("strength", 2.5), ("strength", 10.0), ("head_norm", "softmax"), ("duplication_rotary", False), ("growth", 1)} <= tried
    (drawn,) = make_lines(Grid(("random",), (1,), ("25%",)), *model).lines
    assert vary_options(drawn, ("25%",), *model) == []
    back = [dict(other.options) for other in vary_options(replace(line, options={"head_norm": "softmax"}), ("25%",), *model)]
    assert {} in back and {"head_norm": "softmax", "strength": 2.5} in back  # defaults are not written


def test_keeps_in_between_lie_between(model: tuple[Geometry, Profile]):
    (line,) = make_lines(Grid(("iwp",), (1,), ("2", "10")), *model).lines
    between = refine(line, 1, *model)
    assert between is not None and [plan.stages[0].keep for plan in between.plans] == [4, 6, 8]
    (narrow,) = make_lines(Grid(("iwp",), (1,), ("2", "3")), *model).lines
    assert refine(narrow, 1, *model) is None
    cut = cut_line(line, 1)
    assert cut is not None and [plan.stages[0].keep for plan in cut.plans] == [2]
    assert cut_line(line, 0) is None
