"""The selectors that rate tokens by attention or by what layers do, in ONNX Runtime against their float64 transcriptions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sievert.parity.selectors.registry import reference_selector
from sievert.parity.selectors.sparsevlm import LEAD, RATERS
from tests.parity.stage_cases import FAST, MARGIN, Shape, assert_chosen_by_formula, assume_ties_are_exact, make_case, next_case, shapes

FEW = settings(FAST, max_examples=40)
TEXT = st.sampled_from(("after_image", "all"))
OPTIONS: dict[str, st.SearchStrategy[dict[str, Any]]] = {
    "fastv": st.just({}),
    "pyramiddrop": st.just({}),
    "sparsevlm": st.fixed_dictionaries({"text": TEXT}),
    "transprune": st.fixed_dictionaries(
        {"weights": st.sampled_from(("sequence", "image")), "text": TEXT, "first": st.sampled_from((-1, 0, 3, 6))}
    ),
}


@st.composite
def named(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    name = draw(st.sampled_from(sorted(OPTIONS)))
    return name, draw(OPTIONS[name])


@settings(FAST, max_examples=100)
@given(selector=named(), shape=shapes())
def test_attention_selectors_are_the_formula(selector: tuple[str, dict[str, Any]], shape: Shape) -> None:
    assert_chosen_by_formula(make_case(*selector, shape), exactly=False)


@settings(FAST, max_examples=30)
@given(selector=named(), shape=shapes(ties=True, most=24))
def test_equal_attention_goes_to_the_lower_index(selector: tuple[str, dict[str, Any]], shape: Shape) -> None:
    case = make_case(*selector, shape)
    assume_ties_are_exact(case)
    assert_chosen_by_formula(case, exactly=True)


@FEW
@given(
    selector=named().filter(lambda selector: selector[0] in {"sparsevlm", "transprune"}),
    shape=shapes(),
    share=st.floats(0, 1),
    further=st.integers(1, 2),
)
def test_a_second_cut_goes_on_from_what_the_first_left(
    selector: tuple[str, dict[str, Any]], shape: Shape, share: float, further: int
) -> None:
    name, options = selector
    first = make_case(name, options, shape)
    result = assert_chosen_by_formula(first, exactly=False)
    transcription = reference_selector(name, options)
    carried = tuple(transcription.select(inputs, shape.keep).carried for inputs in first.samples())
    for row, alone in enumerate(carried):
        assert result.carried and set(result.carried) <= set(alone)
        for what, values in result.carried.items():
            assert values.shape == (shape.batch, first.geometry.sequence)
            near = what == RATERS and (np.abs(alone[LEAD][first.sample(row).text_rows(options["text"])]) <= MARGIN.score).any()
            assert near or np.abs(values[row, : first.real(row)] - alone[what]).max() <= MARGIN.score * max(1.0, alone[what].max()), what
    keep = max(1, round(share * shape.keep))
    later = replace(shape, layer=shape.layer + further, since=shape.layer, keep=keep, seed=shape.seed + 1)
    second = next_case(first, result.order, result.carried, carried, later)
    assert_chosen_by_formula(second, exactly=False)
