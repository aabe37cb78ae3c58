"""IWP's formulas on cases small enough to work out by hand."""

from __future__ import annotations

from dataclasses import replace
from math import log, sqrt
from typing import Any

import numpy as np
import pytest

from sievert.graph_passes.selectors.iwp import Iwp
from sievert.graph_passes.selectors.magnitude import Magnitude
from tests.graph_passes.selectors.harness import make_geometry, random_feeds, run_standalone


def place_rows(geometry, **taps):
    """Feeds of one sample: the visual tokens first, all rows after them text; each tap is ``[heads, rows, d]`` nested lists."""
    visual, length = geometry.visual, geometry.sequence
    text = (np.arange(length) >= visual)[None]
    return {
        "visual_index": np.arange(visual)[None],
        "text": text,
        "all_text": text,
        **{kind: np.asarray(rows, np.float32)[None] for kind, rows in taps.items()},
    }


# Two heads on one kv head, d = 1: the mean query of head 0 is ln 2, that of head 1 is 0. Keys 0, 1, 2 weigh 1, 2, 4 under head 0.
QUERY = [[[9], [9], [9], [log(2)]], [[9], [9], [9], [0]]]
KEYS = [[[0], [1], [2], [9]]]
VALUES = [[[3], [-1], [1], [9]]]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 0, 2 / 3]),  # 6, 3, 5
        ({"scaling": "max"}, [1, 3 / 6, 5 / 6]),
        ({"head_norm": "softmax"}, [1, 0, 6 / 17]),  # 3/7 + 1, 2/7 + 1/3, 4/7 + 1/3 in 21sts: 30, 13, 19
    ],
)
def test_magnitude_is_what_the_hand_computes(options, expected):
    geometry = replace(make_geometry(visual=3, keep=3, sequence=4, heads=2, kv_heads=1, head_size=1), attention_scale=1.0)
    result = run_standalone(Magnitude(**options), geometry, place_rows(geometry, q=QUERY, k=KEYS, v=VALUES))
    np.testing.assert_allclose(result.scores, [expected], rtol=1e-6)
    assert result.order.tolist() == [[0, 2, 1]]


def test_attention_scale_multiplies_the_logits():
    geometry = replace(make_geometry(visual=3, keep=3, sequence=4, heads=2, kv_heads=1, head_size=1), attention_scale=2.0)
    result = run_standalone(Magnitude(), geometry, place_rows(geometry, q=QUERY, k=KEYS, v=VALUES))
    np.testing.assert_allclose(result.scores, [[1 / 12, 0, 1]], rtol=1e-6)  # keys weigh 1, 4, 16 under head 0: 6, 5, 17


def test_query_heads_read_their_own_kv_head():
    geometry = replace(make_geometry(visual=2, keep=2, sequence=3, heads=4, kv_heads=2, head_size=1), attention_scale=1.0)
    query = [[[0], [0], [value]] for value in (0, 0, 0, log(3))]  # only head 3, of kv head 1, looks anywhere
    keys = [[[5], [0], [0]], [[0], [1], [0]]]
    values = [[[1], [1], [0]], [[1], [1], [0]]]
    result = run_standalone(Magnitude(scaling="max"), geometry, place_rows(geometry, q=query, k=keys, v=values))
    np.testing.assert_allclose(result.scores, [[4 / 6, 1]], rtol=1e-6)


def test_text_option_says_whose_queries_count():
    geometry = replace(make_geometry(visual=2, keep=1, sequence=6, heads=1, kv_heads=1, head_size=1), attention_scale=1.0)
    feeds = {
        "visual_index": np.array([[1, 2]]),
        "text": np.array([[0, 0, 0, 1, 1, 0]], bool),
        "all_text": np.array([[1, 0, 0, 1, 1, 0]], bool),
        "q": np.array([-9, 7, 7, 1, 3, 50], np.float32).reshape(1, 1, 6, 1),
        "k": np.array([7, 0, 0.5, 7, 7, 7], np.float32).reshape(1, 1, 6, 1),
        "v": np.array([7, 1, 1, 7, 7, 7], np.float32).reshape(1, 1, 6, 1),
    }
    after = run_standalone(Magnitude(scaling="max"), geometry, feeds)  # mean query 2, so the weights are 1 and e
    np.testing.assert_allclose(after.scores, [[np.exp(-1), 1]], rtol=1e-6)
    everything = run_standalone(Magnitude(scaling="max", text="all"), geometry, feeds)  # mean query -5/3
    np.testing.assert_allclose(everything.scores, [[1, np.exp(-5 / 6)]], rtol=1e-6)
    nobody = run_standalone(Magnitude(), geometry, {**feeds, "text": np.zeros((1, 6), bool)})
    assert nobody.scores.tolist() == [[0, 0]]


def place_directions(scores, directions, distances, *, keep):
    """One or more kv heads, d = 2, no query: scores[i] in [0, 1], unit directions ``[G, Nv, 2]``, all keys at (distance, 0).

    The norm of token i is 1 + 10 * scores[i] in every kv head, so that minmax gives the scores back when they hold a 0 and a 1.
    """
    directions = np.asarray(directions, np.float32)
    heads, visual, _ = directions.shape
    geometry = make_geometry(visual=visual, keep=keep, sequence=visual + 1, heads=heads, kv_heads=heads, head_size=2)
    taps = np.zeros((4, heads, visual + 1, 2), np.float32)
    taps[2, :, :visual, 0] = distances
    taps[3, :, :visual] = directions * (1 + 10 * np.asarray(scores, np.float32))[:, None]
    return geometry, place_rows(geometry, q=taps[0], k=taps[1], k_rotary=taps[2], v=taps[3])


X, Y, SLANTED = [1, 0], [0, 1], [0.6, 0.8]
HALF = sqrt(2 * sqrt(2) * log(2))  # the distance at which exp(-distance^2 / (2 sqrt(2))) is 1/2
ONE_BY_ONE: dict[str, Any] = {"first_chunk": 1, "growth": 1}


@pytest.mark.parametrize(("rival", "second"), [(0.43, 1), (0.45, 2)])
def test_penalty_is_what_the_hand_computes(rival, second):
    # Token 1: cos 0.6 times 1/2, squared 0.09, so 0.8 falls to 0.8 * (1 - 5 * 0.09) = 0.44.
    geometry, feeds = place_directions([1, 0.8, rival, 0], [[X, SLANTED, Y, Y]], [0, HALF, 0, 0], keep=2)
    assert run_standalone(Iwp(**ONE_BY_ONE), geometry, feeds).order.tolist() == [[0, second]]


@pytest.mark.parametrize(
    ("duplication", "rival", "second"),
    [("mean_of_squares", 0.39, 1), ("mean_of_squares", 0.41, 2), ("square_of_mean", 0.59, 1), ("square_of_mean", 0.61, 2)],
)
def test_duplication_option_joins_the_kv_heads(duplication, rival, second):
    # Token 1 repeats token 0 in one of two kv heads: 0.8 falls to 0.8 * (1 - 1/2) or 0.8 * (1 - 1/4).
    geometry, feeds = place_directions([1, 0.8, rival, 0], [[X, X, Y, Y], [X, Y, Y, Y]], [0, 0, 0, 0], keep=2)
    assert run_standalone(Iwp(strength=1.0, duplication=duplication, **ONE_BY_ONE), geometry, feeds).order.tolist() == [[0, second]]


def test_opposite_values_are_duplicates_too():
    geometry, feeds = place_directions([1, 0.8, 0.5, 0], [[X, [-1, 0], Y, Y]], [0, 0, 0, 0], keep=2)
    assert run_standalone(Iwp(**ONE_BY_ONE), geometry, feeds).order.tolist() == [[0, 2]]


def test_only_the_newest_chunk_penalises():
    # Token 1 falls from 0.8 to 0.44 when 0 is taken; a second penalty for the same token would drop it to 0.24, below the rival's 0.3.
    geometry, feeds = place_directions([1, 0.8, 0.9, 0.3, 0], [[X, SLANTED, Y, Y, Y]], [0, HALF, 30, 60, 90], keep=3)
    assert run_standalone(Iwp(**ONE_BY_ONE), geometry, feeds).order.tolist() == [[0, 2, 1]]


def test_penalties_of_later_chunks_multiply():
    # Tokens 0 and 2 both stand at half strength to token 1: 0.8 * 0.55 * 0.2 = 0.088 (the second cosine is 0.8), below the rival's 0.1.
    geometry, feeds = place_directions([1, 0.8, 0.95, 0.1, 0], [[X, SLANTED, Y, Y, Y]], [0, HALF, 2 * HALF, 60, 90], keep=3)
    assert run_standalone(Iwp(**ONE_BY_ONE), geometry, feeds).order.tolist() == [[0, 2, 3]]


def test_the_most_similar_of_a_chunk_decides_and_the_chunk_itself_is_not_penalised():
    # The chunk of two takes the duplicates 0 and 1; 2 repeats only 1 (a mean over the chunk would leave it 0.4).
    geometry, feeds = place_directions([1, 0.9, 0.8, 0.3, 0], [[X, X, X, Y, Y]], [0, 30, 30, 60, 90], keep=3)
    assert run_standalone(Iwp(strength=1.0), geometry, feeds).order.tolist() == [[0, 1, 3]]


def test_floor_keeps_the_order_of_what_is_penalised_hardest():
    # Both duplicates of 0 fall by the floor, not below: 0.8 and 0.7 stay in order, above the token of score 0.
    geometry, feeds = place_directions([1, 0.7, 0.8, 0], [[X, X, X, Y]], [0, 0, 0, 0], keep=4)
    assert run_standalone(Iwp(strength=1e6, **ONE_BY_ONE), geometry, feeds).order.tolist() == [[0, 2, 1, 3]]
    assert run_standalone(Iwp(strength=1e6, floor=1.0, **ONE_BY_ONE), geometry, feeds).order.tolist() == [[0, 2, 1, 3]]


def test_duplicates_wait_until_the_rest_is_taken():
    geometry, feeds = place_directions([1, 0.95, 0.9, 0.5, 0], [[X, X, X, Y, Y]], [0, 0, 0, 0, 40], keep=3)
    assert run_standalone(Magnitude(), geometry, feeds).order.tolist() == [[0, 1, 2]]
    assert run_standalone(Iwp(first_chunk=1), geometry, feeds).order.tolist() == [[0, 3, 1]]


@pytest.mark.parametrize("options", [{}, {"strength": 0.0}, {"first_chunk": 1, "growth": 1}, {"scaling": "max"}])
def test_ties_go_to_the_lower_place(options):
    geometry, feeds = place_directions([0] * 40, [[X] * 40], [0] * 40, keep=33)
    result = run_standalone(Iwp(**options), geometry, feeds)
    assert result.order.tolist() == [list(range(33))]
    assert (result.scores == (1 if options.get("scaling") == "max" else 0)).all()


def test_rotary_options_choose_the_taps():
    assert [tap.kind for tap in Iwp().taps(4, 28)] == ["q", "k", "k_rotary", "v"]
    assert [tap.kind for tap in Iwp(strength=0.0).taps(4, 28)] == ["q", "k", "v"]
    assert [tap.kind for tap in Iwp(magnitude_rotary=True).taps(4, 28)] == ["q_rotary", "k_rotary", "v"]
    assert [tap.kind for tap in Iwp(duplication_rotary=False).taps(4, 28)] == ["q", "k", "v"]
    assert {tap.layer for tap in Iwp().taps(4, 28)} == {4}


def test_rotary_options_read_what_they_say():
    geometry = make_geometry(visual=30, keep=20, batch=2)
    feeds = random_feeds(geometry, 1)
    plain = run_standalone(Iwp(duplication_rotary=False), geometry, feeds)
    turned = run_standalone(Iwp(magnitude_rotary=True), geometry, {**feeds, "q_rotary": feeds["q"], "k_rotary": feeds["k"]})
    np.testing.assert_array_equal(plain.order, turned.order)
    np.testing.assert_array_equal(plain.scores, turned.scores)
    crossed = run_standalone(Iwp(magnitude_rotary=True, duplication_rotary=False), geometry, feeds)
    swapped = {**feeds, "q": feeds["q_rotary"], "k": feeds["k_rotary"], "k_rotary": feeds["k"]}
    default = run_standalone(Iwp(), geometry, swapped)
    np.testing.assert_array_equal(crossed.order, default.order)
    np.testing.assert_array_equal(crossed.scores, default.scores)
    assert crossed.order.tolist() != plain.order.tolist()


@pytest.mark.parametrize(
    ("options", "keep", "sizes"),
    [
        ({}, 128, (2, 4, 8, 16, 32, 64, 2)),
        ({}, 1, (1,)),
        ({"first_chunk": 3, "growth": 1}, 10, (3, 3, 3, 1)),
        ({"first_chunk": 64}, 64, (64,)),
        ({"strength": 0.0}, 128, (128,)),
    ],
)
def test_chunk_sizes(options, keep, sizes):
    assert Iwp(**options).chunks(keep) == sizes
    assert Iwp(**options).largest_topk(576, keep) == max(sizes)
