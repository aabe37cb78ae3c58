"""The ONNX selectors, run by ONNX Runtime padded and batched, choose what their float64 transcriptions choose alone and unpadded."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sievert.parity.selectors.registry import reference_selector
from tests.parity.stage_cases import FAST, Shape, assert_chosen_by_formula, assume_ties_are_exact, make_case, shapes


@st.composite
def iwp_options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "first_chunk": draw(st.sampled_from((1, 2, 3, 8, 64))),
        "growth": draw(st.sampled_from((1, 2, 4))),
        "strength": draw(st.sampled_from((0.0, 0.5, 1.0, 5.0, 10.0))),
        "floor": draw(st.sampled_from((0.01, 0.2))),
        "head_norm": draw(st.sampled_from(("global", "softmax"))),
        "scaling": draw(st.sampled_from(("minmax", "max"))),
        "text": draw(st.sampled_from(("after_image", "all"))),
        "duplication": draw(st.sampled_from(("mean_of_squares", "square_of_mean"))),
        "magnitude_rotary": draw(st.booleans()),
        "duplication_rotary": draw(st.booleans()),
    }


@FAST
@given(shape=shapes(), options=iwp_options())
def test_iwp_is_the_formula(shape: Shape, options: dict[str, Any]) -> None:
    assert_chosen_by_formula(make_case("iwp", options, shape), exactly=False)


@settings(FAST, max_examples=60)
@given(shape=shapes(ties=True), options=iwp_options())
def test_iwp_gives_equal_scores_to_the_lower_index(shape: Shape, options: dict[str, Any]) -> None:
    case = make_case("iwp", options, shape)
    assume_ties_are_exact(case)
    assert_chosen_by_formula(case, exactly=True)


@pytest.mark.parametrize("seed", range(20))
def test_iwp_chooses_the_very_same_sets(seed: int) -> None:
    shape = Shape(batch=3, heads=8, kv_heads=2, d=16, visual=64, original=64, keep=14, extra=9, seed=seed, spread=1.0)
    assert_chosen_by_formula(make_case("iwp", {}, shape), exactly=True)


@pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "sparsevlm", "transprune", "dart", "divprune", "cdpruner"])
def test_others_choose_the_very_same_sets(name: str) -> None:
    for seed in range(4):
        shape = Shape(batch=3, heads=8, kv_heads=2, d=16, visual=64, original=64, keep=14, extra=9, seed=seed, spread=0.5)
        assert_chosen_by_formula(make_case(name, {}, shape), exactly=True)


@settings(FAST, max_examples=30)
@given(shape=shapes(), options=iwp_options())
def test_magnitude_is_iwp_without_strength(shape: Shape, options: dict[str, Any]) -> None:
    kept = {name: options[name] for name in ("head_norm", "scaling", "text", "magnitude_rotary")}
    assert_chosen_by_formula(make_case("magnitude", kept, shape), exactly=False)


@settings(FAST, max_examples=30)
@given(shape=shapes(), seed=st.integers(0, 2**20))
def test_random_is_the_agreed_permutation(shape: Shape, seed: int) -> None:
    case = make_case("random", {"seed": seed}, shape)
    for order, inputs in zip(case.run().order, case.samples(), strict=True):
        assert reference_selector("random", {"seed": seed}).select(inputs, shape.keep).order.tolist() == order.tolist()


@settings(FAST, max_examples=30)
@given(shape=shapes())
def test_uniform_is_the_stride(shape: Shape) -> None:
    case = make_case("uniform", {}, shape)
    for order, inputs in zip(case.run().order, case.samples(), strict=True):
        assert reference_selector("uniform", {}).select(inputs, shape.keep).order.tolist() == order.tolist()
