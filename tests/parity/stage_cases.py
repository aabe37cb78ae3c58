"""Random stages for the property tests: feeds for the graph, padded and batched, and the same samples alone for the transcriptions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from hypothesis import HealthCheck, assume, settings
from hypothesis import strategies as st

from sievert.graph_passes.selectors.base import StageGeometry
from sievert.graph_passes.selectors.registry import make
from sievert.parity.selectors.base import Index, Margin, Tap, TokenInputs
from sievert.parity.selectors.registry import reference_selector
from tests.graph_passes.selectors.harness import StandaloneResult, run_standalone, tap_name

# What fp32 rounding may do: q.k of some 30 units has an error of 30 * 2**-24 * a few, and that is a relative error of its exponential;
# |a|^2 + |b|^2 - 2ab, divided by 2 sqrt(d), loses about as much.
MARGIN = Margin(score=2e-5, similarity=1e-5)
FAST = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], derandomize=True
)
HEADS = {"q": "heads", "q_rotary": "heads", "k": "kv_heads", "k_rotary": "kv_heads", "v": "kv_heads"}
WIDTH = 24


@dataclass(frozen=True)
class Case:
    """A stage of ``name`` with ``options``. ``tensors``: the taps, float32, padded and batched; ``values``: all else the graph reads."""

    name: str
    options: Mapping[str, Any]
    geometry: StageGeometry
    tensors: Mapping[Tap, Any]
    values: Mapping[str, Any]
    carried: Mapping[str, Any] = field(default_factory=dict)  # padded and batched, for the graph
    carried_alone: tuple[Mapping[str, Any], ...] = ()  # per sample, for the transcription

    def run(self) -> StandaloneResult:
        """The graph, in ONNX Runtime."""
        selector, g = make(self.name, self.options), self.geometry
        taps = selector.taps(g.layer, g.depth, g.since)
        feeds = {tap_name(tap, taps): self.tensors[tap.kind, tap.layer] for tap in taps}
        return run_standalone(selector, g, {**self.values, **feeds, **{f"carried.{name}": value for name, value in self.carried.items()}})

    def real(self, row: int) -> int:
        """How many rows of a sample are not padding."""
        return int(self.values["real"][row].sum())

    def sample(self, row: int) -> TokenInputs:
        """One sample without its padding, in float64."""
        g, real = self.geometry, self.real(row)
        alone = {tap: values[row, ..., :real, :].astype(np.float64) for tap, values in self.tensors.items()}
        return TokenInputs(
            taps=alone,
            embeds=self.values["inputs_embeds"][row, :real].astype(np.float64),
            visual=self.values["visual_index"][row],
            original=self.values["original_index"][row],
            visual_total=g.original_visual,
            text=np.flatnonzero(self.values["text"][row]),
            all_text=np.flatnonzero(self.values["all_text"][row]),
            scale=g.attention_scale,
            layer=g.layer,
            depth=g.depth,
            since=g.since,
            grid=g.grid,
            carried=self.carried_alone[row] if self.carried_alone else {},
            visual_scores=self.values["visual_scores"][row].astype(np.float64),
        )

    def samples(self) -> tuple[TokenInputs, ...]:
        """All of the batch."""
        return tuple(self.sample(row) for row in range(self.geometry.batch))


@dataclass(frozen=True)
class Shape:
    """What a case is drawn from. ``extra``: rows that are not visual, of which at least one is real text behind the first visual one."""

    batch: int
    heads: int
    kv_heads: int
    d: int
    visual: int
    original: int
    keep: int
    extra: int
    seed: int
    spread: float
    ties: bool = False
    layer: int = 2
    since: int = 0
    depth: int = 8
    grid: tuple[int, int] = (1, 0)


def make_case(name: str, options: Mapping[str, Any], shape: Shape) -> Case:
    """Right-padded prompts of several lengths; rows of padding are far larger than any real one.

    With ``ties`` every visual token is one of a few, of exactly representable values whose dot products are exact in fp32 too, as are
    the cosines of embeddings, and the text queries are so many that their mean is exact.
    """
    g, rng = _geometry(shape), np.random.default_rng(shape.seed)
    wanted = reference_selector(name, options).taps(shape.layer, shape.depth, shape.since)
    values, kinds = _place_tokens(shape, g, rng)
    tensors = _draw_tensors(wanted, shape, g, values, kinds, rng)
    embeds = tensors.pop(("embeds", 0))
    scores = rng.random((g.batch, g.visual))
    if shape.ties:
        scores = np.round(scores * 4) / 4
    return Case(name, options, g, tensors, {**values, "inputs_embeds": embeds, "visual_scores": scores.astype(np.float32)})


def next_case(case: Case, orders: Index, onward: Mapping[str, Any], carried: tuple[Mapping[str, Any], ...], shape: Shape) -> Case:
    """The stage after ``case`` of the same selector: ``orders`` were taken, ``onward`` the graph left, ``carried`` the transcription."""
    g, rng, values = case.geometry, np.random.default_rng(shape.seed), case.values
    K, S = orders.shape[1], g.sequence - g.visual + orders.shape[1]
    stay = []
    for row, order in enumerate(orders):
        dropped = np.delete(values["visual_index"][row], order)
        stay.append(np.delete(np.arange(g.sequence), dropped))
    rows = np.stack(stay)
    kept = np.take_along_axis(values["visual_index"], np.sort(orders), axis=1)
    later = {name: np.take_along_axis(values[name], rows, axis=1) for name in ("text", "all_text", "real")}
    later["visual_index"] = np.stack([np.searchsorted(rows[row], kept[row]) for row in range(g.batch)])
    later["original_index"] = np.take_along_axis(values["original_index"], np.sort(orders), axis=1)
    second = replace(g, layer=shape.layer, since=shape.since, sequence=S, visual=K, keep=shape.keep)
    wanted = reference_selector(case.name, case.options).taps(shape.layer, shape.depth, shape.since)
    tensors = _draw_tensors(wanted, shape, second, later, None, rng)
    del tensors["embeds", 0]
    later["inputs_embeds"] = np.take_along_axis(values["inputs_embeds"], rows[:, :, None], axis=1)
    later["visual_scores"] = np.take_along_axis(values["visual_scores"], np.sort(orders), axis=1)
    alone = [{name: value[rows[row][rows[row] < case.real(row)]] for name, value in carried[row].items()} for row in range(g.batch)]
    gathered = {name: np.take_along_axis(value, rows, axis=1) for name, value in onward.items()}
    return Case(case.name, case.options, second, tensors, later, gathered, tuple(alone))


def _geometry(shape: Shape) -> StageGeometry:
    return StageGeometry(
        layer=shape.layer,
        depth=shape.depth,
        batch=shape.batch,
        sequence=shape.visual + shape.extra,
        visual=shape.visual,
        keep=shape.keep,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_size=shape.d,
        attention_scale=shape.d**-0.5,
        grid=shape.grid if shape.grid[1] else (1, shape.visual),
        original_visual=shape.original,
        since=shape.since,
    )


def _place_tokens(shape: Shape, g: StageGeometry, rng: np.random.Generator) -> tuple[dict[str, Any], Any]:
    """Where visual tokens, text and padding stand, and which visual tokens repeat which."""
    visual_index, original_index, kinds = np.zeros((3, g.batch, g.visual), np.int64)
    text, all_text, real_rows = np.zeros((3, g.batch, g.sequence), bool)
    for b in range(g.batch):
        after = int(rng.integers(1, shape.extra + 1))
        before = int(rng.integers(0, shape.extra - after + 1))
        if shape.ties:
            after, before = 2 ** int(np.log2(after)), 0
        first, real = before, before + g.visual + after
        scattered = np.sort(rng.permutation(g.visual + after - 1)[: g.visual - 1]) + 1 + first  # the first visual row is `first`
        visual_index[b] = np.concatenate([[first], scattered])
        original_index[b] = np.sort(rng.permutation(g.original_visual)[: g.visual])
        real_rows[b, :real] = all_text[b, :real] = True
        all_text[b, visual_index[b]] = False
        text[b] = all_text[b] & (np.arange(g.sequence) > first)
        kinds[b] = rng.integers(0, max(1, g.visual // 3), g.visual) if shape.ties else np.arange(g.visual)
    named = {"visual_index": visual_index, "original_index": original_index, "text": text, "all_text": all_text, "real": real_rows}
    return named, kinds


def _draw_tensors(
    wanted: tuple[Tap, ...], shape: Shape, g: StageGeometry, values: Mapping[str, Any], kinds: Any, rng: np.random.Generator
) -> dict[Tap, Any]:
    """The taps and the input embeddings, the latter named like a tap."""
    tensors = {}
    for kind, layer in (*wanted, ("embeds", 0)):
        size = (g.batch, getattr(g, HEADS[kind]), g.sequence, g.head_size) if kind in HEADS else (g.batch, g.sequence, WIDTH)
        drawn = rng.normal(0, shape.spread, size)
        if shape.ties:
            drawn = _draw_exact_cosines(size, rng) if kind in {"embeds", "final_normed"} else np.clip(np.round(drawn * 8) / 8, -2, 2)
        for b in range(g.batch):
            visual, real = values["visual_index"][b], int(values["real"][b].sum())
            if shape.ties and kinds is not None and not kind.startswith("q"):
                drawn[b][..., visual, :] = drawn[b][..., visual, :][..., kinds[b], :]
            drawn[b][..., real:, :] = drawn[b][..., real:, :] * 50 + 10
        tensors[kind, layer] = drawn.astype(np.float32)
    return tensors


def _draw_exact_cosines(size: tuple[int, ...], rng: np.random.Generator) -> Any:
    """Vectors with 4 elements that are not 0, all of one power of two: lengths and cosines are exact in fp32."""
    places = np.argsort(rng.random(size), axis=-1) < 4
    return places * rng.choice((-1.0, 1.0), size) * rng.choice((0.5, 1.0, 2.0), (*size[:-1], 1))


@st.composite
def shapes(draw: st.DrawFn, *, ties: bool = False, most: int = 48, layers: tuple[int, int] = (1, 5)) -> Shape:
    """Grouped heads, batches of 1 to 3, cuts before a layer within ``layers`` after another cut or none."""
    kv_heads, visual = draw(st.integers(1, 3)), draw(st.integers(1, most))
    layer = draw(st.integers(*layers))
    return Shape(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * draw(st.integers(1, 4)),
        kv_heads=kv_heads,
        d=draw(st.sampled_from((4, 16) if ties else (2, 6, 8, 16))),
        visual=visual,
        original=visual + draw(st.sampled_from((0, 7))),
        keep=draw(st.sampled_from(sorted({1, visual, max(1, visual - 1), (visual + 1) // 2})) | st.integers(1, visual)),
        extra=draw(st.integers(1, 12)),
        seed=draw(st.integers(0, 2**31)),
        spread=1.0 if ties else draw(st.sampled_from((0.1, 0.5, 1.0, 2.0))),
        ties=ties,
        layer=layer,
        since=draw(st.integers(0, max(0, layer - 1))),
    )


def assert_chosen_by_formula(case: Case, *, exactly: bool, margin: Margin = MARGIN) -> StandaloneResult:
    result, keep = case.run(), case.geometry.keep
    transcription = reference_selector(case.name, case.options)
    assert result.order.shape == (case.geometry.batch, keep) and result.scores.shape == (case.geometry.batch, case.geometry.visual)
    for order, scores, inputs in zip(result.order, result.scores, case.samples(), strict=True):
        choice, bounds = transcription.select(inputs, keep), transcription.bounds(inputs, keep, margin)
        if bounds.doubtful:
            assert ((scores >= bounds.low) & (scores <= bounds.high)).all(), (scores, bounds)
        else:
            assert np.abs(scores - choice.scores).max() <= margin.score * choice.condition, (scores, choice)
        replay = transcription.replay(inputs, keep, order, margin)
        assert replay.holds, (replay, order.tolist(), choice)
        if exactly:
            assert set(order.tolist()) == set(choice.order.tolist()), (order.tolist(), choice)
    return result


def assume_ties_are_exact(case: Case, margin: Margin = MARGIN) -> None:
    """Every chunk of the formula's own order is decided by an exact tie, or out of rounding's reach."""
    transcription = reference_selector(case.name, case.options)
    for inputs in case.samples():
        choice = transcription.select(inputs, case.geometry.keep)
        replay = transcription.replay(inputs, case.geometry.keep, choice.order, margin)
        assume(all(chunk.gap == 0 or chunk.excess < 0 for chunk in replay.chunks))
