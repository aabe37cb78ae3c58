"""The arithmetic of the accuracy benchmark, and the plans it compares, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.accuracy import claim
from benchmarks.accuracy_arms import EQUAL_TO, FULL, METHODS, Budget, common_layer, keep_arms, layer_arms, tuning_arms
from benchmarks.accuracy_judge import Answers, judge, mean, median, paired
from sievert.bundle.plan import resolve_keep
from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported, export_model
from sievert.graph_passes.selectors import registry
from sievert.graph_passes.variant import make_variant
from tests.tiny_llava import make_tiny_llava

DEFAULTS = {method.name: method.candidates[0] for method in METHODS}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return export_model(make_tiny_llava(tmp_path_factory.mktemp("deep") / "model", layers=8, image_size=64))


def answers(right: list[int]) -> Answers:
    values = np.asarray(right, np.float64)
    return Answers(values, values, values * 0.5)


def test_every_selector_is_measured_and_every_setting_chooses_otherwise() -> None:
    assert {method.selector for method in METHODS} == set(registry.SELECTORS)
    for method in METHODS:
        assert len(method.candidates) <= 4
        made = [registry.make(method.selector, options) for options in method.candidates]
        assert len(set(made)) == len(made)


def test_intervals_do_not_vanish_where_nothing_differs() -> None:
    same = np.ones(500)
    change = paired(same, same)
    assert change.value == 0 and -0.01 < change.low < -0.001 and 0.001 < change.high < 0.01
    share = mean(same)
    assert share.value == 1 and share.high == pytest.approx(1) and 0.99 < share.low < 0.995


def test_a_paired_difference_is_that_of_the_means() -> None:
    now, before = np.array([1.0, 1, 0, 1, 0, 0, 1, 1]), np.array([1.0, 0, 0, 0, 0, 1, 1, 0])
    found = paired(now, before)
    assert found.value == pytest.approx(now.mean() - before.mean()) and found.low < found.value < found.high
    thirds = paired(now / 3, before)  # several draws: no longer 0 or 1
    assert thirds.value == pytest.approx((now / 3 - before).mean())


def test_the_median_of_fifteen_lies_between_the_fourth_and_the_twelfth() -> None:
    found = median(np.random.default_rng(0).permutation(np.arange(1.0, 16)))
    assert (found.low, found.value, found.high) == (4, 8, 12)


def test_draws_are_judged_by_their_mean_question_by_question() -> None:
    full, kinds = answers([1, 1, 1, 0]), np.array([0, 0, 1, 1])
    row = judge(FULL, [answers([1, 0, 0, 0]), answers([1, 1, 0, 0])], full, answers([1, 1, 0, 0]), kinds, 2)
    assert row.accuracy.value == pytest.approx(3 / 8) and row.spread == (0.25, 0.5)
    assert row.change.value == pytest.approx(3 / 8 - 3 / 4) and row.share.value == pytest.approx(0.5)
    assert row.against_iwp is not None and row.against_iwp.value == pytest.approx(-1 / 8)
    assert [kind.value for kind in row.by_kind] == pytest.approx([0.75, 0])


def test_all_plans_can_be_made(exported: Exported) -> None:
    model = exported.geometry
    profile = Profile(visual_tokens=model.visual_tokens, max_text=8, max_new_tokens=2)
    budget = Budget(exported.graphs, model, profile)
    equal = budget.arms(DEFAULTS)
    arms = [*keep_arms(model, DEFAULTS), *tuning_arms(model), *layer_arms(model, DEFAULTS), *equal]
    for arm in arms:
        arm.plan.check(model)
        for stage in arm.plan.stages:
            registry.make(stage.selector, stage.options).check(stage, model)
    for arm in (arm for arm in equal if arm.method in ("PyramidDrop", "SparseVLM", "TransPrune", "FoPru")):
        make_variant(exported.graphs, model, arm.plan, profile)
    positions = {arm.method: arm.plan.positions for arm in equal if len(arm.plan.stages) > 1}
    assert positions == {"PyramidDrop": "compact", "SparseVLM": "keep", "TransPrune": "compact"}
    assert sum(arm.method == "random" for arm in keep_arms(model, DEFAULTS)) == 18


def test_a_budget_is_spent_but_not_exceeded(exported: Exported) -> None:
    model = exported.geometry
    budget = Budget(exported.graphs, model, Profile(visual_tokens=model.visual_tokens, max_text=8, max_new_tokens=2))
    common = (common_layer(model.depth), resolve_keep(EQUAL_TO, model.visual_tokens))
    assert budget.scale_cuts([common[0]], [1.0]) == [common]
    ((_, keep),) = budget.scale_cuts([common[0] + 1], [1.0]) or [(0, 0)]
    assert 0 < keep < common[1]
    assert budget.count([(common[0] + 1, keep)]) <= budget.target < budget.count([(common[0] + 1, keep + 1)])
    assert budget.scale_cuts([model.depth - 1], [1.0]) is None


def test_answers_of_other_code_are_not_gone_on_with(tmp_path: Path) -> None:
    code = claim(tmp_path)
    assert claim(tmp_path) == code
    (tmp_path / "code").write_text("another")
    with pytest.raises(SystemExit, match="answers of other code"):
        claim(tmp_path)
