"""The transcriptions of the attention and vision selectors on cases small enough to be worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sievert.bundle.errors import PlanError
from sievert.parity.selectors.base import EXACT, Margin, TokenInputs, VisionTap
from sievert.parity.selectors.fastv import FastV
from sievert.parity.selectors.fopru import FoPru
from sievert.parity.selectors.pyramiddrop import PyramidDrop
from sievert.parity.selectors.sparsevlm import SparseVlm
from sievert.parity.selectors.transprune import TransPrune
from sievert.parity.selectors.visionzip import VisionZip

FINE = Margin(1e-4, 1e-4)
LOG = [math.log(weight) for weight in (1, 2, 3, 4, 6)]


def make(**changes: Any) -> TokenInputs:
    """Rows: text, three visual ones, two of text; a cut before layer 3 of 8. Logits of a query ``(1, 0)`` are the keys' first elements."""
    inputs = TokenInputs(
        taps={},
        embeds=np.zeros((6, 2)),
        visual=np.array([1, 2, 3]),
        original=np.array([1, 2, 3]),
        visual_total=3,
        text=np.array([4, 5]),
        all_text=np.array([0, 4, 5]),
        scale=1.0,
        layer=3,
        depth=8,
        grid=(1, 3),
    )
    return replace(inputs, **changes)


def attend(layer: int, *logits: Any, queries: Any = None) -> dict[tuple[str, int], Any]:
    """Keys whose logits are ``logits[g]`` for one head each; every row asks ``(1, 0)``, or ``queries[h]``."""
    keys = np.array([[[logit, 7.0] for logit in of_head] for of_head in logits])
    asked = np.array([[[1.0, 0.0]] * keys.shape[1]] * len(keys)) if queries is None else np.array(queries)
    return {("q_rotary", layer): asked, ("k_rotary", layer): keys}


def test_fastv_reads_the_last_row_of_the_layer_before() -> None:
    logits = [0.0, LOG[1], LOG[3], 0.0, 0.0, LOG[4]]  # 1, 2, 4, 1, 1, 6 of 15
    assert FastV().taps(3, 8, 1) == (("q_rotary", 2), ("k_rotary", 2))
    choice = FastV().select(make(taps=attend(2, logits)), 2)
    assert choice.scores == pytest.approx([2 / 15, 4 / 15, 1 / 15]) and choice.order.tolist() == [1, 0]
    assert choice.condition == pytest.approx(4 / 15)  # a relative error of what is at most this large
    two = FastV().select(make(taps=attend(2, logits, [0.0] * 6)), 1)  # heads are averaged after their softmax
    assert two.scores == pytest.approx([(2 / 15 + 1 / 6) / 2, (4 / 15 + 1 / 6) / 2, (1 / 15 + 1 / 6) / 2])
    with pytest.raises(PlanError, match="before layer 0"):
        FastV().taps(0, 8, 0)


def test_pyramiddrop_reads_its_own_layer() -> None:
    assert PyramidDrop().taps(3, 8, 1) == (("q_rotary", 3), ("k_rotary", 3))
    choice = PyramidDrop().select(make(taps=attend(3, [0.0, 0.0, LOG[1], LOG[2], 0.0, 0.0])), 1)
    assert choice.scores == pytest.approx([1 / 9, 2 / 9, 3 / 9]) and choice.order.tolist() == [2]


def test_query_heads_share_keys_in_order() -> None:
    """Four query heads over two key heads: 0 and 1 read the first, 2 and 3 the second."""
    first, second = [0.0, 9.0, 0.0, 0.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0, 0.0, 0.0]
    queries = np.zeros((4, 6, 2))
    queries[1, :, 0] = 1  # the others ask nothing, and attend to all alike
    choice = PyramidDrop().select(make(taps=attend(3, first, second, queries=queries)), 1)
    high, even = math.exp(9) / (math.exp(9) + 5), 1 / 6
    assert choice.scores == pytest.approx([(high + 3 * even) / 4, *[((1 - high) / 5 + 3 * even) / 4] * 2])


def test_equal_attention_and_what_float32_cannot_show() -> None:
    selector, inputs = PyramidDrop(), make(taps=attend(3, [0.0, 1.0, 0.5, 1.0, 0.0, 0.0]))
    assert selector.select(inputs, 1).order.tolist() == [0]
    assert selector.replay(inputs, 1, [2], EXACT).exact and not selector.replay(inputs, 1, [1], FINE).holds
    tiny = make(taps=attend(3, [500.0, 0.0, 2.0, 1.0, 0.0, 0.0]))  # exp(-500) is no float32: all of them are 0 there
    assert selector.select(tiny, 1).order.tolist() == [1]
    assert selector.replay(tiny, 1, [0], FINE).holds and not selector.replay(tiny, 1, [0], EXACT).holds


def rating(second: float, third: float) -> TokenInputs:
    """m is softmax((0, third)) over the two text rows for one visual token that points at them."""
    embeds = np.array([[9.0, 0], [1, 0], [1, 0], [1, 0], [second, 0], [third, 0]])
    keys = attend(3, [0.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    keys["q_rotary", 3] = np.array([[[0.0, 0], [0, 0], [0, 0], [0, 0], [1, 0], [-1, 0]]])
    return make(taps=keys, embeds=embeds)


def attention_of(sign: float, rows: int) -> Any:
    weights = np.exp(sign * np.array([0.0, 2.0, 0.0, 1.0, 0.0, 0.0])[:rows])
    return (weights / weights.sum())[1:4]


def test_sparsevlm_asks_those_rows_the_picture_speaks_to() -> None:
    choice = SparseVlm().select(rating(0.0, 1.0), 2)  # the last row, which turns away from what the other wants
    assert choice.scores == pytest.approx(attention_of(-1, 6)) and choice.order.tolist() == [1, 2]
    assert choice.carried["raters"].tolist() == [0, 0, 0, 0, 0, 1]
    choice = SparseVlm().select(rating(1.0, 0.0), 2)
    assert choice.scores == pytest.approx(attention_of(1, 5)) and choice.carried["raters"].tolist() == [0, 0, 0, 0, 1, 0]
    every = SparseVlm(text="all").select(rating(1.0, 0.0), 1)  # the prefix has by far the highest m
    assert every.carried["raters"].tolist() == [1, 0, 0, 0, 0, 0] and every.scores == pytest.approx([0, 0, 0])  # and sees no picture


def test_sparsevlm_without_a_row_above_the_mean_asks_all() -> None:
    choice = SparseVlm().select(rating(1.0, 1.0), 1)
    assert choice.carried["raters"].tolist() == [0, 0, 0, 0, 1, 1]
    assert choice.scores == pytest.approx((attention_of(1, 5) + attention_of(-1, 6)) / 2)
    assert SparseVlm().select(replace(rating(1.0, 0.0), text=np.array([5])), 1).carried["raters"][5] == 1
    with pytest.raises(ValueError, match="no text row"):
        SparseVlm().select(replace(rating(1.0, 0.0), text=np.array([], np.int64)), 1)


def test_sparsevlm_goes_on_with_its_first_raters() -> None:
    carried = SparseVlm().select(rating(0.0, 1.0), 2).carried
    later = replace(rating(1.0, 0.0), carried=carried)  # by its own embeddings it would ask the other row
    assert SparseVlm().select(later, 2).scores == pytest.approx(attention_of(-1, 6))
    assert SparseVlm().select(later, 2).carried["raters"].tolist() == carried["raters"].tolist()


def test_a_rater_that_rounding_may_turn_is_a_near_tie() -> None:
    """Both rows lie at the mean: the scores may be those of the one, of the other, or of both."""
    inputs = rating(0.0, 1e-5)
    own, bounds = SparseVlm().select(inputs, 1), SparseVlm().bounds(inputs, 1, FINE)
    assert own.scores == pytest.approx(attention_of(-1, 6)) and bounds.doubtful
    for other in (attention_of(1, 5), attention_of(-1, 6), (attention_of(1, 5) + attention_of(-1, 6)) / 2):
        assert (bounds.low <= other).all() and (other <= bounds.high).all()
    assert SparseVlm().replay(inputs, 1, [0], FINE).holds and not SparseVlm().replay(inputs, 1, [0], EXACT).holds
    later = replace(rating(1.0, 0.0), carried=own.carried)
    assert SparseVlm().bounds(later, 1, FINE).doubtful  # what was a near tie still is one at the next cut
    clear = SparseVlm().bounds(rating(0.0, 1.0), 1, FINE)
    assert not clear.doubtful and clear.high - clear.low == pytest.approx(2e-4 * clear.values)


def transition(**changes: Any) -> TokenInputs:
    """Layers 0..2 turn no row but visual 2 (by a right angle); each mlp makes the rows of layer l (l + 1) times as long."""
    taps = attend(3, [0.0] * 6)
    for layer in range(3):
        given = np.tile([2.0, 0.0], (6, 1))
        turned = given.copy()
        turned[2] = [0.0, 2.0]
        taps |= {("attention_in", layer): given, ("attention_out", layer): turned}
        taps |= {("mlp_in", layer): given, ("mlp_out", layer): turned * (layer + 1)}
    return make(taps=taps, **changes)


def test_transprune_by_hand() -> None:
    """c is 0, and 1 for the row that is turned; so w is 1 / (5 + e), and e times that."""
    choice = TransPrune(first=1).select(transition(), 2)  # layers 1 and 2: lengths 1 + 2 and 1 + 3
    expected = 7 * np.array([1.0, math.e, 1.0]) / (5 + math.e)
    assert choice.carried["transition"] == pytest.approx(7 / (5 + math.e) * np.array([1, 1, math.e, 1, 1, 1]))
    guided = np.full(3, (1 / 5 + 1 / 6) / 2)
    assert choice.scores == pytest.approx(expected / (expected.sum() + 1e-8) + guided / (guided.sum() + 1e-8))
    assert choice.order.tolist() == [1, 0]
    image = TransPrune(first=1, weights="image").select(transition(), 1)
    assert image.carried["transition"] == pytest.approx(7 / (2 + math.e) * np.array([0, 1, math.e, 1, 0, 0]))


def test_transprune_counts_from_the_papers_layer_and_goes_on() -> None:
    def layers(selector: TransPrune, layer: int, depth: int, since: int = 0) -> list[int]:
        return sorted({number for kind, number in selector.taps(layer, depth, since) if kind == "mlp_in"})

    assert layers(TransPrune(), 9, 32) == [6, 7, 8] and layers(TransPrune(), 9, 32, since=7) == [7, 8]
    assert layers(TransPrune(), 3, 8) == [2] and layers(TransPrune(), 2, 32) == [1]  # at least the layer before the cut
    assert layers(TransPrune(first=0), 3, 8) == [0, 1, 2] and layers(TransPrune(first=7), 3, 8) == [2]
    with pytest.raises(PlanError, match="before layer 0"):
        TransPrune().taps(0, 8, 0)
    before = np.arange(6.0)
    later = TransPrune(first=0).select(transition(since=2, carried={"transition": before}), 1)
    assert later.carried["transition"] == pytest.approx(before + 4 / (5 + math.e) * np.array([1, 1, math.e, 1, 1, 1]))
    assert before.tolist() == list(range(6))  # what was carried is left alone


def test_transprune_takes_opposite_directions_for_change_or_not() -> None:
    """A row that is turned round: 1 - cos is 2, 1 - |cos| is 0."""
    inputs = transition(since=2)
    for kind in ("attention_out", "mlp_out"):
        inputs.taps[kind, 2][2] = -inputs.taps[kind, 2][1]
    sequence = TransPrune().select(inputs, 1).carried["transition"]
    assert sequence[2] / sequence[1] == pytest.approx(math.exp(2))
    assert TransPrune(weights="image").select(inputs, 1).carried["transition"][1:4] == pytest.approx([4 / 3] * 3)


def vision(scores: Any, **changes: Any) -> TokenInputs:
    visual = np.arange(len(scores))
    return make(visual=visual, original=visual, visual_total=len(scores), visual_scores=np.array(scores, float), layer=0, **changes)


def test_the_vision_encoder_ranks() -> None:
    assert FoPru().vision_tap == VisionTap("feature", "mean")
    assert FoPru(queries="class_token").vision_tap == VisionTap("feature", "class_token")
    assert VisionZip().vision_tap == VisionTap("second_last", "auto") and VisionZip(queries="mean").vision_tap.queries == "mean"
    for selector in (FoPru(), VisionZip()):
        assert selector.taps(0, 8, 0) == ()
        choice = selector.select(vision([1, 3, 2, 3]), 3)
        assert choice.order.tolist() == [1, 3, 2] and choice.scores.tolist() == [1, 3, 2, 3] and choice.condition == 3
        for wrong in (replace(vision([1, 2]), layer=1), replace(vision([1, 2]), visual=np.arange(1))):
            with pytest.raises(PlanError, match="before layer 0 and as the first cut"):
                selector.select(wrong, 1)


def test_whole_rows() -> None:
    inputs = vision([5, 0, 1, 2, 2, 1, 0, 0, 3], grid=(3, 3))
    choice = FoPru(strategy="row").select(inputs, 6)
    assert choice.scores.tolist() == [6, 6, 6, 5, 5, 5, 3, 3, 3] and choice.order.tolist() == [0, 1, 2, 3, 4, 5]
    equal = FoPru(strategy="row").select(vision([1, 1, 2, 0, 3, 3], grid=(3, 2)), 4)
    assert equal.order.tolist() == [4, 5, 0, 1]  # of two equal rows the upper one
    for order, said in (([0, 1, 2, 3, 4, 6], "in part"), ([1, 0, 2, 3, 4, 5], "not from left to right"), ([1, 2, 3], "in part")):
        replay = FoPru(strategy="row").replay(inputs, len(order), order, FINE)
        assert not replay.holds and said in (replay.invalid or "")
    assert "no whole rows" in (FoPru(strategy="row").replay(inputs, 4, [0, 1, 2, 3], FINE).invalid or "")
    assert not FoPru(strategy="row").replay(inputs, 3, [3, 4, 5], FINE).holds
    with pytest.raises(PlanError, match="keep=4 is no multiple of the 3"):
        FoPru(strategy="row").select(inputs, 4)
    with pytest.raises(PlanError, match="9 visual tokens are no grid of 2 x 3"):
        FoPru(strategy="row").select(replace(inputs, grid=(2, 3)), 3)
