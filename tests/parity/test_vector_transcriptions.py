"""The transcriptions that compare vectors, by hand, and what holds of every transcription."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sievert.bundle.errors import PlanError
from sievert.parity.selectors.base import EXACT, Margin, TokenInputs
from sievert.parity.selectors.cdpruner import CdPruner
from sievert.parity.selectors.dart import Dart
from sievert.parity.selectors.divprune import DivPrune
from sievert.parity.selectors.registry import SELECTORS, reference_selector
from sievert.parity.selectors.shared import cosine, cosines
from sievert.parity.selectors.steps import ReferenceSelector

FINE = Margin(1e-4, 1e-4)


def make(visual: Any, text: Any = ((1.0, 0.0),), **changes: Any) -> TokenInputs:
    """Embeddings of visual tokens, and of the text behind them; a cut before layer 3 of 8."""
    embeds = np.array([*visual, *text], float)
    Nv, S = len(visual), len(embeds)
    places, rows = np.arange(Nv), np.arange(Nv, S)
    inputs = TokenInputs({}, embeds, places, places, Nv, rows, rows, scale=1.0, layer=3, depth=8)
    return replace(inputs, **changes)


def circle(*degrees: float) -> Any:
    return [[math.cos(math.radians(angle)), math.sin(math.radians(angle))] for angle in degrees]


def test_equal_rows_have_equal_cosines() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 7))[rng.integers(0, 9, 40)]
    matrix = cosines(vectors)
    assert matrix == pytest.approx(cosine(vectors[:, None], vectors)) and np.array_equal(matrix, matrix.T)
    for row in range(40):
        same = (vectors == vectors[row]).all(axis=1)
        assert (matrix[row, same] == 1.0).all() and (matrix[same] == matrix[row]).all() and (matrix[:, same] == matrix[:, [row]]).all()
    assert cosines(np.array([[0.0, 0], [1, 0]])).tolist() == [[0, 0], [0, 1]]


def test_divprune_by_hand() -> None:
    """Angles 0, 10, 90, 200: the last is farthest from its nearest; then 0 or 10, of which 10 is farther from it, then 90."""
    inputs = make(circle(0, 10, 90, 200))
    choice = DivPrune().select(inputs, 4)
    near = [1 - math.cos(math.radians(angle)) for angle in (10, 10, 80, 110)]
    assert choice.scores == pytest.approx(near) and choice.condition == 1
    assert choice.order.tolist() == [3, 1, 2, 0]
    assert DivPrune().select(make(circle(5)), 1).scores.tolist() == [0]
    assert DivPrune().select(make([[1, 0]] * 4), 3).order.tolist() == [0, 1, 2] and DivPrune().taps(0, 8, 0) == ()


def test_divprune_is_judged_step_by_step() -> None:
    inputs = make(circle(0, 10, 90, 200))
    replay = DivPrune().replay(inputs, 3, [2, 3, 0], FINE)  # 90 was wrong; given it, 200 is farthest, and then 0
    assert [chunk.exact for chunk in replay.chunks] == [False, True, True] and not replay.holds
    near = make(circle(0, 10, 90, 89.99, 200))
    swapped = DivPrune().replay(near, 3, [4, 1, 3], EXACT)
    assert DivPrune().select(near, 3).order.tolist() != [4, 1, 3] and not swapped.holds
    assert DivPrune().replay(near, 3, [4, 1, 3], Margin(0.0, 1e-3)).holds


def keyed(keys: Any, normed: Any, text: int, **changes: Any) -> TokenInputs:
    """``keys[g][row]`` of the layer before, ``normed[row]``; the last ``text`` rows are text."""
    k = np.array(keys, float)
    visual = k.shape[1] - text
    taps = {("k_rotary", 2): k, ("final_normed", 3): np.array(normed, float)}
    return make([[0.0, 0]] * visual, [[0.0, 0]] * text, taps=taps, **changes)


def test_dart_by_hand() -> None:
    """Ten visual tokens at 0, 10 .. 90 degrees, norms 10 .. 1; two text tokens at 90 and 44 degrees, the second the larger."""
    norms = [*range(10, 0, -1), 3, 5]
    keys = [[[-norm / 2, 0.0] for norm in norms], [[0.0, norm / 2] for norm in norms]]
    inputs = keyed(keys, circle(*range(0, 100, 10), 90, 44), text=2)
    assert Dart().taps(3, 8, 0) == (("k_rotary", 2), ("final_normed", 3))
    choice = Dart().select(inputs, 9)
    assert choice.scores.tolist() == norms[:10] and choice.condition == 10
    # The pivots lie at 0, 10, 20, 30, 44 and 90 degrees: five tokens for six of them, one each but for the last.
    assert choice.order.tolist() == [0, 1, 2, 3, 9, 8, 7, 6, 5]
    assert [step.size for step in Dart().replay(inputs, 9, choice.order, EXACT).chunks] == [1] * 9
    more = Dart().select(inputs, 10)
    assert more.order.tolist() == [0, 1, 2, 3, 9, 8, 7, 6, 5, 4]
    assert Dart().select(inputs, 3).order.tolist() == [0, 1, 2]
    none = replace(inputs, text=np.array([], np.int64))  # without text, visual pivots alone: 2, 1, 1, 1
    assert Dart().select(none, 9).order.tolist() == [0, 1, 2, 3, 9, 8, 7, 6, 5]
    assert [chunk.size for chunk in Dart().replay(none, 9, more.order[:9], EXACT).chunks] == [1, 1, 1, 1, 2, 1, 1, 1]


def test_dart_on_embeddings() -> None:
    inputs = make([[3, 0], [0, -2], [1, 0], [0, 0.5], [0.2, 0.2], [-0.1, 0]], [[0, 1]], layer=0)
    assert Dart(on="embeddings").taps(0, 8, 0) == ()
    choice = Dart(on="embeddings").select(inputs, 5)
    assert choice.scores == pytest.approx([3, 2, 1, 0.5, 0.4, 0.1]) and choice.order.tolist() == [0, 1, 2, 3, 5]
    with pytest.raises(PlanError, match="on=embeddings can cut there"):
        Dart().taps(0, 8, 0)


def test_text_pivots_that_rounding_may_swap_are_a_near_tie() -> None:
    """Two text rows of nearly one norm look opposite ways: an order does not show which of them the engine took for the first."""
    norms = [9, 8, 7, 6, *[1] * 7, 5, 5 + 1e-5]
    inputs = keyed([[[norm, 0.0] for norm in norms]], circle(0, 0, 0, 0, *range(60, 130, 10), 180, 0), text=2)
    order = Dart().select(inputs, 9).order
    assert order.tolist() == [0, 1, 2, 3, 10, 9, 8, 7, 6]  # the larger text row lies at 0 degrees, and takes what is farthest from it
    other = np.array([0, 1, 2, 3, 10, 9, 8, 7, 4])  # the other one lies at 180 degrees
    assert not Dart().replay(inputs, 9, other, EXACT).holds and Dart().replay(inputs, 9, other, FINE).holds
    clear = replace(inputs, taps={**inputs.taps, ("k_rotary", 2): inputs.tap("k_rotary", 2) * np.r_[np.ones(12), 2.0][:, None]})
    assert not Dart().replay(clear, 9, other, FINE).holds


def test_cdpruner_by_hand() -> None:
    """Cosines to the text 1, cos 60 and 0: relevances 1, .5 and 0 (but for the 1e-6); 1 - cos^2 of what is left after the first."""
    inputs = make(circle(0, 60, 90), [[2, 0], [4, 0]])
    choice = CdPruner().select(inputs, 3)
    assert choice.scores == pytest.approx([1, 0.25, 0], abs=1e-5) and choice.order.tolist() == [0, 1, 2]
    assert choice.condition == pytest.approx(4, rel=1e-5)
    twins = make(circle(0, 1, 40, 90), [[1, 0]])  # the second is nearly as relevant as the first, but says the same
    assert CdPruner().select(twins, 2).order.tolist() == [0, 2]
    with pytest.raises(ValueError, match="no text row"):
        CdPruner().select(replace(inputs, text=np.array([], np.int64)), 1)
    prefix = replace(inputs, all_text=np.array([3, 4]), text=np.array([], np.int64))
    assert CdPruner(text="all").select(prefix, 1).order.tolist() == [0]


def test_cdpruner_takes_the_most_likely_set() -> None:
    """Greedy by the determinant itself, in place of the recursion."""
    rng = np.random.default_rng(3)
    inputs = make(rng.normal(size=(9, 6)), rng.normal(size=(2, 6)))
    relevance = cosine(inputs.embeds[:9], inputs.embeds[9:].mean(axis=0))
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min() + 1e-6)
    kernel = relevance[:, None] * cosines(inputs.embeds[:9]) * relevance
    order: list[int] = []
    for _ in range(5):
        left = [place for place in range(9) if place not in order]
        order.append(max(left, key=lambda place: np.linalg.det(kernel[np.ix_([*order, place], [*order, place])])))
    assert CdPruner().select(inputs, 5).order.tolist() == order


def test_cdpruners_margin_holds_what_errors_of_the_embeddings_do() -> None:
    """Embeddings turned by up to 1e-4 give other variances; they stay within the margin, and it is not a hundred times too wide."""
    rng = np.random.default_rng(4)
    embeds = rng.normal(size=(24, 16))
    inputs = make(embeds[:20], embeds[20:])
    order = CdPruner().select(inputs, 10).order
    worst = np.zeros(10)
    for _ in range(40):
        error = rng.normal(size=embeds.shape)
        error *= 1e-4 * np.linalg.norm(embeds, axis=1, keepdims=True) / np.linalg.norm(error, axis=1, keepdims=True)
        moved = replace(inputs, embeds=embeds + error)
        plain, other = (CdPruner().steps(case, 10, FINE) for case in (inputs, moved))
        one, two = next(plain), next(other)
        for number, place in enumerate(order):
            left = np.setdiff1d(np.arange(20), order[:number])
            away = np.abs(two.scores.values - one.scores.values)[left] / (one.scores.high - one.scores.values)[left]
            worst[number] = max(worst[number], away.max())
            if number < 9:
                one, two = plain.send([int(place)]), other.send([int(place)])
    assert (worst < 1).all() and (worst > 0.1).all(), worst


def test_what_is_undefined_is_not_judged() -> None:
    """More tokens than directions: nothing remains but rounding."""
    rng = np.random.default_rng(5)
    inputs = make(rng.normal(size=(8, 2)), rng.normal(size=(1, 2)))
    order = CdPruner().select(inputs, 8).order
    other = np.r_[order[:3], order[3:][::-1]]
    assert CdPruner().replay(inputs, 8, other, FINE).holds and not CdPruner().replay(inputs, 8, order[::-1], FINE).holds


# What holds of all that compute from the embeddings or the vision encoder alone.

ANYWHERE: Sequence[ReferenceSelector] = (Dart(on="embeddings"), DivPrune(), CdPruner())


@pytest.mark.parametrize("selector", ANYWHERE)
def test_arranged_sets_replay_as_they_were_taken(selector: ReferenceSelector) -> None:
    rng = np.random.default_rng(6)
    for _ in range(10):
        inputs = make(rng.normal(size=(14, 8)), rng.normal(size=(3, 8)))
        own = selector.select(inputs, 7).order
        assert selector.arrange(inputs, np.sort(own)).tolist() == own.tolist()
        assert selector.replay(inputs, 7, own, EXACT).exact
        left = np.setdiff1d(np.arange(14), own)
        for place in range(7):  # one wrong token, wherever it is: what is wrong is seen in the order and in the set
            wrong = own.copy()
            wrong[place] = left[-1]
            assert not selector.replay(inputs, 7, wrong, FINE).holds
            assert not selector.replay(inputs, 7, selector.arrange(inputs, np.sort(wrong)), FINE).holds


@pytest.mark.parametrize("name", SELECTORS)
def test_every_transcription_says_what_it_reads(name: str) -> None:
    taps = reference_selector(name, {}).taps(3, 8, 1)
    assert len(set(taps)) == len(taps) and all(1 <= layer <= 3 for _, layer in taps)
