"""The floors: random and uniform."""

from __future__ import annotations

import numpy as np
import pytest

from sievert.graph_passes.selectors.random_ import Random
from sievert.graph_passes.selectors.uniform import Uniform
from tests.graph_passes.selectors.harness import make_geometry, random_feeds, run_standalone


@pytest.mark.parametrize("seed", [0, 7])
def test_random_takes_the_head_of_its_permutation(seed):
    geometry = make_geometry(visual=20, keep=6, batch=2)
    result = run_standalone(Random(seed=seed), geometry, random_feeds(geometry, 0))
    permutation = np.random.default_rng(seed).permutation(20)
    assert result.order.tolist() == [permutation[:6].tolist()] * 2
    assert result.scores[0, permutation].tolist() == list(range(20, 0, -1))


def test_random_goes_on_along_the_same_permutation_after_a_cut():
    permutation = np.random.default_rng(0).permutation(20)
    left = np.sort(permutation[:10])  # what a first stage that kept 10 left
    geometry = make_geometry(visual=10, keep=4, original_visual=20)
    result = run_standalone(Random(), geometry, {**random_feeds(geometry, 0), "original_index": left[None]})
    assert left[result.order[0]].tolist() == permutation[:4].tolist()


def test_random_takes_the_first_that_are_left():
    permutation = np.random.default_rng(0).permutation(8)
    left = np.sort(permutation[[1, 3, 4, 6]])  # another selector cut before
    geometry = make_geometry(visual=4, keep=2, original_visual=8)
    result = run_standalone(Random(), geometry, {**random_feeds(geometry, 0), "original_index": left[None]})
    assert left[result.order[0]].tolist() == permutation[[1, 3]].tolist()


@pytest.mark.parametrize(
    ("visual", "keep", "places"), [(10, 2, [2, 7]), (9, 3, [1, 4, 7]), (5, 3, [0, 2, 4]), (4, 4, [0, 1, 2, 3]), (7, 1, [3]), (1, 1, [0])]
)
def test_uniform_places(visual, keep, places):
    geometry = make_geometry(visual=visual, keep=keep, batch=2)
    result = run_standalone(Uniform(), geometry, {})
    assert result.order.tolist() == [places] * 2
    assert np.flatnonzero(result.scores[1]).tolist() == places
    assert set(result.scores.ravel()) <= {0, 1}
