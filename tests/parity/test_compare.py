"""A comparison can fail but never vanish: faults planted in a model or in a record are found at the stage where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from sievert.bundle.plan import Plan
from sievert.parity.compare import compare, measure, usable_kept
from sievert.parity.record import EngineRecord, ReferenceRecord, expected_names
from sievert.parity.reference import Reference, ReferenceInputs
from sievert.parity.selectors.base import Margin
from sievert.parity.tolerances import TOLERANCES, Tolerances
from sievert.parity.verdict import Difference, StageResult, Verdict, combine, first_failure
from tests.parity.conftest import Load
from tests.parity.engine import PLAN, TOKENS, TWO_CUTS, make_inputs, pad, run_as_engine

FP32 = TOLERANCES["float32"]
Edit = Callable[[dict[str, Any]], None]


@pytest.fixture(scope="module")
def reference(load: Load) -> Reference:
    return Reference(load("clip-qwen3"))


def judge(
    reference: Reference, engine: EngineRecord, inputs: ReferenceInputs, plan: Plan = PLAN, tolerances: Tolerances = FP32
) -> tuple[StageResult, ...]:
    kept = usable_kept(engine, [stage.keep for stage in plan.stages], np.flatnonzero(inputs.input_ids == 4))
    return compare(engine, reference.record(inputs, plan, kept=kept, tokens=TOKENS), tolerances)


def verdict(results: tuple[StageResult, ...]) -> Verdict:
    return combine([result.verdict for result in results])


def stage_of(results: tuple[StageResult, ...]) -> str | None:
    found = first_failure(results)
    return found.stage if found else None


@pytest.mark.parametrize("exposed", [True, False])
@pytest.mark.parametrize("plan", [Plan(), PLAN, TWO_CUTS], ids=["full", "one-cut", "two-cuts"])
def test_a_true_engine_passes(reference: Reference, plan: Plan, exposed: bool) -> None:
    inputs = make_inputs()
    engine = run_as_engine(reference, inputs, plan, exposed=exposed)
    results = judge(reference, engine, inputs, plan)
    assert verdict(results) is Verdict.PASS, [result for result in results if result.verdict is not Verdict.PASS]
    unseen = [result.name for result in results if result.verdict is Verdict.NOT_RUN]
    assert unseen == ([] if exposed else [f"stage.{s}.{what}" for s in range(len(plan.stages)) for what in ("residual", "scores")])
    compared = [result.name for result in results]
    record = reference.record(inputs, plan, tokens=TOKENS)
    assert sorted(set(compared)) == sorted(expected_names(record))
    assert len(compared) == len(expected_names(record)) + 1  # the greedy tokens are read off logits compared before
    stages = list(dict.fromkeys(result.stage for result in results))
    assert stages[:2] == ["vision features", "merged embeddings"] and stages[-1] == "caches at the end"


# A fault in the model: the engine is that model, and so consistent with itself.


def corrupt(name: str) -> Callable[[Any], None]:
    def plant(model: Any) -> None:
        weight = dict(model.named_parameters())[name]
        with torch.no_grad():
            weight.view(-1)[7] += 0.5

    return plant


def swap_rotary_axes(model: Any) -> None:
    model.model.language_model.rotary_emb.register_forward_hook(lambda _m, _i, tables: (tables[1], tables[0]))


LAYERS = "model.language_model.layers"


@pytest.mark.parametrize(
    ("plant", "stage", "name"),
    [
        (corrupt("model.vision_tower.encoder.layers.0.mlp.fc1.weight"), "vision features", "image_features"),
        (corrupt("model.multi_modal_projector.linear_2.weight"), "vision features", "image_features"),
        (corrupt(f"{LAYERS}.0.mlp.down_proj.weight"), "layer 2 input", "stage.0.residual"),
        (corrupt(f"{LAYERS}.2.self_attn.k_proj.weight"), "selector scores", "stage.0.scores"),
        (corrupt(f"{LAYERS}.2.mlp.up_proj.weight"), "caches after prefill", "present.3.key"),
        (corrupt(f"{LAYERS}.3.self_attn.v_proj.weight"), "caches after prefill", "present.3.value"),
        (corrupt("lm_head.weight"), "last logits", "logits"),
        (swap_rotary_axes, "layer 2 input", "stage.0.residual"),
    ],
)
def test_a_faulty_model_fails_where_it_is_faulty(load: Load, reference: Reference, plant: Any, stage: str, name: str) -> None:
    model, inputs = copy.deepcopy(load("clip-qwen3")), make_inputs()
    plant(model)
    engine = run_as_engine(Reference(model), inputs)
    results = judge(reference, engine, inputs)
    assert verdict(results) is Verdict.FAIL
    found = first_failure(results)
    assert found is not None and (found.stage, found.name) == (stage, name), found
    assert found.difference is not None and found.difference.max_abs > found.difference.allowed


def test_a_fault_in_the_words_fails_at_the_embeddings(load: Load, reference: Reference) -> None:
    model, inputs = copy.deepcopy(load("clip-qwen3")), make_inputs()
    with torch.no_grad():
        model.model.language_model.embed_tokens.weight[int(inputs.input_ids[-1]), 3] += 0.5
    assert stage_of(judge(reference, run_as_engine(Reference(model), inputs), inputs)) == "merged embeddings"


def test_swapped_rotary_axes_without_cuts_fail_in_the_caches(load: Load, reference: Reference) -> None:
    model, inputs = copy.deepcopy(load("clip-qwen3")), make_inputs()
    swap_rotary_axes(model)
    results = judge(reference, run_as_engine(Reference(model), inputs, Plan()), inputs, Plan())
    found = first_failure(results)
    assert found is not None and found.name == "present.0.key"
    assert "present.0.value" not in [result.name for result in results if result.verdict is Verdict.FAIL]


def test_a_selector_that_ignores_padding_fails_at_its_scores(reference: Reference) -> None:
    """Its mean over the text takes in rows of padding; all that follows is consistent with what it kept."""
    inputs = make_inputs()
    (trace,) = reference.record(inputs, PLAN, tokens=1).traces
    seen, rng = trace.inputs, np.random.default_rng(3)
    rows = len(trace.rows) + np.arange(6)
    padded = {tap: pad(heads, 1, 6, rng) / 50 for tap, heads in seen.taps.items()}
    for tap, heads in padded.items():
        heads[:, : len(trace.rows)] = seen.taps[tap]
    choice = trace.selector.select(replace(seen, taps=padded, text=np.r_[seen.text, rows]), 6)
    assert set(choice.order.tolist()) != set(trace.choice.order.tolist())
    kept = np.sort(trace.visual_rows[choice.order])
    engine = run_as_engine(reference, inputs, kept=[kept])
    arrays = {**engine.arrays, "stage.0.scores": choice.scores.astype(np.float32), "stage.0.order": choice.order}
    results = judge(reference, EngineRecord(arrays), inputs)
    failed = [result.stage for result in results if result.verdict is Verdict.FAIL]
    assert failed == ["selector scores", "selection order"]  # and nothing downstream: it is compared on the engine's own rows
    hidden = EngineRecord({name: array for name, array in arrays.items() if not name.startswith("stage.")}, exposed=False)
    assert [result.stage for result in judge(reference, hidden, inputs) if result.verdict is Verdict.FAIL] == ["selection order"]


# A fault in what the engine gives.


def shift_row(name: str) -> Edit:
    def edit(arrays: dict[str, Any]) -> None:
        arrays[name] = np.roll(arrays[name], 1, axis=1)

    return edit


def shift_decoded_rows(arrays: dict[str, Any]) -> None:
    real = arrays["end.3.value"].shape[1] - 5
    arrays["end.3.value"][:, real - TOKENS + 1 : real + 1] = arrays["end.3.value"][:, real - TOKENS : real].copy()


def drop(name: str) -> Edit:
    def edit(arrays: dict[str, Any]) -> None:
        del arrays[name]

    return edit


def poison(name: str, place: tuple[int, ...]) -> Edit:
    def edit(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name].copy()
        arrays[name][place] = np.nan

    return edit


def empty(arrays: dict[str, Any]) -> None:
    arrays["logits"] = arrays["logits"][:0]


def reshape(arrays: dict[str, Any]) -> None:
    arrays["present.1.key"] = arrays["present.1.key"][0]


def too_few_rows(arrays: dict[str, Any]) -> None:
    arrays["present.0.value"] = arrays["present.0.value"][:, :20]


def scale(name: str) -> Edit:
    """Cosine 1 hides it."""

    def edit(arrays: dict[str, Any]) -> None:
        arrays[name] = arrays[name] * 1.01

    return edit


def wrong_row_only(arrays: dict[str, Any]) -> None:
    kept = arrays["kept_index.0"]
    other = next(row for row in range(2, 18) if row not in kept)
    arrays["kept_index.0"] = np.sort(np.r_[kept[:-1], other])


def unsorted_rows(arrays: dict[str, Any]) -> None:
    arrays["kept_index.0"] = arrays["kept_index.0"][::-1].copy()


def repeat_place(arrays: dict[str, Any]) -> None:
    arrays["stage.0.order"] = arrays["stage.0.order"].copy()
    arrays["stage.0.order"][1] = arrays["stage.0.order"][0]


def place_out_of_range(arrays: dict[str, Any]) -> None:
    arrays["stage.0.order"] = np.r_[arrays["stage.0.order"][:-1], 16]


def one_place_less(arrays: dict[str, Any]) -> None:
    arrays["stage.0.order"] = arrays["stage.0.order"][:-1]


def extra_output(arrays: dict[str, Any]) -> None:
    arrays["present.4.key"] = arrays["present.3.key"]


@pytest.mark.parametrize(
    ("edit", "stage", "said"),
    [
        (shift_row("present.2.key"), "caches after prefill", ""),
        (shift_row("present.0.value"), "caches after prefill", ""),
        (shift_decoded_rows, "caches at the end", ""),
        (drop("logits"), "last logits", "no such output"),
        (drop("image_features"), "vision features", "no such output"),
        (drop("stage.0.order"), "selection order", "no such output"),
        (drop("stage.0.scores"), "selector scores", "no such output"),
        (drop("kept_index.0"), "kept index", "no such output"),
        (drop("step.2.logits"), "teacher-forced logits", "no such output"),
        (drop("end.1.value"), "caches at the end", "no such output"),
        (poison("logits", (3,)), "last logits", "the engine has nan at [3]"),
        (poison("present.1.value", (1, 2, 3)), "caches after prefill", "the engine has nan at [1, 2, 3]"),
        (poison("stage.0.scores", (0,)), "selector scores", "nan"),
        (empty, "last logits", "shape [0] instead of [96]"),
        (reshape, "caches after prefill", "shape"),
        (too_few_rows, "caches after prefill", "shape [2, 20, 24] instead of [2, 25, 24]"),
        (scale("image_features"), "vision features", ""),
        (scale("step.1.logits"), "teacher-forced logits", ""),
        (wrong_row_only, "kept index", "1 rows are not those that were taken"),
        (unsorted_rows, "kept index", "do not ascend"),
        (repeat_place, "selection order", "taken more than once"),
        (place_out_of_range, "selection order", "place 16 is not among the 16"),
        (one_place_less, "selection order", "(5,) places instead of (6,)"),
        (extra_output, "outputs", "1 outputs the reference does not have"),
    ],
)
def test_a_faulty_record_fails_where_it_is_faulty(reference: Reference, edit: Edit, stage: str, said: str) -> None:
    inputs = make_inputs()
    arrays = dict(run_as_engine(reference, inputs).arrays)
    edit(arrays)
    results = judge(reference, EngineRecord(arrays), inputs)
    assert verdict(results) is Verdict.FAIL
    found = first_failure(results)
    assert found is not None and found.stage == stage and said in found.note, found


def test_a_wrong_token_kept_all_the_way_fails_at_the_order(reference: Reference) -> None:
    """The engine takes the lowest token in place of its last, and goes on with it consistently."""
    inputs = make_inputs()
    (trace,) = reference.record(inputs, PLAN, tokens=1).traces
    order = trace.choice.order.copy()
    order[-1] = min(set(range(16)) - set(order.tolist()), key=lambda place: trace.choice.scores[place])
    kept = np.sort(trace.visual_rows[order])
    engine = run_as_engine(reference, inputs, kept=[kept])
    results = judge(reference, EngineRecord({**engine.arrays, "stage.0.order": order}), inputs)
    assert [result.stage for result in results if result.verdict is Verdict.FAIL] == ["selection order"]
    assert "chunk 1 of 4 is no top set" in (first_failure(results) or results[0]).note


@pytest.mark.parametrize("exposed", [True, False])
def test_another_set_within_the_margin_is_ambiguous(reference: Reference, exposed: bool) -> None:
    inputs = make_inputs()
    (trace,) = reference.record(inputs, PLAN, tokens=1).traces
    last, best_left, scores = trace.choice.order[-1], None, trace.choice.scores
    best_left = max(set(range(16)) - set(trace.choice.order.tolist()), key=lambda place: scores[place])
    order = np.r_[trace.choice.order[:-1], best_left]
    kept = np.sort(trace.visual_rows[order])
    engine = run_as_engine(reference, inputs, kept=[kept], exposed=exposed)
    if exposed:
        engine = EngineRecord({**engine.arrays, "stage.0.order": order})
    wide = replace(FP32, selection=Margin(score=float(scores.max()), similarity=0.0))
    results = judge(reference, engine, inputs, tolerances=wide)
    assert verdict(results) is Verdict.AMBIGUOUS and last not in order
    (tie,) = [result for result in results if result.verdict is Verdict.AMBIGUOUS]
    assert tie.stage == "selection order" and "near tie" in tie.note
    assert stage_of(judge(reference, engine, inputs)) == "selection order"  # with the margin of fp32 it is no tie


def test_rows_of_an_unusable_kept_index_are_not_followed(reference: Reference) -> None:
    visual = np.arange(2, 18)
    record = EngineRecord({"kept_index.0": np.array([2, 3, 4]), "kept_index.1": np.array([3, 5])})
    first, second = usable_kept(record, [3, 2], visual)
    assert first is not None and first.tolist() == [2, 3, 4] and second is None  # 5 was dropped before
    for index in ([2, 2, 3], [1, 2, 3], [2, 3]):
        assert usable_kept(EngineRecord({"kept_index.0": np.array(index), "kept_index.1": np.array([2])}), [3, 1], visual) == [None, None]


def test_tokens_that_a_rounding_error_may_swap_are_ambiguous(reference: Reference) -> None:
    inputs = make_inputs()
    record = reference.record(inputs, PLAN, tokens=TOKENS)
    engine = run_as_engine(reference, inputs)
    theirs = record.arrays["logits"].copy()
    first, second = np.argsort(-theirs)[:2]
    near, ours = theirs.copy(), theirs.copy()
    near[second], ours[second] = theirs[first] - 1e-5, theirs[first] + 1e-5
    tied = ReferenceRecord({**record.arrays, "logits": near}, record.traces, record.tokens, record.length, record.plan)
    results = compare(EngineRecord({**engine.arrays, "logits": ours}), tied, FP32)
    (tie,) = [result for result in results if result.verdict is Verdict.AMBIGUOUS]
    assert tie.stage == "greedy tokens" and f"token 0: {second} for {first}" in tie.note
    ours[int(theirs.argmin())] = theirs[first] + 0.1
    far = compare(EngineRecord({**engine.arrays, "logits": ours}), tied, FP32)
    failed = [result.stage for result in far if result.verdict is Verdict.FAIL]
    assert failed == ["last logits", "greedy tokens"]


def test_measure_records_the_numbers() -> None:
    theirs = np.array([[1.0, -4.0], [2.0, 0.0]])
    ours = theirs + np.array([[0.0, 0.0], [0.5, 0.0]])
    found = measure(ours, theirs, tolerance=0.2)
    assert isinstance(found, Difference)
    assert (found.max_abs, found.allowed, found.relative, found.worst, found.elements) == (0.5, 0.8, 0.125, (1, 0), 4)
    assert found.severity == pytest.approx(0.625)
    assert found.cosine == pytest.approx((1 + 16 + 5) / np.sqrt(21 * (1 + 16 + 6.25)))
    zero = measure(np.zeros(3), np.zeros(3), tolerance=1e-4)
    assert isinstance(zero, Difference) and (zero.max_abs, zero.cosine, zero.allowed) == (0.0, 1.0, 1e-4)
    against_zero = measure(np.ones(3), np.zeros(3), tolerance=1e-4)
    assert isinstance(against_zero, Difference) and against_zero.cosine == 0.0


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        (np.zeros(0), np.zeros(0), "nothing to compare"),
        (np.zeros(3), np.zeros(2), "shape [3] instead of [2]"),
        (np.array([0.0, np.nan]), np.array([0.0, np.nan]), "the reference has nan at [1]"),
        (np.array([0.0, np.inf]), np.array([0.0, 1.0]), "the engine has inf at [1]"),
    ],
)
def test_what_cannot_be_measured_says_why(ours: Any, theirs: Any, said: str) -> None:
    found = measure(ours, theirs, tolerance=1.0)
    assert isinstance(found, str) and said in found


def test_nothing_compared_is_a_failure() -> None:
    assert combine([]) is Verdict.FAIL
    assert combine([Verdict.NOT_RUN]) is Verdict.NOT_RUN
    assert combine([Verdict.NOT_RUN, Verdict.PASS]) is Verdict.PASS
    assert combine([Verdict.AMBIGUOUS, Verdict.PASS]) is Verdict.AMBIGUOUS
    assert combine([Verdict.AMBIGUOUS, Verdict.PASS, Verdict.FAIL]) is Verdict.FAIL
