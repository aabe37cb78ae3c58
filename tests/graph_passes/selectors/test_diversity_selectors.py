"""DART, DivPrune and CDPruner against their formulas, written out here in numpy and float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Stage
from sievert.graph_passes.selectors.base import Tap
from sievert.graph_passes.selectors.cdpruner import CdPruner
from sievert.graph_passes.selectors.dart import Dart
from sievert.graph_passes.selectors.divprune import DivPrune
from tests.bundle.small import GEOMETRY
from tests.graph_passes.selectors.harness import build_standalone, make_geometry, random_feeds, run_standalone

Array = np.ndarray[Any, Any]


def place_prompts(geometry, prefixes, texts, *, width=64, seed=0, dtype=np.float32):
    """Prompts of ``prefixes[b]`` text rows, the image, ``texts[b]`` text rows and padding, with random values everywhere."""
    g, rng = geometry, np.random.default_rng(seed)
    rows, first, count = np.arange(g.sequence), np.array(prefixes)[:, None], np.array(texts)[:, None]
    end = first + g.visual + count
    assert end.max() <= g.sequence
    wide = {name: rng.normal(size=(g.batch, g.sequence, width)).astype(dtype) for name in ("inputs_embeds", "final_normed")}
    real, text = rows < end, (rows >= first + g.visual) & (rows < end)
    return {
        "visual_index": first + np.arange(g.visual),
        "text": text,
        "all_text": text | (rows < first),
        "real": real,
        "k_rotary": rng.normal(size=(g.batch, g.kv_heads, g.sequence, g.head_size)).astype(dtype),
        **wide,
    }


def place_embeddings(visual, text=()):
    """One prompt: these embeddings of the image, then those of the text; its geometry keeps everything."""
    geometry = make_geometry(visual=len(visual), keep=len(visual), sequence=len(visual) + len(text) + 1)
    feeds = place_prompts(geometry, [0], [len(text)], width=len(visual[0]))
    feeds["inputs_embeds"][0, : len(visual) + len(text)] = [*visual, *text]
    return geometry, feeds


def cosines(left: Array, right: Array) -> Array:
    """Of all pairs of rows; a zero row has cosine 0 with everything."""
    unit = [rows / np.where((n := np.linalg.norm(rows, axis=1, keepdims=True)) > 0, n, 1) for rows in (left, right)]
    return unit[0] @ unit[1].T


def follow_divprune(embeds: Array, keep: int) -> tuple[list[int], Array]:
    distance = 1 - cosines(embeds, embeds)
    nearest = np.array([min(distance[i][j] for j in range(len(embeds)) if j != i) for i in range(len(embeds))])
    order = [int(nearest.argmax())]
    while len(order) < keep:
        left = [i for i in range(len(embeds)) if i not in order]
        order.append(max(left, key=lambda i: min(distance[i][j] for j in order)))
    return order, nearest


def follow_cdpruner(embeds: Array, text: Array, keep: int) -> tuple[list[int], Array]:
    relevance = cosines(embeds, text.mean(axis=0, keepdims=True))[:, 0]
    relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min() + 1e-6)
    kernel = relevance[:, None] * cosines(embeds, embeds) * relevance
    gains = np.diag(kernel).copy()
    factors: list[Array] = []
    order: list[int] = []
    for _ in range(keep):
        best = max((i for i in range(len(embeds)) if i not in order), key=lambda i: gains[i])
        factor = (kernel[best] - sum(c * c[best] for c in factors)) / np.sqrt(max(gains[best], 1e-6))
        gains = gains - factor**2
        factors.append(factor)
        order.append(best)
    return order, np.diag(kernel)


def follow_dart(norms: Array, text_norms: Array, rows: Array, text_rows: Array, keep: int) -> list[int]:
    order: list[int] = np.argsort(-norms, kind="stable")[: min(4, keep)].tolist()
    pivots = [*rows[order], *text_rows[np.argsort(-text_norms, kind="stable")[:4]]]
    each, more = divmod(max(keep - 4, 0), len(pivots))
    for number, pivot in enumerate(pivots):
        similarity = cosines(rows, pivot[None])[:, 0]
        left = sorted((i for i in range(len(rows)) if i not in order), key=lambda i: similarity[i])
        order += left[: each + (number < more)]
    return order


def expect_dart(feeds, sample, keep, *, on="keys", text="after_image"):
    if on == "keys":
        keys, rows = feeds["k_rotary"][sample].astype(np.float64), feeds["final_normed"][sample].astype(np.float64)
        norms = np.abs(keys).sum(axis=(0, 2))
    else:
        rows = feeds["inputs_embeds"][sample].astype(np.float64)
        norms = np.abs(rows).sum(axis=1)
    visual, wanted = feeds["visual_index"][sample], feeds["text" if text == "after_image" else "all_text"][sample]
    return follow_dart(norms[visual], norms[wanted], rows[visual], rows[wanted], keep), norms[visual]


def expect_on_embeddings(selector, feeds, sample, keep):
    rows = feeds["inputs_embeds"][sample].astype(np.float64)
    visual = rows[feeds["visual_index"][sample]]
    if isinstance(selector, DivPrune):
        return follow_divprune(visual, keep)
    text = feeds["text" if selector.text == "after_image" else "all_text"][sample]
    return follow_cdpruner(visual, rows[text], keep)


# Batches of three prompts: text after the image from none to plenty, with and without text before it.
PREFIXES = [0, 3, 5]
TEXTS = [[0, 1, 2], [3, 4, 0], [9, 2, 5]]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("options", [{}, {"text": "all"}, {"on": "embeddings"}, {"on": "embeddings", "text": "all"}])
@pytest.mark.parametrize("texts", TEXTS)
def test_dart_follows_its_formula_in_every_sample(options, texts, dtype):
    geometry = make_geometry(visual=40, keep=27, batch=3, sequence=52)
    feeds = place_prompts(geometry, PREFIXES, texts, dtype=dtype)
    result = run_standalone(Dart(**options), geometry, feeds)
    for sample in range(3):
        order, scores = expect_dart(feeds, sample, 27, **options)
        assert result.order[sample].tolist() == order
        np.testing.assert_allclose(result.scores[sample], scores, rtol=1e-5)


@pytest.mark.parametrize("keep", [*range(1, 17), 39, 40])
def test_dart_shares_out_every_count(keep):
    geometry = make_geometry(visual=40, keep=keep, batch=3, sequence=52)
    feeds = place_prompts(geometry, PREFIXES, [0, 3, 7], seed=keep)
    result = run_standalone(Dart(), geometry, feeds)
    assert result.order.tolist() == [expect_dart(feeds, sample, keep)[0] for sample in range(3)]


@pytest.mark.parametrize("visual", [1, 2, 3, 4, 5, 6])
@pytest.mark.parametrize("room", [0, 1, 2, 3])
def test_dart_with_few_tokens_of_either_kind(visual, room):
    # Where the sequence has no room for four text rows, the graph is made for fewer pivots.
    geometry = make_geometry(visual=visual, keep=visual, batch=2, sequence=visual + room)
    feeds = place_prompts(geometry, [0, 0], [room, room // 2], seed=visual)
    result = run_standalone(Dart(), geometry, feeds)
    assert result.order.tolist() == [expect_dart(feeds, sample, visual)[0] for sample in range(2)]


@pytest.mark.parametrize(("pivot", "rest"), [((6, 0), [1, 0]), ((0, 6), [0, 1]), ((3, 3), [0, 1]), ((-3, 3), [0, 1]), ((3, -3), [1, 0])])
def test_dart_by_hand(pivot, rest):
    # Norms fall from token 5 to token 2; with one text token the five pivots share out two: one each for tokens 5 and 4.
    geometry, feeds = place_embeddings([(1, 0), (0, 1), (0, 2), (0, 3), (0, 4), pivot], [(9, 9)])
    assert run_standalone(Dart(on="embeddings"), geometry, feeds).order.tolist() == [[5, 4, 3, 2, *rest]]


def test_dart_a_zero_vector_resembles_nothing():
    # To token 4, the first pivot, it is as unlike as token 1 is.
    geometry, feeds = place_embeddings([(1, 0), (0, 1), (2, 0), (3, 0), (4, 0), (0, 0)])
    assert run_standalone(Dart(on="embeddings"), geometry, feeds).order.tolist() == [[4, 3, 2, 0, 1, 5]]


def test_dart_equal_norms_go_to_the_lower_place():
    geometry, feeds = place_embeddings([(1, 0)] * 12, [(1, 0)] * 6)
    assert run_standalone(Dart(on="embeddings"), geometry, feeds).order.tolist() == [list(range(12))]


def test_dart_reads_all_kv_heads_and_neither_padding_nor_the_prefix():
    geometry = make_geometry(visual=20, keep=15, batch=3, sequence=34)
    feeds = place_prompts(geometry, PREFIXES, [2, 4, 9])
    read = feeds["text"].copy()
    np.put_along_axis(read, feeds["visual_index"], True, axis=1)
    changed = dict(feeds)
    changed["k_rotary"] = np.where(read[:, None, :, None], feeds["k_rotary"], np.float32(1e4))
    changed["final_normed"] = np.where(read[:, :, None], feeds["final_normed"], np.float32(np.nan))
    before, after = (run_standalone(Dart(), geometry, given) for given in (feeds, changed))
    np.testing.assert_array_equal(before.order, after.order)
    swapped = {**feeds, "k_rotary": feeds["k_rotary"][:, ::-1].copy()}
    np.testing.assert_array_equal(before.order, run_standalone(Dart(), geometry, swapped).order)
    one_head = {**feeds, "k_rotary": feeds["k_rotary"] * np.array([1, 0], np.float32)[:, None, None]}
    assert before.order.tolist() != run_standalone(Dart(), geometry, one_head).order.tolist()


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
@pytest.mark.parametrize("selector", [DivPrune(), CdPruner(), CdPruner(text="all")])
@pytest.mark.parametrize("keep", [*range(1, 9), 30])
def test_sequential_selectors_follow_their_formulas(selector, keep, dtype):
    geometry = make_geometry(visual=30, keep=keep, batch=3, sequence=42)
    feeds = place_prompts(geometry, PREFIXES, [1, 9, 3], seed=keep, dtype=dtype)
    result = run_standalone(selector, geometry, feeds)
    for sample in range(3):
        order, scores = expect_on_embeddings(selector, feeds, sample, keep)
        assert result.order[sample].tolist() == order
        np.testing.assert_allclose(result.scores[sample], scores, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("selector", [DivPrune(), CdPruner()])
def test_many_steps_lose_no_precision(selector):
    # Embeddings of a real encoder resemble one another: a common part leaves cosines near 0.8.
    geometry = make_geometry(visual=200, keep=100, sequence=210)
    feeds = place_prompts(geometry, [1], [8], width=256)
    feeds["inputs_embeds"] += 2 * np.random.default_rng(1).normal(size=256).astype(np.float32)
    order, scores = expect_on_embeddings(selector, feeds, 0, 100)
    result = run_standalone(selector, geometry, feeds)
    assert result.order[0].tolist() == order
    np.testing.assert_allclose(result.scores[0], scores, rtol=1e-4, atol=1e-6)


X, Y, Z, ZERO = (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 0)


@pytest.mark.parametrize(
    ("visual", "order", "scores"),
    [
        ([X], [0], [0]),
        ([X, Y], [0, 1], [1, 1]),
        ([X, (-1, 0, 0), Y], [0, 1, 2], [1, 1, 1]),
        ([X, (3, 4, 0), Y], [0, 2, 1], [0.4, 0.2, 0.2]),
        ([X, X, Y, Y, Z], [4, 0, 2, 1, 3], [0, 0, 0, 0, 1]),
        ([X, X, ZERO], [2, 0, 1], [0, 0, 1]),
        ([ZERO, ZERO, X], [0, 1, 2], [1, 1, 1]),
        ([X, (7, 0, 0), (0, 5, 0)], [2, 0, 1], [0, 0, 1]),
    ],
)
def test_divprune_by_hand(visual, order, scores):
    geometry, feeds = place_embeddings(visual)
    result = run_standalone(DivPrune(), geometry, feeds)
    assert result.order[0].tolist() == order
    np.testing.assert_allclose(result.scores[0], scores, atol=1e-6)


def test_divprune_equals_go_to_the_lower_place():
    geometry, feeds = place_embeddings(np.eye(40).tolist())
    assert run_standalone(DivPrune(), geometry, feeds).order.tolist() == [list(range(40))]


def test_cdpruner_by_hand():
    # Relevance 1, 1, 0 and 0.6; token 1 repeats token 0, which leaves token 3 a gain of 0.36 - 0.36^2.
    geometry, feeds = place_embeddings([X, X, Y, (3, 4, 0)], [(2, 0, 0), (4, 0, 0)])
    result = run_standalone(CdPruner(), replace(geometry, keep=2), feeds)
    assert result.order.tolist() == [[0, 3]]
    np.testing.assert_allclose(result.scores, [[1, 1, 0, 0.36]], atol=1e-5)


@pytest.mark.parametrize(("near", "far", "order"), [(0.05, 0.02, [0, 1, 3]), (5e-4, 4e-4, [0, 1, 2])])
def test_cdpruner_guards_the_root_at_a_millionth(near, far, order):
    # Tokens 1 and 2 are all but equal, and as relevant. Gains of 0.0025 are above the guard: token 1 leaves nothing of token 2. Gains of
    # 2.5e-7 are below: a quarter of them goes, which leaves token 2 more than the 1.6e-7 of token 3.
    visual = [(1, 0, 0, 0), (0, 1, 0, 0), (0, 1, 0, 0.02), (0, 0, 1, 0), (0, 0, 0, 1)]
    geometry, feeds = place_embeddings(visual, [(1, near, far, 0)])
    assert run_standalone(CdPruner(), replace(geometry, keep=3), feeds).order.tolist() == [order]


def test_cdpruner_text_option_says_whose_embeddings_count():
    geometry = make_geometry(visual=2, keep=1, sequence=4)
    feeds = place_prompts(geometry, [1], [1], width=3)
    feeds["inputs_embeds"][0] = [(0, 9, 0), X, Y, X]
    assert run_standalone(CdPruner(), geometry, feeds).order.tolist() == [[0]]
    assert run_standalone(CdPruner(text="all"), geometry, feeds).order.tolist() == [[1]]


@pytest.mark.parametrize("embeds", [np.eye(8), np.zeros((8, 8)), np.ones((8, 8)), np.repeat(np.eye(4, 8), 2, axis=0)])
@pytest.mark.parametrize("texts", [0, 1])
@pytest.mark.parametrize("selector", [Dart(on="embeddings"), DivPrune(), CdPruner()])
def test_degenerate_embeddings_still_give_each_place_once(selector, texts, embeds):
    geometry, feeds = place_embeddings(embeds.tolist(), [[1.0] * 8] * texts)
    result = run_standalone(selector, geometry, feeds)
    assert sorted(result.order[0].tolist()) == list(range(8))
    assert np.isfinite(result.scores).all()


@pytest.mark.parametrize("selector", [CdPruner(), CdPruner(text="all")])
def test_cdpruner_without_text_takes_the_first_places(selector):
    geometry, feeds = place_embeddings(np.random.default_rng(0).normal(size=(12, 8)).tolist())
    result = run_standalone(selector, geometry, feeds)
    assert result.order.tolist() == [list(range(12))]
    assert (result.scores == 0).all()


def test_cdpruner_takes_more_tokens_than_there_are_dimensions():
    # From the seventh on, all gains are rounding: no token may come twice for that.
    geometry = make_geometry(visual=40, keep=40, batch=2, sequence=52)
    result = run_standalone(CdPruner(), geometry, place_prompts(geometry, [0, 3], [4, 9], width=6))
    assert [sorted(order) for order in result.order.tolist()] == [list(range(40))] * 2


@pytest.mark.parametrize(("dtype", "spread"), [(np.float16, 15000), (np.float32, 1e15), (np.float32, 1e-8), (np.float32, 0)])
@pytest.mark.parametrize("selector", [Dart(), Dart(on="embeddings"), DivPrune(), CdPruner()])
def test_huge_and_vanishing_values_stay_finite(selector, dtype, spread):
    geometry = make_geometry(visual=24, keep=16, sequence=34)
    feeds = place_prompts(geometry, [2], [8])
    for name in ("inputs_embeds", "final_normed", "k_rotary"):
        feeds[name] = (np.clip(feeds[name], -4, 4) * spread).astype(dtype)
    result = run_standalone(selector, geometry, feeds)
    assert np.isfinite(result.scores).all()
    assert len(set(result.order[0].tolist())) == 16
    if spread:
        plain = run_standalone(selector, geometry, {k: v / dtype(spread) if v.dtype == dtype else v for k, v in feeds.items()})
        assert result.order.tolist() == plain.order.tolist()


@pytest.mark.parametrize(("visual", "keep"), [(40, 1), (40, 4), (40, 5), (40, 21), (40, 40), (3, 3)])
@pytest.mark.parametrize("selector", [Dart(), DivPrune(), CdPruner()])
@pytest.mark.parametrize("room", [0, 12])
def test_largest_topk_is_what_the_graph_holds(selector, visual, keep, room):
    model = build_standalone(selector, make_geometry(visual=visual, keep=keep, sequence=visual + room))
    topks = [node.outputs[0].shape for node in model.graph if node.op_type == "TopK"]
    assert max(shape.numpy()[-1] for shape in topks if shape is not None) == selector.largest_topk(visual, keep)


def test_a_step_is_a_few_nodes():
    counts = {
        selector.name: [build_standalone(selector, make_geometry(visual=200, keep=keep)).graph.num_nodes() for keep in (40, 41)]
        for selector in (Dart(), DivPrune(), CdPruner())
    }
    assert {name: after - before for name, (before, after) in counts.items()} == {"dart": 0, "divprune": 3, "cdpruner": 14}
    assert counts["dart"][0] <= 90


def test_taps_are_what_each_reads():
    assert Dart().taps(2, 32) == (Tap("k_rotary", 1), Tap("final_normed", 2))
    assert Dart(on="embeddings").taps(2, 32) == ()
    assert DivPrune().taps(0, 32) == CdPruner().taps(0, 32) == ()


def test_dart_on_keys_needs_a_layer_before_its_cut():
    first, later = (Stage(selector="dart", layer=layer, keep=8, requested="8") for layer in (0, 1))
    with pytest.raises(PlanError, match=r"none before layer 0: cut before layer 1 or later, or set on=embeddings"):
        Dart().check(first, GEOMETRY)
    Dart().check(later, GEOMETRY)
    Dart(on="embeddings").check(first, GEOMETRY)


@pytest.mark.parametrize("selector", [DivPrune(), CdPruner()])
def test_the_others_cut_anywhere(selector):
    for layer in (0, 1):
        selector.check(Stage(selector=selector.name, layer=layer, keep=8, requested="8"), GEOMETRY)


@pytest.mark.parametrize("rank", [3, 12, 40])
def test_cdpruner_stays_sound_long_after_nothing_is_left_to_gain(rank):
    # Rounding, divided by the guarded root step after step, once made gains of -1e6: below the mark of what was taken already.
    geometry = make_geometry(visual=256, keep=200, sequence=270, batch=2)
    feeds, rng = random_feeds(geometry, rank), np.random.default_rng(rank)
    embeds = rng.normal(size=(2, 270, rank)) @ rng.normal(size=(rank, 64)) + 3 * rng.normal(size=64)
    feeds["inputs_embeds"] = embeds.astype(np.float32)
    result = run_standalone(CdPruner(), geometry, feeds)
    for order in result.order:
        assert sorted(set(order.tolist())) == sorted(order.tolist())
        assert order.min() >= 0 and order.max() < 256
