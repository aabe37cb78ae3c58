"""What must hold of every selector, on random stages: batches, padding, earlier cuts, sizes at the edge, values at the edge."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.magnitude import Magnitude
from sievert.graph_passes.selectors.registry import SELECTORS, make
from tests.graph_passes.selectors.harness import make_geometry, random_feeds, run_standalone

IWP_OPTIONS = [
    {},
    {"first_chunk": 1, "growth": 1},
    {"first_chunk": 5, "growth": 3},
    {"strength": 0.0},
    {"strength": 100.0, "floor": 1e-4},
    {"head_norm": "softmax", "scaling": "max"},
    {"duplication": "square_of_mean", "text": "all"},
    {"magnitude_rotary": True},
    {"duplication_rotary": False},
]


def assert_sound(result, geometry):
    assert result.order.dtype == np.int64 and result.scores.dtype == np.float32
    assert result.order.shape == (geometry.batch, geometry.keep)
    assert result.scores.shape == (geometry.batch, geometry.visual)
    assert np.isfinite(result.scores).all()
    for places in result.order:
        assert len(set(places)) == geometry.keep
        assert places.min() >= 0 and places.max() < geometry.visual


@pytest.mark.parametrize("name", SELECTORS)
@pytest.mark.parametrize(("visual", "keep"), [(1, 1), (2, 1), (7, 7), (40, 13), (40, 40)])
def test_orders_name_each_place_once(name, visual, keep):
    geometry = make_geometry(visual=visual, keep=keep, batch=3, original_visual=visual + 5)
    selector = make(name, {})
    feeds = random_feeds(geometry, visual, taps=selector.taps(geometry.layer, geometry.depth))
    assert_sound(run_standalone(selector, geometry, feeds), geometry)


@pytest.mark.parametrize("options", IWP_OPTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_iwp_under_every_option(options, dtype):
    geometry = make_geometry(visual=24, keep=24, batch=2, heads=6, kv_heads=2)
    result = run_standalone(Iwp(**options), geometry, random_feeds(geometry, 3, dtype=dtype))
    assert_sound(result, geometry)
    assert result.scores.max(axis=1).tolist() == [1, 1]
    np.testing.assert_array_equal(result.order[:, 0], result.scores.argmax(axis=1))


def test_without_strength_iwp_is_a_topk_of_the_magnitude():
    geometry = make_geometry(visual=50, keep=20, batch=2)
    feeds = random_feeds(geometry, 4)
    for selector in (Iwp(strength=0.0), Magnitude()):
        result = run_standalone(selector, geometry, feeds)
        np.testing.assert_array_equal(result.order, np.argsort(-result.scores, axis=1, kind="stable")[:, :20])
    np.testing.assert_array_equal(result.scores, run_standalone(Iwp(), geometry, feeds).scores)


@pytest.mark.parametrize("name", SELECTORS)
def test_a_sample_does_not_see_its_batch(name):
    geometry = make_geometry(visual=30, keep=12, batch=3)
    selector = make(name, {})
    feeds = random_feeds(geometry, 5, taps=selector.taps(geometry.layer, geometry.depth))
    together = run_standalone(selector, geometry, feeds)
    for sample in range(3):
        alone = run_standalone(selector, replace(geometry, batch=1), {kind: feed[sample : sample + 1] for kind, feed in feeds.items()})
        np.testing.assert_array_equal(alone.order[0], together.order[sample])
        np.testing.assert_allclose(alone.scores[0], together.scores[sample], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"text": "all"}, {"head_norm": "softmax"}])
def test_rows_of_padding_and_foreign_rows_change_nothing(options):
    geometry = make_geometry(visual=30, keep=12, batch=3, sequence=50)
    feeds = random_feeds(geometry, 6)
    visual = np.zeros((3, 50), bool)
    np.put_along_axis(visual, feeds["visual_index"], True, axis=1)
    text = feeds["all_text" if options.get("text") == "all" else "text"]
    assert not (visual | text).all()
    changed = dict(feeds)
    for kind in ("q", "q_rotary", "k", "k_rotary", "v"):
        read = text if kind.startswith("q") else visual
        changed[kind] = np.where(read[:, None, :, None], feeds[kind], np.float32(1e4))
    before, after = (run_standalone(Iwp(**options), geometry, given) for given in (feeds, changed))
    np.testing.assert_array_equal(before.order, after.order)
    np.testing.assert_array_equal(before.scores, after.scores)


@pytest.mark.parametrize("options", IWP_OPTIONS)
@pytest.mark.parametrize(("dtype", "spread"), [(np.float16, 15000), (np.float32, 1e15), (np.float32, 1e-8), (np.float32, 0)])
def test_huge_and_vanishing_values_stay_finite(options, dtype, spread):
    geometry = make_geometry(visual=24, keep=16)
    feeds = {kind: np.nan_to_num(feed) if feed.dtype == dtype else feed for kind, feed in random_feeds(geometry, 7, dtype=dtype).items()}
    feeds = {kind: (feed * dtype(spread)).astype(dtype) if feed.dtype == dtype else feed for kind, feed in feeds.items()}
    result = run_standalone(Iwp(**options), geometry, feeds)
    assert_sound(result, geometry)
    assert result.scores.min() >= 0 and result.scores.max() <= 1


def test_a_zero_value_resembles_nothing():
    geometry = make_geometry(visual=10, keep=10)
    feeds = random_feeds(geometry, 8)
    feeds["v"][:, :, feeds["visual_index"][0, 3]] = 0
    result = run_standalone(Iwp(), geometry, feeds)
    assert_sound(result, geometry)
    assert result.scores[0, 3] == 0 and result.order[0, -1] == 3


def test_distances_survive_a_bias_on_all_keys():
    # |k|^2 is then ten million times what the distances are: without centring float32 loses them altogether.
    geometry = make_geometry(visual=60, keep=40)
    feeds = random_feeds(geometry, 9, spread=0.5)
    shifted = {**feeds, "k_rotary": feeds["k_rotary"] + np.float32(2048)}
    feeds["k_rotary"] = shifted["k_rotary"] - np.float32(2048)  # rounded as the shifted ones are
    plain, biased = (run_standalone(Iwp(), geometry, given) for given in (feeds, shifted))
    np.testing.assert_array_equal(plain.order, biased.order)
    assert plain.order.tolist() != run_standalone(Magnitude(), geometry, feeds).order.tolist()


@pytest.mark.parametrize("seed", range(4))
def test_a_squared_distance_is_never_negative(seed):
    # Equal huge keys: their distance comes out at some 1e5 to either side of 0, and exp of the wrong side times cos 0 would be NaN.
    geometry = make_geometry(visual=8, keep=8, kv_heads=1, head_size=32)
    feeds = random_feeds(geometry, seed)
    rows = feeds["visual_index"][0]
    feeds["q"][:] = 0
    feeds["k_rotary"][:, :, rows] = np.where(np.arange(8) < 5, 1e6, -1e6)[:, None] * feeds["k_rotary"][:, :, :1]
    feeds["v"][:, :, rows] = np.eye(8, 32) * np.arange(8, 0, -1)[:, None]
    assert run_standalone(Iwp(first_chunk=1, growth=1), geometry, feeds).order.tolist() == [list(range(8))]


@pytest.mark.parametrize("keep", [1, 5, 64, 300, 576])
def test_topk_of_onnx_runtime_takes_the_lower_place_of_equals(keep):
    # It has several algorithms by size; the references rely on this order in all of them.
    geometry = make_geometry(visual=576, keep=keep, head_size=1)
    feeds = random_feeds(geometry, 10)
    feeds["q"][:] = 0
    feeds["v"][:] = np.random.default_rng(10).integers(1, 5, feeds["v"].shape)
    result = run_standalone(Magnitude(), geometry, feeds)
    assert len(np.unique(result.scores)) < 10
    np.testing.assert_array_equal(result.order, np.argsort(-result.scores, axis=1, kind="stable")[:, :keep])
