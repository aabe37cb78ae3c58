"""FastV, PyramidDrop, SparseVLM and TransPrune against their formulas in plain NumPy, one unpadded sample after the other."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Stage
from sievert.graph_passes.selectors.base import Selector, StageGeometry, Tap, TapKind
from sievert.graph_passes.selectors.fastv import FastV
from sievert.graph_passes.selectors.pyramiddrop import PyramidDrop
from sievert.graph_passes.selectors.registry import SELECTORS, make, options
from sievert.graph_passes.selectors.sparsevlm import SparseVlm
from sievert.graph_passes.selectors.transprune import TransPrune
from tests.bundle.test_plan import GEOMETRY as MODEL
from tests.graph_passes.selectors.harness import make_geometry, random_feeds, run_standalone, tap_name

Array = NDArray[Any]
Feeds = dict[str, Array]
ALL = (FastV(), PyramidDrop(), SparseVlm(), TransPrune())
MODULES: tuple[tuple[TapKind, TapKind], ...] = (("attention_in", "attention_out"), ("mlp_in", "mlp_out"))
STAGE = make_geometry(visual=20, keep=9, batch=3, sequence=40, heads=6, kv_heads=2, layer=5, depth=8)


def make_feeds(selector: Selector, g: StageGeometry, seed: int = 1, *, dtype: Any = np.float32) -> Feeds:
    """Prompts of three lengths with text before, between and after the visual tokens; padding is far larger than any real row."""
    taps = selector.taps(g.layer, g.depth, g.since)
    feeds = random_feeds(g, seed, dtype=dtype, taps=taps)
    for sample in range(g.batch):
        real = g.sequence - 3 * sample
        rows = np.sort(np.random.default_rng([seed, sample]).permutation(real - 4)[: g.visual]) + 2
        is_real = np.arange(g.sequence) < real
        feeds["visual_index"][sample], feeds["real"][sample] = rows, is_real
        feeds["all_text"][sample] = is_real & ~np.isin(np.arange(g.sequence), rows)
        feeds["text"][sample] = feeds["all_text"][sample] & (np.arange(g.sequence) > rows[0])
        for name in ("inputs_embeds", *(tap_name(tap, taps) for tap in taps)):
            feeds[name][sample][..., real:, :] = 50 * feeds[name][sample][..., real:, :] + 10
    return feeds


def alone(feeds: Feeds, sample: int, name: str) -> Array:
    """One sample's real rows in float64."""
    return np.asarray(feeds[name][sample][..., feeds["real"][sample], :], np.float64)


def softmax(logits: Array) -> Array:
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return np.asarray(powers / powers.sum(-1, keepdims=True))


def attention(feeds: Feeds, sample: int, g: StageGeometry) -> Array:
    """The whole causal map of a layer, mean over heads: [S, S]."""
    q, k = alone(feeds, sample, "q_rotary"), alone(feeds, sample, "k_rotary")
    maps = []
    for head in range(g.heads):
        logits = g.attention_scale * q[head] @ k[head // (g.heads // g.kv_heads)].T
        maps.append(softmax(np.where(np.tri(len(logits), dtype=bool), logits, -np.inf)))
    return np.asarray(np.mean(maps, axis=0))


def text_rows(feeds: Feeds, sample: int, text: str) -> Array:
    return np.flatnonzero(feeds["text" if text == "after_image" else "all_text"][sample])


def find_raters(feeds: Feeds, sample: int, text: str) -> Array:
    embeds, rows = alone(feeds, sample, "inputs_embeds"), text_rows(feeds, sample, text)
    m = softmax(embeds[feeds["visual_index"][sample]] @ embeds[rows].T).mean(0)
    return np.asarray(rows[m > m.mean()])


def sum_transitions(feeds: Feeds, sample: int, taps: tuple[Tap, ...], layers: range, weights: str) -> Array:
    """Over both modules of ``layers``: [S]."""
    visual = feeds["visual_index"][sample]
    total = np.zeros(feeds["real"][sample].sum())
    for layer in layers:
        for module in MODULES:
            before, after = (alone(feeds, sample, tap_name(Tap(kind, layer), taps)) for kind in module)
            sizes = np.linalg.norm(before, axis=1), np.linalg.norm(after, axis=1)
            cosine = (before * after).sum(1) / (sizes[0] * sizes[1])
            stretch = sizes[1] / sizes[0]
            if weights == "sequence":
                total += stretch * softmax(1 - cosine)
            else:
                total[visual] += stretch[visual] * softmax(1 - np.abs(cosine[visual]))
    return total


def assert_ranked(result: Any, expected: list[Array], keep: int) -> None:
    np.testing.assert_allclose(result.scores, np.stack(expected), rtol=2e-5, atol=1e-7)
    np.testing.assert_array_equal(result.order, np.argsort(-result.scores, axis=1, kind="stable")[:, :keep])


@pytest.mark.parametrize("selector", [FastV(), PyramidDrop()])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_the_last_real_row_scores(selector: Selector, heads: tuple[int, int]) -> None:
    g = replace(STAGE, heads=heads[0], kv_heads=heads[1])
    feeds = make_feeds(selector, g)
    expected = [attention(feeds, sample, g)[-1][feeds["visual_index"][sample]] for sample in range(3)]
    assert_ranked(run_standalone(selector, g, feeds), expected, g.keep)


def test_each_reads_the_layer_it_says() -> None:
    assert FastV().taps(2, 32) == (Tap("q_rotary", 1), Tap("k_rotary", 1))
    assert PyramidDrop().taps(0, 32) == (Tap("q_rotary", 0), Tap("k_rotary", 0))
    assert SparseVlm().taps(6, 32, 2) == (Tap("q_rotary", 6), Tap("k_rotary", 6))
    assert all(tap.layer >= 2 for selector in ALL for tap in selector.taps(3, 32, 2)), "what ran before the previous cut is gone"


@pytest.mark.parametrize("text", ["after_image", "all"])
@pytest.mark.parametrize("heads", [(6, 2), (3, 3), (4, 1)])
def test_sparsevlm_lets_raters_score(text: Any, heads: tuple[int, int]) -> None:
    g, selector = replace(STAGE, heads=heads[0], kv_heads=heads[1]), SparseVlm(text=text)
    feeds = make_feeds(selector, g, 2)
    raters = [find_raters(feeds, sample, text) for sample in range(3)]
    assert all(0 < len(rows) < len(text_rows(feeds, sample, text)) for sample, rows in enumerate(raters))
    result = run_standalone(selector, g, feeds)
    expected = [attention(feeds, sample, g)[rows].mean(0)[feeds["visual_index"][sample]] for sample, rows in enumerate(raters)]
    assert_ranked(result, expected, g.keep)
    assert list(result.carried) == ["raters"]
    assert [np.flatnonzero(row).tolist() for row in result.carried["raters"]] == [rows.tolist() for rows in raters]
    assert set(result.carried["raters"].ravel()) == {0, 1}


def test_raters_that_were_carried_are_kept() -> None:
    g = replace(STAGE, since=2)
    feeds = make_feeds(SparseVlm(), g, 3)
    mask = np.zeros((3, 40), np.float32)
    for sample in range(3):
        mask[sample, text_rows(feeds, sample, "all")[:2]] = 1  # not what the rule would choose: text before the image, too
    result = run_standalone(SparseVlm(), g, {**feeds, "carried.raters": mask})
    expected = []
    for sample in range(3):
        rows = np.flatnonzero(mask[sample])
        expected.append(attention(feeds, sample, g)[rows].mean(0)[feeds["visual_index"][sample]])
    assert_ranked(result, expected, g.keep)
    np.testing.assert_array_equal(result.carried["raters"], mask)


@pytest.mark.parametrize("words", [[4], [4, 5, 6, 7]])
def test_where_no_word_is_above_the_mean_all_rate(words: list[int]) -> None:
    g = make_geometry(visual=3, keep=2, sequence=10)
    feeds = random_feeds(g, 4)
    feeds["visual_index"][:] = [[1, 2, 3]]
    feeds["real"][:] = np.arange(10) < 8
    feeds["text"][:] = np.isin(np.arange(10), words)
    feeds["inputs_embeds"][:, 4:8] = feeds["inputs_embeds"][:, 4:5]  # the same word again and again
    result = run_standalone(SparseVlm(), g, feeds)
    assert np.flatnonzero(result.carried["raters"]).tolist() == words
    assert_ranked(result, [attention(feeds, 0, g)[words].mean(0)[1:4]], 2)


@pytest.mark.parametrize("weights", ["sequence", "image"])
@pytest.mark.parametrize("text", ["after_image", "all"])
@pytest.mark.parametrize("first", [-1, 0, 4])
def test_transprune_adds_transition_and_attention(weights: Any, text: Any, first: int) -> None:
    selector = TransPrune(weights=weights, text=text, first=first)
    feeds, taps = make_feeds(selector, STAGE, 5), selector.taps(STAGE.layer, STAGE.depth)
    layers = range(2 if first < 0 else first, 5)  # 6/32 of 8 layers is 1.5
    result = run_standalone(selector, STAGE, feeds)
    expected = []
    for sample in range(3):
        visual, total = feeds["visual_index"][sample], sum_transitions(feeds, sample, taps, layers, weights)
        iga = attention(feeds, sample, STAGE)[text_rows(feeds, sample, text)].mean(0)[visual]
        expected.append(total[visual] / (total[visual].sum() + 1e-8) + iga / (iga.sum() + 1e-8))
        np.testing.assert_allclose(result.carried["transition"][sample, : len(total)], total, rtol=2e-5, atol=1e-7)
        assert (result.carried["transition"][sample, len(total) :] == 0).all(), "padding transforms nothing"
    assert_ranked(result, expected, STAGE.keep)


@pytest.mark.parametrize("carried", [True, False])
def test_transprune_goes_on_summing_after_a_cut(carried: bool) -> None:
    g, selector = replace(STAGE, since=3), TransPrune()
    feeds, taps = make_feeds(selector, g, 6), selector.taps(g.layer, g.depth, g.since)
    earlier = np.random.default_rng(6).random((3, 40), np.float32)
    feeds |= {"carried.transition": earlier} if carried else {}
    result = run_standalone(selector, g, feeds)
    expected = []
    for sample in range(3):
        visual, total = feeds["visual_index"][sample], sum_transitions(feeds, sample, taps, range(3, 5), "sequence")
        total += earlier[sample, : len(total)] * carried
        iga = attention(feeds, sample, g)[text_rows(feeds, sample, "after_image")].mean(0)[visual]
        expected.append(total[visual] / total[visual].sum() + iga / iga.sum())
        np.testing.assert_allclose(result.carried["transition"][sample, : len(total)], total, rtol=2e-5, atol=1e-7)
    assert_ranked(result, expected, g.keep)


@pytest.mark.parametrize(
    ("first", "layer", "depth", "since", "layers"),
    [
        *[(-1, 7, 32, 0, range(6, 7)), (-1, 9, 32, 7, range(7, 9)), (-1, 12, 32, 9, range(9, 12)), (-1, 12, 32, 0, range(6, 12))],
        *[(-1, 6, 28, 0, range(5, 6)), (-1, 5, 24, 0, range(4, 5)), (-1, 1, 32, 0, range(1)), (-1, 7, 36, 0, range(6, 7))],
        *[(0, 3, 32, 0, range(3)), (2, 3, 32, 1, range(2, 3)), (30, 3, 32, 0, range(2, 3)), (-1, 2, 4, 0, range(1, 2))],
    ],
)
def test_which_layers_transprune_sums(first: int, layer: int, depth: int, since: int, layers: range) -> None:
    selector = TransPrune(first=first)
    assert selector.layers(layer, depth, since) == layers
    expected = {Tap(kind, each) for module in MODULES for kind in module for each in layers} | {
        Tap("q_rotary", layer),
        Tap("k_rotary", layer),
    }
    assert set(selector.taps(layer, depth, since)) == expected
    assert len(selector.taps(layer, depth, since)) == len(expected)


@pytest.mark.parametrize("selector", ALL)
def test_ties_go_to_the_lower_place(selector: Selector) -> None:
    feeds = make_feeds(selector, STAGE, 7)
    for name in feeds:
        if name.startswith(("attention_", "mlp_", "q_", "k_")):
            feeds[name][:] = 0
    # With q of 0 each row spreads evenly over what it sees, and with nothing between the visual tokens all text sees the same.
    for sample in range(3):
        feeds["visual_index"][sample] = np.arange(2, 22)
        feeds["all_text"][sample] = feeds["real"][sample] & ~np.isin(np.arange(40), np.arange(2, 22))
        feeds["text"][sample] = feeds["all_text"][sample] & (np.arange(40) > 2)
    result = run_standalone(selector, STAGE, feeds)
    assert all(len(np.unique(row)) == 1 for row in result.scores)
    assert result.order.tolist() == [list(range(9))] * 3


@pytest.mark.parametrize("selector", ALL)
def test_without_text_numbers_stay_finite(selector: Selector) -> None:
    feeds = make_feeds(selector, STAGE, 8)
    feeds["visual_index"][:] = np.arange(20)
    feeds["real"][:] = np.arange(40) < 20
    feeds["text"][:] = feeds["all_text"][:] = False
    result = run_standalone(selector, STAGE, feeds)
    assert np.isfinite(result.scores).all()
    assert all(np.isfinite(value).all() for value in result.carried.values())
    assert all(sorted(set(order)) == sorted(order) for order in result.order.tolist())
    if isinstance(selector, SparseVlm):
        assert (result.scores == 0).all()


@pytest.mark.parametrize("selector", [*ALL, TransPrune(weights="image")])
@pytest.mark.parametrize(("dtype", "size"), [(np.float16, 6e4), (np.float32, 1e15), (np.float32, 1e-8), (np.float32, 0)])
def test_huge_and_vanishing_values_stay_finite(selector: Selector, dtype: Any, size: float) -> None:
    feeds = make_feeds(selector, STAGE, 9, dtype=dtype)
    feeds = {name: (np.clip(feed, -1, 1) * dtype(size)).astype(dtype) if feed.dtype == dtype else feed for name, feed in feeds.items()}
    result = run_standalone(selector, STAGE, feeds)
    assert np.isfinite(result.scores).all() and result.scores.min() >= 0
    assert all(np.isfinite(value).all() for value in result.carried.values())


@pytest.mark.parametrize("selector", [*ALL, TransPrune(weights="image")])
def test_padding_and_batch_change_nothing(selector: Selector) -> None:
    feeds = make_feeds(selector, STAGE, 10)
    together = run_standalone(selector, STAGE, feeds)
    for sample in range(3):
        real = 40 - 3 * sample
        single = {name: feed[sample : sample + 1] for name, feed in feeds.items()}
        for name, feed in single.items():
            axis = {2: 1, 3: 1, 4: 2}[feed.ndim]
            if feed.shape[axis] == 40:
                single[name] = np.take(feed, range(real), axis=axis)
        result = run_standalone(selector, replace(STAGE, batch=1, sequence=real), single)
        np.testing.assert_array_equal(result.order[0], together.order[sample])
        np.testing.assert_allclose(result.scores[0], together.scores[sample], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("selector", "layer", "words"),
    [
        (FastV(), 0, "layer=0, but fastv reads the attention of the layer before the cut: choose 1..9, or pyramiddrop"),
        (TransPrune(), 0, "layer=0, but transprune reads what the layers before the cut did: choose 1..9, or divprune"),
        (PyramidDrop(), 0, ""),
        (SparseVlm(), 0, ""),
        (FastV(), 1, ""),
        (TransPrune(), 1, ""),
    ],
)
def test_layers_that_are_refused(selector: Selector, layer: int, words: str) -> None:
    stage = Stage(selector=selector.name, layer=layer, keep=4, requested="4")
    if not words:
        selector.check(stage, MODEL)
        return
    with pytest.raises(PlanError) as refusal:
        selector.check(stage, MODEL)
    assert words in str(refusal.value)


def test_options_and_schedules_are_the_papers() -> None:
    assert options("fastv") == options("pyramiddrop") == {}
    assert options("sparsevlm") == {"text": "after_image"}
    assert options("transprune") == {"weights": "sequence", "text": "after_image", "first": -1}
    with pytest.raises(PlanError, match="first=-2 must be a whole number >= -1"):
        make("transprune", {"first": -2})
    schedules = {name: SELECTORS[name].schedule for name in ("fastv", "pyramiddrop", "sparsevlm", "transprune")}
    assert {name: (each.depth, each.layers, each.positions) for name, each in schedules.items()} == {
        "fastv": (32, (2,), "keep"),
        "pyramiddrop": (32, (8, 16, 24), "compact"),
        "sparsevlm": (32, (3, 7, 16), "keep"),
        "transprune": (32, (7, 9, 12), "compact"),
    }
    assert [round(share * 576) for share in schedules["sparsevlm"].shares] == [300, 200, 110]
    assert schedules["transprune"].shares == (0.875, 0.625, 0.125)
    assert schedules["pyramiddrop"].shares == (0.5, 0.25, 0.125)
