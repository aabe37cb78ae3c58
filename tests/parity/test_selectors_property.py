"""The ONNX selectors, run by ONNX Runtime padded and batched, choose what their float64 transcriptions choose alone and unpadded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from sievert.graph_passes.selectors.base import StageGeometry
from sievert.graph_passes.selectors.registry import make
from sievert.parity.selectors.base import Margin, TokenInputs
from sievert.parity.selectors.registry import reference_selector
from tests.graph_passes.selectors.harness import StandaloneResult, run_standalone

# What fp32 rounding may do: q.k of some 30 units has an error of 30 * 2**-24 * a few, and that is a relative error of its exponential;
# |a|^2 + |b|^2 - 2ab, divided by 2 sqrt(d), loses about as much.
MARGIN = Margin(score=2e-5, similarity=1e-5)
FAST = settings(
    max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much], derandomize=True
)


@dataclass(frozen=True)
class Case:
    """Feeds for the graph, and the same samples unpadded for the transcription."""

    geometry: StageGeometry
    feeds: dict[str, Any]
    samples: tuple[TokenInputs, ...]


def make_case(
    *,
    batch: int,
    heads: int,
    kv_heads: int,
    d: int,
    visual: int,
    original: int,
    keep: int,
    extra: int,
    seed: int,
    spread: float,
    ties: bool,
) -> Case:
    """Right-padded prompts of several lengths; rows of padding are far larger than any real one.

    With ``ties`` every visual token is one of a few, of exactly representable values whose dot products are exact in fp32 too, and
    the text queries are so many that their mean is exact.
    """
    rng = np.random.default_rng(seed)
    S = visual + extra
    shapes = {"q": heads, "q_rotary": heads, "k": kv_heads, "k_rotary": kv_heads, "v": kv_heads}
    taps = {kind: rng.normal(0, spread, (batch, count, S, d)) for kind, count in shapes.items()}
    if ties:
        taps = {kind: np.clip(np.round(values * 8) / 8, -2, 2) for kind, values in taps.items()}
    visual_index, original_index = np.zeros((2, batch, visual), np.int64)
    text, all_text, real_rows = np.zeros((3, batch, S), bool)
    samples = []
    for b in range(batch):
        after = int(rng.integers(1, extra + 1))
        before = int(rng.integers(0, extra - after + 1))
        if ties:
            after, before = 2 ** int(np.log2(after)), 0
        first, real = before, before + visual + after
        scattered = np.sort(rng.permutation(visual + after - 1)[: visual - 1]) + 1 + first  # the first visual row is `first`
        visual_index[b] = np.concatenate([[first], scattered])
        original_index[b] = np.sort(rng.permutation(original)[:visual])
        real_rows[b, :real] = all_text[b, :real] = True
        all_text[b, visual_index[b]] = False
        text[b] = all_text[b] & (np.arange(S) > first)
        if ties:
            kind_of = rng.integers(0, max(1, visual // 3), visual)
            for kind in ("k", "k_rotary", "v"):
                taps[kind][b][:, visual_index[b]] = taps[kind][b][:, visual_index[b]][:, kind_of]
        for kind in shapes:
            taps[kind][b][:, real:] *= 50
            taps[kind][b][:, real:] += 10
    taps = {kind: values.astype(np.float32) for kind, values in taps.items()}
    for b in range(batch):
        real = int(max(visual_index[b, -1], np.flatnonzero(all_text[b])[-1])) + 1
        alone = {kind: values[b, :, :real].astype(np.float64) for kind, values in taps.items()}
        samples.append(
            TokenInputs(
                **alone,
                visual=visual_index[b],
                original=original_index[b],
                visual_total=original,
                text=np.flatnonzero(text[b]),
                all_text=np.flatnonzero(all_text[b]),
                scale=d**-0.5,
            )
        )
    geometry = StageGeometry(
        layer=2,
        depth=8,
        batch=batch,
        sequence=S,
        visual=visual,
        keep=keep,
        heads=heads,
        kv_heads=kv_heads,
        head_size=d,
        attention_scale=d**-0.5,
        grid=(1, visual),
        original_visual=original,
    )
    feeds = {
        "visual_index": visual_index,
        "original_index": original_index,
        "text": text,
        "all_text": all_text,
        "real": real_rows,
        "inputs_embeds": np.zeros((batch, S, 4), np.float32),
        **taps,
    }
    return Case(geometry, feeds, tuple(samples))


def run(name: str, options: dict[str, Any], case: Case) -> StandaloneResult:
    return run_standalone(make(name, options), case.geometry, case.feeds)


@st.composite
def cases(draw: st.DrawFn, *, ties: bool = False) -> Case:
    kv_heads = draw(st.integers(1, 3))
    visual = draw(st.integers(1, 48))
    return make_case(
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
    )


@st.composite
def iwp_options(draw: st.DrawFn) -> dict[str, Any]:
    return {
        "first_chunk": draw(st.sampled_from((1, 2, 3, 8, 64))),
        "growth": draw(st.sampled_from((1, 2, 4))),
        "strength": draw(st.sampled_from((0.0, 0.5, 1.0, 5.0, 10.0))),
        "floor": draw(st.sampled_from((0.01, 0.2))),
        "head_norm": draw(st.sampled_from(("global", "softmax"))),
        "scaling": draw(st.sampled_from(("minmax", "max"))),
        "text": draw(st.sampled_from(("after_image", "all"))),
        "duplication": draw(st.sampled_from(("mean_of_squares", "square_of_mean"))),
        "magnitude_rotary": draw(st.booleans()),
        "duplication_rotary": draw(st.booleans()),
    }


def assert_chosen_by_formula(name: str, options: dict[str, Any], case: Case, *, exactly: bool) -> None:
    result = run(name, options, case)
    transcription = reference_selector(name, options)
    keep = case.geometry.keep
    assert len(result.order) == len(case.samples)
    for order, scores, inputs in zip(result.order, result.scores, case.samples, strict=True):
        choice = transcription.select(inputs, keep)
        assert np.abs(scores - choice.scores).max() <= MARGIN.score * choice.condition
        replay = transcription.replay(inputs, keep, order, MARGIN)
        assert replay.holds, (replay, order.tolist(), choice)
        if exactly:
            assert set(order.tolist()) == set(choice.order.tolist()), (order.tolist(), choice)


@FAST
@given(case=cases(), options=iwp_options())
def test_iwp_is_the_formula(case: Case, options: dict[str, Any]) -> None:
    assert_chosen_by_formula("iwp", options, case, exactly=False)


@settings(FAST, max_examples=60)
@given(case=cases(ties=True), options=iwp_options())
def test_iwp_gives_equal_scores_to_the_lower_index(case: Case, options: dict[str, Any]) -> None:
    transcription = reference_selector("iwp", options)
    for inputs in case.samples:
        choice = transcription.select(inputs, case.geometry.keep)
        replay = transcription.replay(inputs, case.geometry.keep, choice.order, MARGIN)
        assume(all(chunk.gap == 0 or chunk.excess < 0 for chunk in replay.chunks))  # an exact tie, or out of rounding's reach
    assert_chosen_by_formula("iwp", options, case, exactly=True)


@pytest.mark.parametrize("seed", range(20))
def test_iwp_chooses_the_very_same_sets(seed: int) -> None:
    case = make_case(batch=3, heads=8, kv_heads=2, d=16, visual=64, original=64, keep=14, extra=9, seed=seed, spread=1.0, ties=False)
    assert_chosen_by_formula("iwp", {}, case, exactly=True)


@settings(FAST, max_examples=30)
@given(case=cases(), options=iwp_options())
def test_magnitude_is_iwp_without_strength(case: Case, options: dict[str, Any]) -> None:
    kept = {name: options[name] for name in ("head_norm", "scaling", "text", "magnitude_rotary")}
    assert_chosen_by_formula("magnitude", kept, case, exactly=False)


@settings(FAST, max_examples=30)
@given(case=cases(), seed=st.integers(0, 2**20))
def test_random_is_the_agreed_permutation(case: Case, seed: int) -> None:
    result = run("random", {"seed": seed}, case)
    for order, inputs in zip(result.order, case.samples, strict=True):
        assert reference_selector("random", {"seed": seed}).select(inputs, case.geometry.keep).order.tolist() == order.tolist()


@settings(FAST, max_examples=30)
@given(case=cases())
def test_uniform_is_the_stride(case: Case) -> None:
    result = run("uniform", {}, case)
    for order, inputs in zip(result.order, case.samples, strict=True):
        assert reference_selector("uniform", {}).select(inputs, case.geometry.keep).order.tolist() == order.tolist()
