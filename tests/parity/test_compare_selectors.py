"""Every selector's cuts in a comparison: a true engine passes, one wrong token fails where it is, and later cuts follow the engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from sievert.bundle.plan import Option, Plan, Stage
from sievert.parity.compare import compare, usable_kept
from sievert.parity.record import EngineRecord, ReferenceRecord
from sievert.parity.reference import Reference, ReferenceInputs
from sievert.parity.selectors.sparsevlm import LEAD
from sievert.parity.tolerances import TOLERANCES
from sievert.parity.verdict import StageResult, Verdict, combine
from tests.parity.conftest import Load
from tests.parity.engine import TOKENS, make_inputs, run_as_engine

FP32 = TOLERANCES["float32"]
CASES: list[tuple[str, dict[str, Option], tuple[int, ...]]] = [
    ("fastv", {}, (2, 3)),
    ("pyramiddrop", {}, (1, 3)),
    ("sparsevlm", {}, (1, 2)),
    ("transprune", {}, (2, 3)),
    ("transprune", {"weights": "image", "first": 0}, (1, 3)),
    ("dart", {}, (1, 3)),
    ("dart", {"on": "embeddings"}, (0, 2)),
    ("divprune", {}, (0, 3)),
    ("cdpruner", {}, (0, 2)),
    ("fopru", {}, (0,)),
    ("visionzip", {}, (0,)),
]


@pytest.fixture(scope="module")
def reference(load: Load) -> Reference:
    return Reference(load("clip-qwen3"))


def plan_of(name: str, options: dict[str, Option], layers: tuple[int, ...]) -> Plan:
    keeps = (9, 5)[: len(layers)]
    stages = [Stage(selector=name, layer=layer, keep=k, requested=str(k), options=options) for layer, k in zip(layers, keeps, strict=True)]
    return Plan(stages=tuple(stages))


def judge(reference: Reference, engine: EngineRecord, inputs: ReferenceInputs, plan: Plan) -> tuple[StageResult, ...]:
    kept = usable_kept(engine, [stage.keep for stage in plan.stages], np.flatnonzero(inputs.input_ids == 4))
    return compare(engine, reference.record(inputs, plan, kept=kept, tokens=TOKENS), FP32)


def failed(results: tuple[StageResult, ...]) -> list[str]:
    return [result.stage for result in results if result.verdict is Verdict.FAIL]


@pytest.mark.parametrize("exposed", [True, False])
@pytest.mark.parametrize(("name", "options", "layers"), CASES)
def test_a_true_engine_passes(reference: Reference, name: str, options: Any, layers: tuple[int, ...], exposed: bool) -> None:
    plan, inputs = plan_of(name, options, layers), make_inputs()
    engine = run_as_engine(reference, inputs, plan, exposed=exposed)
    results = judge(reference, engine, inputs, plan)
    assert combine([result.verdict for result in results]) is Verdict.PASS, [r for r in results if r.verdict is not Verdict.PASS]


@pytest.mark.parametrize(("name", "options", "layers"), CASES)
def test_one_wrong_token_fails_where_it_is(reference: Reference, name: str, options: Any, layers: tuple[int, ...]) -> None:
    """The engine takes the worst token in place of its last, and goes on consistently: later cuts are judged on its own rows."""
    plan, inputs = plan_of(name, options, layers), make_inputs()
    trace = reference.record(inputs, plan, tokens=1).traces[0]
    order = trace.selector.select(trace.inputs, 16).order[[*range(8), 15]] if name != "dart" else wrong_pivots(trace.choice.order)
    engine = run_as_engine(reference, inputs, plan, kept=[np.sort(trace.visual_rows[order]), *[None] * (len(layers) - 1)])
    wrong = EngineRecord({**engine.arrays, "stage.0.order": order})
    label = "selection order" + (" (cut 0)" if len(layers) > 1 else "")
    assert failed(judge(reference, wrong, inputs, plan)) == [label]
    unexposed = EngineRecord({key: array for key, array in wrong.arrays.items() if not key.startswith("stage.")}, exposed=False)
    assert failed(judge(reference, unexposed, inputs, plan)) == [label]


def wrong_pivots(order: Any) -> Any:
    """Without the token of the largest norm, but with one that was not taken."""
    return np.r_[order[1:], np.setdiff1d(np.arange(16), order)[:1]]


def nearly_rating(record: ReferenceRecord, row: int) -> ReferenceRecord:
    """As if text row ``row`` were at the border of rating."""
    trace = record.traces[0]
    ratings = {name: values.copy() for name, values in trace.choice.carried.items()}
    ratings[LEAD][row] = 1e-6
    return replace(record, traces=(replace(trace, inputs=replace(trace.inputs, carried=ratings)),))


def test_scores_of_another_rater_are_ambiguous(reference: Reference) -> None:
    """An engine in which a rater at the border counts the other way gives other scores, and may keep others."""
    plan, inputs = plan_of("sparsevlm", {}, (1,)), make_inputs()
    record = reference.record(inputs, plan, tokens=TOKENS)
    (trace,) = record.traces
    raters = np.flatnonzero(trace.choice.carried["raters"])
    turned = {"raters": trace.choice.carried["raters"].copy()}
    turned["raters"][raters[0]] = 0.0
    choice = trace.selector.select(replace(trace.inputs, carried=turned), 9)
    engine = run_as_engine(reference, inputs, plan, kept=[np.sort(trace.visual_rows[choice.order])])
    arrays = {**engine.arrays, "stage.0.scores": choice.scores.astype(np.float32), "stage.0.order": choice.order}
    followed = reference.record(inputs, plan, kept=[np.sort(trace.visual_rows[choice.order])], tokens=TOKENS)
    assert failed(compare(EngineRecord(arrays), followed, FP32))[0] == "selector scores"
    results = compare(EngineRecord(arrays), nearly_rating(followed, int(raters[0])), FP32)
    assert not failed(results) and len(raters) > 1
    (tie,) = [result for result in results if result.stage == "selector scores"]
    assert tie.verdict is Verdict.AMBIGUOUS and "near tie in what the scores are made of" in tie.note
    other = nearly_rating(followed, int(raters[1]))  # the border of another one is no excuse
    assert failed(compare(EngineRecord(arrays), other, FP32))[0] == "selector scores"


def test_wrong_vision_scores_fail_there(reference: Reference) -> None:
    plan, inputs = plan_of("fopru", {}, (0,)), make_inputs()
    arrays: dict[str, Any] = dict(run_as_engine(reference, inputs, plan).arrays)
    assert arrays["visual_scores"].shape == (16,)
    arrays["visual_scores"] = arrays["visual_scores"] * 1.001
    assert failed(judge(reference, EngineRecord(arrays), inputs, plan)) == ["vision scores"]
    del arrays["visual_scores"]
    assert failed(judge(reference, EngineRecord(arrays), inputs, plan)) == ["vision scores"]
