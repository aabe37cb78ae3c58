"""The selectors that compare vectors or trust the vision encoder, in ONNX Runtime against their float64 transcriptions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.parity.stage_cases import FAST, Shape, assert_chosen_by_formula, assume_ties_are_exact, make_case, shapes

TEXT = st.sampled_from(("after_image", "all"))
OPTIONS = {
    "dart": st.fixed_dictionaries({"on": st.sampled_from(("keys", "embeddings")), "text": TEXT}),
    "divprune": st.just({}),
    "cdpruner": st.fixed_dictionaries({"text": TEXT}),
}
VISION = {
    "fopru": st.fixed_dictionaries({"strategy": st.just("rank"), "queries": st.sampled_from(("mean", "class_token"))}),
    "visionzip": st.fixed_dictionaries({"queries": st.sampled_from(("auto", "class_token", "mean"))}),
}


@st.composite
def named(draw: st.DrawFn, options: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(options)))
    return name, draw(options[name])


@settings(FAST, max_examples=90)
@given(selector=named(OPTIONS), shape=shapes(most=28))
def test_vector_selectors_are_the_formula(selector: tuple[str, dict[str, Any]], shape: Shape) -> None:
    assert_chosen_by_formula(make_case(*selector, shape), exactly=False)


@settings(FAST, max_examples=30)
@given(selector=named({name: OPTIONS[name] for name in ("dart", "divprune")}), shape=shapes(ties=True, most=24))
def test_equal_vectors_go_to_the_lower_index(selector: tuple[str, dict[str, Any]], shape: Shape) -> None:
    case = make_case(*selector, shape)
    assume_ties_are_exact(case)
    assert_chosen_by_formula(case, exactly=True)


@settings(FAST, max_examples=20)
@given(selector=named(VISION), shape=shapes(ties=True, layers=(0, 0)))
def test_the_vision_encoder_decides(selector: tuple[str, dict[str, Any]], shape: Shape) -> None:
    assert_chosen_by_formula(make_case(*selector, replace(shape, original=shape.visual)), exactly=True)


@settings(FAST, max_examples=20)
@given(shape=shapes(ties=True, layers=(0, 0)), rows=st.integers(1, 6), columns=st.integers(1, 6), share=st.floats(0, 1))
def test_whole_rows_of_the_picture(shape: Shape, rows: int, columns: int, share: float) -> None:
    visual = rows * columns
    whole = replace(shape, visual=visual, original=visual, keep=columns * max(1, round(share * rows)), grid=(rows, columns))
    assert_chosen_by_formula(make_case("fopru", {"strategy": "row"}, whole), exactly=True)
