"""The transcriptions on cases small enough to be worked out by hand, and the replay of orders that are and are not top sets."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sievert.parity.selectors.base import EXACT, Margin, TokenInputs
from sievert.parity.selectors.iwp import Iwp, Magnitude
from sievert.parity.selectors.random import Random
from sievert.parity.selectors.uniform import Uniform


def make(keys: Any, values: Any, *, query: Any = ((1.0, 0.0),), scale: float = 1.0, original: Any = None, total: int = 0) -> TokenInputs:
    """One head, one text row behind the visual ones; keys and queries are the same before and after rotary."""
    k, v = (np.array([[*rows, [0.0, 0.0]]]) for rows in (keys, values))
    Nv = len(keys)
    q = np.zeros((1, Nv + 1, 2))
    q[0, Nv:] = query
    return TokenInputs(
        taps=name_heads(q, k, v),
        embeds=np.zeros((Nv + 1, 2)),
        visual=np.arange(Nv),
        original=np.arange(Nv) if original is None else np.array(original),
        visual_total=total or Nv,
        text=np.array([Nv]),
        all_text=np.array([Nv]),
        scale=scale,
    )


def name_heads(q: Any, k: Any, v: Any) -> dict[tuple[str, int], Any]:
    return {("q", 0): q, ("q_rotary", 0): q, ("k", 0): k, ("k_rotary", 0): k, ("v", 0): v}


def test_magnitude_by_hand() -> None:
    inputs = make([[0, 0], [math.log(2), 0], [math.log(4), 5]], [[3, 4], [0, 5], [1, 0]])
    choice = Magnitude().select(inputs, 2)  # exp(q.k) |v| is 5, 10, 4
    assert choice.order.tolist() == [1, 0]
    assert choice.scores == pytest.approx([1 / 6, 1, 0]) and choice.condition == pytest.approx(10 / 6)
    assert Magnitude(scaling="max").select(inputs, 1).scores == pytest.approx([0.5, 1, 0.4])


def test_the_heads_weigh_as_they_are_or_alike() -> None:
    """Two heads that attend to different tokens, one of them much more strongly."""
    inputs = make([[0, 0], [0, 0]], [[1, 0], [1, 0]])
    k = np.array([[[1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]])
    q = np.zeros((2, 3, 2))
    q[0, 2], q[1, 2] = [3, 0], [-9, 0]
    two = replace(inputs, taps=name_heads(q, k, inputs.tap("v")))
    plain = [(math.exp(3) + math.exp(-9)) / 2, 1.0]
    soft = [
        (math.exp(3) / (math.exp(3) + 1) + math.exp(-9) / (math.exp(-9) + 1)) / 2,
        (1 / (math.exp(3) + 1) + 1 / (math.exp(-9) + 1)) / 2,
    ]
    assert Iwp(scaling="max").magnitude(two)[0] == pytest.approx(np.array(plain) / max(plain))
    assert Iwp(scaling="max", head_norm="softmax").magnitude(two)[0] == pytest.approx(np.array(soft) / max(soft))
    assert Iwp().select(two, 1).order.tolist() == [0] and Iwp(head_norm="softmax").select(two, 1).order.tolist() == [1]


def test_duplicates_by_hand() -> None:
    """Token 1 repeats token 0; token 2 has its value along another key, token 3 another value."""
    inputs = make([[0, 0], [0, 0], [0, 2], [0, 0]], [[1, 0], [1, 0], [1, 0], [0, 1]], scale=0.5)
    near = math.exp(-4 * 0.5 / 2) ** 2
    expected = [[1, 1, near, 0], [1, 1, near, 0], [near, near, 1, 0], [0, 0, 0, 1]]
    assert Iwp().similarity(inputs) == pytest.approx(np.array(expected))
    chosen = Iwp(first_chunk=1, growth=1, scaling="max").select(inputs, 3)
    assert chosen.scores.tolist() == [1, 1, 1, 1]  # so the first is taken, then what does not repeat it, then the lesser repetition
    assert chosen.order.tolist() == [0, 3, 2]


def test_the_mean_is_taken_after_or_before_squaring() -> None:
    inputs = make([[0, 0], [0, 0]], [[1, 0], [1, 0]])
    v = np.array([[[1.0, 0], [1.0, 0], [0, 0]], [[1.0, 0], [-1.0, 0], [0, 0]]])
    two = replace(inputs, taps=name_heads(inputs.tap("q"), np.zeros((2, 3, 2)), v))
    assert Iwp().similarity(two)[0, 1] == 1.0 and Iwp(duplication="square_of_mean").similarity(two)[0, 1] == 0.0


def test_only_the_newest_chunk_penalises_and_the_floor_holds() -> None:
    """Three copies of the best token: the second copy is lowered by the floor once, not once more for every round."""
    inputs = make([[2, 0], [2, 0], [2, 0], [0, 3], [0, -3]], [[1, 0], [1, 0], [1, 0], [0, 1], [0, 1]])
    order = Iwp(first_chunk=1, growth=1, scaling="max").select(inputs, 5).order.tolist()
    assert order == [0, 3, 4, 1, 2]
    flat = Iwp(first_chunk=1, growth=1, scaling="max", floor=0.5).select(inputs, 5).order.tolist()
    assert flat == [0, 1, 2, 3, 4]  # .5, then .25, against .135


def test_chunks() -> None:
    assert Iwp().chunk_sizes(128) == [2, 4, 8, 16, 32, 64, 2] and Iwp().chunk_sizes(1) == [1]
    assert Iwp(first_chunk=3, growth=1).chunk_sizes(7) == [3, 3, 1]


def test_equal_tokens_go_by_their_index_and_score_nothing() -> None:
    inputs = make([[1, 1]] * 5, [[1, 2]] * 5)
    choice = Iwp().select(inputs, 3)
    assert choice.scores.tolist() == [0] * 5 and choice.order.tolist() == [0, 1, 2]
    assert Iwp().select(make([[1, 1]], [[1, 2]]), 1).scores.tolist() == [0]


def test_a_score_that_is_no_number_is_an_error() -> None:
    with pytest.raises(ValueError, match="not a finite number"):
        Iwp().select(make([[1, 1], [math.nan, 0]], [[1, 2], [1, 1]]), 1)
    with pytest.raises(ValueError, match="no text row"):
        Iwp().select(replace(make([[1, 1]], [[1, 2]]), text=np.array([], np.int64)), 1)


def test_large_exponents_do_not_overflow() -> None:
    choice = Iwp().select(make([[2000, 0], [1999, 0], [0, 0]], [[1, 0]] * 3), 1)
    assert choice.scores == pytest.approx([1, math.exp(-1), 0])


def test_replay_follows_the_engine() -> None:
    inputs = make([[3, 0], [2, 1], [1, 2], [0, 3]], [[1, 0], [0, 1], [1, 1], [1, -1]])
    selector, scores = Iwp(first_chunk=1, growth=1), Iwp().magnitude(inputs)[0]
    own = selector.select(inputs, 3).order
    assert selector.replay(inputs, 3, own, EXACT).exact
    swapped = np.r_[own[1], own[0], own[2]]
    replay = selector.replay(inputs, 3, swapped, EXACT)
    assert [chunk.size for chunk in replay.chunks] == [1, 1, 1] and not replay.exact and not replay.holds
    assert replay.chunks[0].gap == pytest.approx(scores[own[1]] - scores[own[0]])
    assert replay.chunks[1].exact  # given that mistake, the next choice was right
    wide = selector.replay(inputs, 3, swapped, Margin(float(scores[own[0]]), 0.0))
    assert wide.holds and not wide.exact
    last = selector.replay(inputs, 4, np.r_[own, 6 - own.sum()], EXACT)
    assert last.chunks[-1].gap == math.inf and last.holds


def test_the_margin_shrinks_with_the_scores() -> None:
    """Both tokens left are lowered to the floor; a swap of them is no near tie just because their scores are small."""
    inputs = make([[2, 0], [2, 0], [1.9, 0]], [[1, 0], [1, 0], [1, 0]])
    selector = Iwp(first_chunk=1, growth=1, scaling="max")
    assert selector.select(inputs, 2).order.tolist() == [0, 1]
    replay = selector.replay(inputs, 2, [0, 2], Margin(score=1e-3, similarity=1e-6))
    assert replay.chunks[0].holds and -1e-3 < replay.chunks[1].gap < 0 and not replay.chunks[1].holds


@pytest.mark.parametrize(
    ("order", "said"),
    [([0, 0], "place 0 was taken more than once"), ([0, 3], "place 3 is not among the 3"), ([-1, 0], "place -1"), ([0], r"\(1,\) places")],
)
@pytest.mark.parametrize("selector", [Iwp(), Random(), Uniform()])
def test_what_is_no_selection_is_said_so(selector: Any, order: list[int], said: str) -> None:
    import re

    replay = selector.replay(make([[2, 0], [1, 0], [0, 0]], [[1, 0]] * 3), 2, order, EXACT)
    assert replay.chunks == () and not replay.holds and re.search(said, replay.invalid or "")


def test_arranged_sets_replay_as_they_were_taken() -> None:
    rng = np.random.default_rng(5)
    for seed in range(20):
        inputs = make(rng.normal(size=(12, 2)), rng.normal(size=(12, 2)), original=np.arange(12) + 3, total=17)
        for selector in (Iwp(), Iwp(first_chunk=1), Random(seed), Uniform()):
            own = selector.select(inputs, 7).order
            arranged = selector.arrange(inputs, np.sort(own))
            assert arranged.tolist() == own.tolist() and selector.replay(inputs, 7, arranged, EXACT).exact
        wrong = [place for place in range(12) if place != Iwp().select(inputs, 1).order[0]][:7]
        assert not Iwp().replay(inputs, 7, Iwp().arrange(inputs, wrong), EXACT).holds


def test_random_and_stride() -> None:
    inputs = make(np.zeros((4, 2)), np.zeros((4, 2)), original=[1, 3, 4, 6], total=8)
    permutation = [token for token in np.random.default_rng(2).permutation(8) if token in (1, 3, 4, 6)]
    assert [[1, 3, 4, 6][place] for place in Random(seed=2).select(inputs, 3).order] == permutation[:3]
    assert Uniform().select(inputs, 3).order.tolist() == [0, 2, 3] and Uniform().select(inputs, 1).order.tolist() == [2]
    assert not Uniform().replay(inputs, 3, [0, 1, 3], Margin(1.0, 1.0)).holds  # nothing is computed: there are no near ties
    assert not Random(seed=2).replay(inputs, 1, [next(p for p in range(4) if [1, 3, 4, 6][p] != permutation[0])], Margin(1.0, 1.0)).holds
