"""Selectors by name, and the words that refuse a wrong option."""

from __future__ import annotations

import pytest

from sievert.bundle.errors import PlanError
from sievert.graph_passes.selectors.base import Selector
from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.registry import SELECTORS, make, options


@pytest.mark.parametrize("name", SELECTORS)
def test_defaults_make_the_selector_of_that_name(name):
    selector: Selector = make(name, options(name))
    assert selector == make(name, {})
    assert selector.name == name
    assert SELECTORS[name].summary


def test_defaults_of_iwp_are_the_papers():
    assert options("iwp") == {
        "first_chunk": 2,
        "growth": 2,
        "strength": 5.0,
        "floor": 0.01,
        "head_norm": "global",
        "scaling": "minmax",
        "text": "after_image",
        "duplication": "mean_of_squares",
        "magnitude_rotary": False,
        "duplication_rotary": True,
    }
    assert options("random") == {"seed": 0}
    assert options("uniform") == {}


def test_options_reach_the_selector():
    assert make("iwp", {"strength": 10, "text": "all", "magnitude_rotary": True}) == Iwp(strength=10, text="all", magnitude_rotary=True)


@pytest.mark.parametrize(
    ("name", "given", "words"),
    [
        ("fastw", {}, "no selector 'fastw': choose from iwp, magnitude, random, uniform"),
        ("iwp", {"lambda": 5}, "selector iwp has no option 'lambda': choose from first_chunk, growth, strength"),
        ("uniform", {"seed": 5}, "selector uniform has no option 'seed': choose from none"),
        ("magnitude", {"strength": 5.0}, "selector magnitude has no option 'strength'"),
        ("iwp", {"first_chunk": 0}, "first_chunk=0 must be a whole number >= 1"),
        ("iwp", {"first_chunk": 2.0}, "first_chunk=2.0 must be a whole number >= 1"),
        ("iwp", {"first_chunk": True}, "first_chunk=True must be a whole number >= 1"),
        ("iwp", {"growth": 0}, "growth=0 must be a whole number >= 1"),
        ("iwp", {"strength": -1.0}, "strength=-1.0 must be a number >= 0"),
        ("iwp", {"strength": float("nan")}, "strength=nan must be a number >= 0"),
        ("iwp", {"strength": float("inf")}, "strength=inf must be a number >= 0"),
        ("iwp", {"strength": "5"}, "strength='5' must be a number >= 0"),
        ("iwp", {"floor": 0.0}, "floor=0.0 must be a number > 0 and <= 1"),
        ("iwp", {"floor": 1.5}, "floor=1.5 must be a number > 0 and <= 1"),
        ("iwp", {"head_norm": "max"}, "head_norm='max' must be global or softmax"),
        ("iwp", {"scaling": 1}, "scaling=1 must be minmax or max"),
        ("iwp", {"magnitude_rotary": 1}, "magnitude_rotary=1 must be true or false"),
        ("random", {"seed": -1}, "seed=-1 must be a whole number >= 0"),
    ],
)
def test_refusals_say_what_to_write_instead(name, given, words):
    with pytest.raises(PlanError) as refusal:
        make(name, given)
    assert words in str(refusal.value)


def test_a_selector_made_by_hand_is_checked_too():
    with pytest.raises(PlanError, match="floor"):
        Iwp(floor=2.0)
