"""What several samples add up to."""

from __future__ import annotations

import pytest

from sievert.bundle.errors import InputError
from sievert.parity.report import describe, explain, summarise
from sievert.parity.tolerances import TOLERANCES, tolerances_for
from sievert.parity.verdict import Difference, StageResult, Verdict, exit_code


def result(stage: str, max_abs: float, *, name: str = "", allowed: float = 1.0) -> StageResult:
    found = Difference(max_abs, allowed, max_abs, 1.0, (0,), 1)
    return StageResult(stage, name or stage, Verdict.PASS if max_abs <= allowed else Verdict.FAIL, found)


TIE = StageResult("order", "order", Verdict.AMBIGUOUS, note="near tie: another set")
UNSEEN = StageResult("scores", "scores", Verdict.NOT_RUN, note="not to be seen")


def test_the_first_failing_stage_is_the_earliest_of_any_sample() -> None:
    samples = [[result("vision", 0.5), result("logits", 3.0)], [result("vision", 2.0), result("logits", 9.0)]]
    verdict, reason, stage = explain(samples)
    assert (verdict, stage) == (Verdict.FAIL, "vision")
    assert reason == "first failing stage: vision (vision, sample 1): max abs 2 > 1 allowed, at [0], cosine 1.000000"


def test_a_near_tie_is_told_and_a_failure_outweighs_it() -> None:
    verdict, reason, stage = explain([[result("vision", 0.5), TIE], [result("vision", 0.1), TIE]])
    assert (verdict, stage) == (Verdict.AMBIGUOUS, None) and reason.startswith("2 near ties, the first at order (sample 0)")
    assert explain([[TIE], [result("order", 2.0)]])[0] is Verdict.FAIL
    assert explain([[result("vision", 0.5), UNSEEN]]) == (Verdict.PASS, "", None)


@pytest.mark.parametrize("samples", [[], [[]], [[result("vision", 0.1)], []]])
def test_a_sample_without_comparisons_fails(samples: list[list[StageResult]]) -> None:
    assert explain(samples) == (Verdict.FAIL, "nothing was compared", None)


def test_a_stage_shows_its_worst_sample_against_what_is_allowed() -> None:
    samples = [
        [result("caches", 0.5, name="present.0.key"), result("caches", 0.9, name="present.1.key", allowed=10.0)],
        [result("caches", 0.7, name="present.0.key"), result("caches", 0.1, name="present.1.key")],
    ]
    (caches,) = summarise(samples)
    assert (caches.verdict, caches.comparisons, caches.sample, caches.name) == (Verdict.PASS, 4, 1, "present.0.key")
    assert caches.worst is not None and caches.worst.severity == 0.7 and caches.note == "present.0.key"
    tied, unseen = summarise([[UNSEEN, TIE], [UNSEEN, StageResult("order", "order", Verdict.PASS, note="same set")]])[::-1]
    assert (tied.verdict, tied.note, tied.worst) == (Verdict.AMBIGUOUS, "near tie: another set (sample 0)", None)
    assert unseen.verdict is Verdict.NOT_RUN
    missing = StageResult("caches", "present.1.key", Verdict.FAIL, note="the engine gave no such output")
    (caches,) = summarise([[result("caches", 5.0, name="present.0.key"), missing]])
    assert caches.note.startswith("the engine gave no such output") and describe(missing) == missing.note


def test_exit_codes() -> None:
    codes = {verdict: (exit_code(verdict), exit_code(verdict, strict=True)) for verdict in Verdict}
    assert codes == {Verdict.PASS: (0, 0), Verdict.AMBIGUOUS: (0, 3), Verdict.FAIL: (1, 1), Verdict.NOT_RUN: (0, 0)}


def test_tolerances_widen_with_the_rounding() -> None:
    assert tolerances_for("float32").logits == 1e-4  # what the project promises
    kinds = ("vision", "embeddings", "residual", "scores", "cache", "logits")
    for finer, coarser in (("float32", "float16"), ("float16", "bfloat16")):
        assert all(getattr(TOLERANCES[finer], kind) < getattr(TOLERANCES[coarser], kind) for kind in kinds)
        assert TOLERANCES[finer].selection.score < TOLERANCES[coarser].selection.score
    alone, exact = tolerances_for("float32", "float16"), tolerances_for("float32")
    assert (alone.logits, alone.residual) == (exact.logits, exact.residual)  # nothing before the caches is forgiven
    assert exact.stored == exact.cache < alone.stored < alone.stored_later
    assert alone.stored < tolerances_for("float32", "bfloat16").stored
    assert exact.decoded == exact.logits < alone.decoded < tolerances_for("float16").logits
    with pytest.raises(InputError, match="'float8'.*float32, float16, bfloat16"):
        tolerances_for("float8")
