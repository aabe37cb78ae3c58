"""One engine record against its reference, stage by stage, in the order the model computes.

Written so that it can fail but never vanish. General comparers (Polygraphy's among them) pass where nothing was compared, skip an
output that is missing and pair unequal counts; here the reference says what must be there, and what is absent, empty, of another
shape or not a number is a FAIL.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sievert.parity.record import (
    EMBEDDINGS,
    LOGITS,
    VISION,
    VISUAL_SCORES,
    EngineRecord,
    ReferenceRecord,
    StageTrace,
    as_index,
    cache_names,
    end_cache_names,
    expected_names,
    kept_name,
    order_name,
    residual_name,
    scores_name,
    step_name,
)
from sievert.parity.selectors.base import Index
from sievert.parity.selectors.steps import invalid_order
from sievert.parity.tolerances import Tolerances
from sievert.parity.verdict import Difference, StageResult, Verdict


def measure(engine: NDArray[Any], reference: NDArray[Any], *, tolerance: float, unit: float | None = None) -> Difference | str:
    """The largest absolute error against ``tolerance`` x ``unit``, or why there is nothing to measure.

    If not given, ``unit`` is max(1, max |reference|).
    """
    if engine.shape != reference.shape:
        return f"shape {list(engine.shape)} instead of {list(reference.shape)}"
    if reference.size == 0:
        return "nothing to compare: the reference is empty"
    ours, theirs = engine.astype(np.float64), reference.astype(np.float64)
    for values, whose in ((theirs, "reference"), (ours, "engine")):
        if not np.isfinite(values).all():
            place = np.unravel_index(int(np.argmin(np.isfinite(values))), values.shape)
            return f"the {whose} has {values[place]} at {[int(i) for i in place]}"
    error, largest = np.abs(ours - theirs), float(np.abs(theirs).max())
    norms = float(np.linalg.norm(ours) * np.linalg.norm(theirs))
    both_zero = not ours.any() and not theirs.any()
    return Difference(
        max_abs=float(error.max()),
        allowed=tolerance * (max(1.0, largest) if unit is None else unit),
        relative=float(error.max()) / largest if largest else float(error.max()),
        cosine=1.0 if both_zero else float(np.vdot(ours, theirs)) / norms if norms else 0.0,
        worst=tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape)),
        elements=int(reference.size),
    )


def compare(engine: EngineRecord, reference: ReferenceRecord, tolerances: Tolerances) -> tuple[StageResult, ...]:
    """Every stage of one sample; the first FAIL among the results is the stage to look at.

    The reference must have been run on the engine's own kept rows where those are usable.
    """
    results = list(_walk(engine, reference, tolerances))
    unknown = sorted(set(engine.arrays) - expected_names(reference))
    if unknown:
        results.append(StageResult("outputs", unknown[0], Verdict.FAIL, note=f"{len(unknown)} outputs the reference does not have"))
    return tuple(results)


def usable_kept(engine: EngineRecord, keeps: Sequence[int], visual: Index) -> list[Index | None]:
    """The engine's own kept rows per stage; None from the first stage on whose rows are no set of ``keeps[s]`` earlier kept ones."""
    rows, kept = visual, list[Index | None]()
    for stage, keep in enumerate(keeps):
        index = engine.arrays.get(kept_name(stage))
        if index is None or index.shape != (keep,) or len(set(index.tolist()) & set(rows.tolist())) != keep:
            return kept + [None] * (len(keeps) - stage)
        rows = np.sort(as_index(index))
        kept.append(rows)
    return kept


def _walk(engine: EngineRecord, reference: ReferenceRecord, tolerances: Tolerances) -> Iterator[StageResult]:
    def tensor(stage: str, name: str, tolerance: float, *, rows_axis: int | None = None, unit: float | None = None) -> StageResult:
        expected = reference.arrays[name]
        values = engine.arrays.get(name)
        if values is None:
            return _absent(stage, name, inner=name.startswith("stage.") and not engine.exposed)
        if rows_axis is not None and values.ndim == expected.ndim:  # padding lies behind the real rows
            values = np.take(values, range(min(values.shape[rows_axis], expected.shape[rows_axis])), axis=rows_axis)
        difference = measure(values, expected, tolerance=tolerance, unit=unit)
        if isinstance(difference, str):
            return StageResult(stage, name, Verdict.FAIL, note=difference)
        return StageResult(stage, name, Verdict.PASS if difference.max_abs <= difference.allowed else Verdict.FAIL, difference)

    layers = sum(name.startswith("present.") and name.endswith(".key") for name in reference.arrays)
    yield tensor("vision features", VISION, tolerances.vision)
    if VISUAL_SCORES in reference.arrays:
        yield tensor("vision scores", VISUAL_SCORES, tolerances.scores, unit=float(reference.arrays[VISUAL_SCORES].max()))
    for name in sorted(name for name in reference.arrays if name.startswith("deepstack.")):
        yield tensor("vision planes", name, tolerances.vision)
    yield tensor("merged embeddings", EMBEDDINGS, tolerances.embeddings, rows_axis=0)
    for stage, trace in enumerate(reference.traces):
        label = "" if len(reference.traces) == 1 else f" (cut {stage})"
        yield tensor(f"layer {reference.plan.stages[stage].layer} input", residual_name(stage), tolerances.residual, rows_axis=0)
        if trace.selector.computes:
            judged = tensor(f"selector scores{label}", scores_name(stage), tolerances.scores, unit=trace.choice.condition)
            yield _forgive_tie(judged, stage, trace, engine, tolerances)
        yield _judge_order(f"selection order{label}", stage, reference.traces, engine, tolerances)
        yield _judge_kept(f"kept index{label}", stage, trace, engine)
    for layer in range(layers):
        for name in cache_names(layer):
            yield tensor("caches after prefill", name, tolerances.stored, rows_axis=1)
    yield tensor("last logits", LOGITS, tolerances.logits)
    for step in range(len(reference.tokens)):
        yield tensor("teacher-forced logits", step_name(step), tolerances.decoded)
    yield _judge_tokens(engine, reference, tolerances)
    for layer in range(layers):
        for name in end_cache_names(layer):
            yield tensor("caches at the end", name, tolerances.stored_later, rows_axis=1)


def _absent(label: str, name: str, *, inner: bool) -> StageResult:
    """An output that is not there: a failure, unless the engine cannot show what happens inside it."""
    if inner:
        return StageResult(label, name, Verdict.NOT_RUN, note="inside the engine, not to be seen")
    return StageResult(label, name, Verdict.FAIL, note="the engine gave no such output")


def _forgive_tie(judged: StageResult, stage: int, trace: StageTrace, engine: EngineRecord, tolerances: Tolerances) -> StageResult:
    """Scores may be made of a choice that has near ties of its own: off by more than rounding, but within what another choice gives."""
    if judged.verdict is not Verdict.FAIL or judged.difference is None:
        return judged
    scores, bounds = engine.arrays[scores_name(stage)], trace.selector.bounds(trace.inputs, trace.keep, tolerances.selection)
    if not bounds.doubtful or not ((scores >= bounds.low) & (scores <= bounds.high)).all():
        return judged
    return replace(judged, verdict=Verdict.AMBIGUOUS, note="near tie in what the scores are made of")


def _judge_order(label: str, stage: int, traces: Sequence[StageTrace], engine: EngineRecord, tolerances: Tolerances) -> StageResult:
    """Replay: every chunk of the engine's order must be a top set, given what the engine took before it."""
    trace = traces[stage]
    name, inferred = order_name(stage), ""
    if name in engine.arrays:
        order = as_index(engine.arrays[name])
    elif engine.exposed and trace.selector.computes:
        return _absent(label, name, inner=False)
    else:
        kept = usable_kept(engine, [earlier.keep for earlier in traces[: stage + 1]], traces[0].visual_rows)[stage]
        if kept is None:
            return _absent(label, name, inner=True)
        places = np.searchsorted(trace.visual_rows, kept)
        order, inferred = trace.selector.arrange(trace.inputs, places), ", order inferred from the kept rows"
    replay = trace.selector.replay(trace.inputs, trace.keep, order, tolerances.selection)
    if replay.invalid is not None:
        return StageResult(label, name, Verdict.FAIL, note=replay.invalid)
    if not replay.holds:
        number, chunk = next((number, chunk) for number, chunk in enumerate(replay.chunks) if not chunk.holds)
        note = f"chunk {number} of {chunk.size} is no top set: it misses by {-chunk.gap:.3g} in score{inferred}"
        return StageResult(label, name, Verdict.FAIL, note=note)
    if set(order.tolist()) == set(trace.choice.order.tolist()):
        return StageResult(label, name, Verdict.PASS, note=f"same set{inferred}")
    narrowest = -min(chunk.gap for chunk in replay.chunks)
    note = f"near tie: another set, every chunk a top set within {narrowest:.3g} in score{inferred}"
    return StageResult(label, name, Verdict.AMBIGUOUS, note=note)


def _judge_kept(label: str, stage: int, trace: StageTrace, engine: EngineRecord) -> StageResult:
    """The kept rows must be what the engine's own order says; a set that a near tie changed is the order's matter."""
    name = kept_name(stage)
    if name not in engine.arrays:
        return _absent(label, name, inner=False)
    kept, expected = as_index(engine.arrays[name]), trace.own_kept
    order = engine.arrays.get(order_name(stage))
    if order is not None and invalid_order(as_index(order), trace.keep, len(trace.visual_rows)) is None:
        expected = np.sort(trace.visual_rows[as_index(order)])
    elif not (engine.exposed and trace.selector.computes):
        expected = trace.kept  # judged as a set where its order was inferred; left to see is that these are rows it may keep
    if kept.shape != expected.shape:
        return StageResult(label, name, Verdict.FAIL, note=f"shape {list(kept.shape)} instead of {list(expected.shape)}")
    if not np.array_equal(kept, expected):
        wrong = sorted(set(kept.tolist()) - set(expected.tolist()))
        note = f"{len(wrong)} rows are not those that were taken, the first {wrong[0]}" if wrong else "rows repeat or do not ascend"
        return StageResult(label, name, Verdict.FAIL, note=note)
    return StageResult(label, name, Verdict.PASS, note=f"{len(kept)} rows")


def _judge_tokens(engine: EngineRecord, reference: ReferenceRecord, tolerances: Tolerances) -> StageResult:
    """The most likely token after the prompt and after every teacher-forced token."""
    label, compared, ties = "greedy tokens", 0, list[str]()
    for place, name in enumerate((LOGITS, *(step_name(step) for step in range(len(reference.tokens))))):
        ours, theirs = engine.arrays.get(name), reference.arrays[name]
        if ours is None or ours.shape != theirs.shape or not np.isfinite(ours).all():
            return StageResult(label, name, Verdict.FAIL, note="no logits to take a token from")
        token, expected = int(ours.argmax()), int(theirs.argmax())
        gap = float(theirs[expected] - theirs[token])
        allowed = tolerances.decoded if place else tolerances.logits
        if gap > 2 * allowed * max(1.0, float(np.abs(theirs).max())):
            return StageResult(label, name, Verdict.FAIL, note=f"token {place}: {token} instead of {expected}, {gap:.3g} below it")
        if token != expected:
            ties.append(f"token {place}: {token} for {expected}, {gap:.3g} below it")
        compared += 1
    if ties:
        return StageResult(label, LOGITS, Verdict.AMBIGUOUS, note=f"near tie: {ties[0]}")
    return StageResult(label, LOGITS, Verdict.PASS, note=f"{compared} tokens equal")
