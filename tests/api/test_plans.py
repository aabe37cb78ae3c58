"""Which plan a request becomes: defaults of the papers, schedules, YAML files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

import sievert as package
from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.specs import Geometry
from sievert.bundle.store import Bundle
from sievert.graph_passes.selectors.registry import SELECTORS
from sievert.plan_file import choose_cuts, describe_cuts, read_plan, write_plan
from sievert.plan_yaml import LARGEST
from sievert.planning import Cut, make_plan, name_variant, pair_cuts
from tests.api.conftest import sievert
from tests.api.test_bad_input import refused
from tests.geometries import make_geometry

SCHEDULED = {name: entry.schedule for name, entry in SELECTORS.items() if entry.schedule.shares}


def model(depth: int = 32, visual: int = 576) -> Geometry:
    side = round(visual**0.5)
    return make_geometry(
        depth=depth,
        max_positions=4096,
        image_height=336,
        image_width=336,
        grid=(side, visual // side),
        visual_tokens=visual,
        vision_layers=24,
    )


def cuts_of(plan: Plan) -> list[tuple[int, int, str]]:
    return [(stage.layer, stage.keep, stage.requested) for stage in plan.stages]


@pytest.mark.parametrize(
    ("selector", "cuts", "positions"),
    [
        ("iwp", [(5, 127, "22%")], "keep"),
        ("fastv", [(2, 127, "22%")], "keep"),
        ("dart", [(2, 127, "22%")], "keep"),
        ("divprune", [(0, 127, "22%")], "keep"),
        ("cdpruner", [(0, 127, "22%")], "keep"),
        ("visionzip", [(0, 127, "22%")], "keep"),
        ("pyramiddrop", [(8, 288, "50%"), (16, 144, "25%"), (24, 72, "12.5%")], "compact"),
        ("sparsevlm", [(3, 300, "52.08%"), (7, 200, "34.72%"), (16, 110, "19.1%")], "keep"),
        ("transprune", [(7, 504, "87.5%"), (9, 360, "62.5%"), (12, 72, "12.5%")], "compact"),
    ],
)
def test_without_layer_and_keep_a_selector_cuts_where_its_paper_does(selector: str, cuts: list[tuple[int, int, str]], positions: str):
    plan = make_plan(model(), [Cut(selector=selector)])
    assert (cuts_of(plan), plan.positions) == (cuts, positions)


def test_options_may_move_the_default_layer():
    assert [stage.layer for stage in make_plan(model(), [Cut(selector="dart", options={"on": "embeddings"})]).stages] == [0]
    assert [stage.layer for stage in make_plan(model(), [Cut(selector="dart", options={"on": "keys"})]).stages] == [2]
    (dart,) = [info for info in package.list_selectors() if info.name == "dart"]
    assert dart.layers == (2,)


def test_the_default_layer_of_iwp_is_a_seventh_of_any_depth():
    for depth in range(1, 81):
        (stage,) = make_plan(model(depth), [Cut()]).stages
        assert stage.layer == min(depth - 1, max(1, round(depth / 7)))


@pytest.mark.parametrize("selector", SCHEDULED)
@pytest.mark.parametrize("visual", [1, 3, 16, 255, 576, 729, 2880])
def test_a_schedule_keeps_shares_of_all_visual_tokens_rounded_half_up(selector: str, visual: int):
    plan = make_plan(model(28, visual), [Cut(selector=selector)])
    shares = SCHEDULED[selector].shares
    assert [stage.keep for stage in plan.stages] == [max(1, int(share * visual + 0.5)) for share in shares]
    assert make_plan(model(28, visual), describe_cuts(plan), positions=plan.positions) == plan


@pytest.mark.parametrize("selector", SCHEDULED)
def test_a_scheduled_selector_takes_both_or_neither(selector: str):
    one = make_plan(model(), [Cut(selector=selector, layer=3, keep="10%")])
    assert (cuts_of(one), one.positions) == ([(3, 58, "10%")], "keep")
    for cut in (Cut(selector=selector, layer=3), Cut(selector=selector, keep="10%")):
        with pytest.raises(PlanError, match=r"3 times.*neither --layer nor --keep.*or both"):
            make_plan(model(), [cut])
    with pytest.raises(PlanError, match="3 cuts need 5 layers or more, but the decoder has 4"):
        make_plan(model(4), [Cut(selector=selector)])


def test_the_users_positions_win_over_the_schedules():
    for selector in SCHEDULED:
        for positions in ("keep", "compact"):
            assert make_plan(model(), [Cut(selector=selector)], positions=positions).positions == positions
    assert make_plan(model(), [Cut()], positions="compact").positions == "compact"
    both = [Cut(selector="visionzip", keep="90%"), Cut(selector="pyramiddrop")]
    with pytest.raises(PlanError, match="choose positions keep or compact"):
        make_plan(model(), both)
    assert [stage.keep for stage in make_plan(model(), both, positions="keep").stages] == [518, 288, 144, 72]


def test_options_of_the_command_line_become_cuts():
    assert pair_cuts([], [], [], []) == (Cut(),)
    assert pair_cuts([], [], ["pyramiddrop"], []) == (Cut(selector="pyramiddrop"),)
    assert pair_cuts([1, 3], ["8", "2"], ["iwp"], []) == (Cut(keep="8", layer=1), Cut(keep="2", layer=3))


def test_a_name_that_would_be_too_long_counts_the_cuts():
    plan = make_plan(model(), [Cut(layer=layer, keep=f"{100 - layer}.{layer:03}%") for layer in range(1, 12)])
    assert name_variant(plan) == "iwp-11-cuts"
    assert name_variant(make_plan(model(), [Cut(selector="sparsevlm")])) == "sparsevlm-52_08-34_72-19_1"


def test_a_plan_written_is_the_plan_read(tmp_path: Path):
    requests = [
        [Cut()],
        [Cut(layer=0, keep="64", options={"strength": 4.5, "growth": 3, "duplication_rotary": False, "head_norm": "softmax"})],
        [Cut(layer=2, keep="50%", selector="uniform"), Cut(layer=9, keep="0.5%", selector="random", options={"seed": 7})],
        *([Cut(selector=name)] for name in SCHEDULED),
    ]
    for number, request in enumerate(requests):
        plan = make_plan(model(), request)
        path = tmp_path / f"{number}.yaml"
        path.write_text(write_plan(plan))
        cuts, positions = read_plan(path)
        assert make_plan(model(), cuts, positions=positions) == plan
        assert choose_cuts((Cut(),), "auto", plan) == (cuts, positions) == choose_cuts((Cut(),), "auto", path)
    with pytest.raises(PlanError, match="one or the other"):
        choose_cuts((Cut(layer=1),), "auto", plan)


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("{selector: dart, options: {on: embeddings}}", Cut(selector="dart", options={"on": "embeddings"})),
        ("{selector: iwp, keep: 010}", Cut(keep="10")),
        ('{selector: iwp, keep: "010"}', Cut(keep="010")),
        ("{selector: iwp, keep: 1:30}", Cut(keep="1:30")),
        ("{selector: iwp, keep: 1_00}", Cut(keep="1_00")),
        ("{selector: iwp, keep: 0x10}", Cut(keep="0x10")),
        ("{selector: iwp, keep: 2026-01-02}", Cut(keep="2026-01-02")),
        ("{selector: 'iwp', layer: +3, keep: 22 %}", Cut(layer=3, keep="22 %")),
    ],
)
def test_a_plan_file_means_what_it_says(tmp_path: Path, text: str, cut: Cut):
    (tmp_path / "plan.yaml").write_text(f"stages: [{text}]")
    (read,), _ = read_plan(tmp_path / "plan.yaml")
    assert read == cut


def test_options_of_a_plan_file_are_plain_decimal_numbers_true_false_or_text(tmp_path: Path):
    (tmp_path / "plan.yaml").write_text("stages: [{selector: x, options: {a: yes, b: true, c: 1e3, d: .5, e: -2, f: 0.50, g: '1'}}]")
    (read,), _ = read_plan(tmp_path / "plan.yaml")
    assert [repr(value) for value in read.options.values()] == ["'yes'", "True", "1000.0", "0.5", "-2", "0.5", "'1'"]


PLAN = """
positions: compact
stages:
  - selector: magnitude
    layer: 1
    keep: 50%
    options: {text: all}
  - {selector: uniform, layer: 3, keep: 2}
"""


def test_prune_takes_a_plan_and_inspect_gives_it_back(bundle: Path, tmp_path: Path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    said = sievert("prune", bundle, "--plan", tmp_path / "plan.yaml", "--name", "planned")
    assert said.code == 0, said.all
    made = Bundle.open(bundle, verify="full").variant("planned").plan
    stages = (
        Stage(selector="magnitude", layer=1, keep=8, requested="50%", options={"text": "all"}),
        Stage(selector="uniform", layer=3, keep=2, requested="2"),
    )
    assert made == Plan(stages=stages, positions="compact")
    printed = sievert("inspect", bundle, "--plan", "planned")
    assert printed.code == 0 and printed.out == write_plan(made) == package.write_plan(made)
    (tmp_path / "again.yaml").write_text(printed.out)
    again = package.prune(bundle, plan=tmp_path / "again.yaml", name="again")
    assert again.variant.plan == made
    refused("inspect", bundle, "--plan", "iwp-23", says="no variant 'iwp-23'", keeps=bundle)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "holds no plan"),
        ("- iwp", "holds no plan"),
        ("stages: [", "no readable YAML"),
        ("stages: 3", "key 'stages': expected a list"),
        ("positions: keep", "key 'stages': expected a list"),
        ("positions: move\nstages: []", ("key 'positions'", "keep or compact")),
        ("layers: 3\nstages: []", ("unknown key 'layers'", "positions, stages")),
        ("stages: [iwp]", ("stage 1", "is no cut")),
        ("stages: [{layer: 1}]", ("stage 1", "key 'selector'", "is missing")),
        ("stages: [{selector: iwp}, {selector: iwp, ratio: 3}]", ("stage 2", "unknown key 'ratio'", "selector, layer, keep, options")),
        ("stages: [{selector: iwp, layer: first}]", ("stage 1", "key 'layer'", "'first'")),
        ("stages: [{selector: iwp, layer: true}]", ("stage 1", "key 'layer'", "True")),
        ("stages: [{selector: iwp, keep: [1]}]", ("stage 1", "key 'keep'")),
        ("stages: [{selector: iwp, keep: 0.22}]", ("stage 1", "keep=0.22 is ambiguous", "write 22%")),
        ("stages: [{selector: iwp, options: [strength]}]", ("stage 1", "key 'options'")),
        ("stages: [{selector: iwp, options: {strength: [4]}}]", ("stage 1", "key 'options'", "strength")),
        ("stages: [{selector: iwp, options: {strength: much}}]", ("stage 1", "strength='much'", "a number")),
        ("stages: [{selector: best}]", ("stage 1", "no selector 'best'")),
        ("stages: [{selector: iwp, layer: 1}, {selector: iwp, layer: 9}]", ("stage 2", "layer=9", "choose 0..3")),
        ("stages: [{selector: iwp, layer: 2}, {selector: iwp, layer: 1}]", ("stage 2", "ascending order")),
        ("stages: [{selector: pyramiddrop, keep: 4}]", ("stage 1", "neither --layer nor --keep")),
        ("stages: [{selector: iwp, keep: 4, keep: 5}]", ("line 1", "'keep' is given twice")),
        ("stages: []", ("key 'stages'", "no cut is listed", "'full'")),
        ("positions: keep\nstages:", "key 'stages': expected a list"),
        ("stages: [{selector: dart, on: keys}]", ("stage 1", "unknown key 'on'")),
        ("stages: [{selector: iwp, layer: 1, keep: 1_0}]", ("stage 1", "'1_0'", "neither a percentage")),
        ("stages: [{selector: random, options: {seed: 1_0}}]", ("stage 1", "seed='1_0'", "a whole number")),
        ("stages: [{selector: iwp, <<: {keep: 4}}]", ("stage 1", "unknown key '<<'")),
        ("stages: [{selector: iwp, ? [a] : 4}]", ("line 1", "a key must be a name")),
        ("stages: [{selector: iwp, keep: 4}]\n---\nstages: []", "no readable YAML"),
        ("stages: [&a {selector: iwp, layer: 1}, *a]", "an alias"),
        ("stages: [{selector: iwp, keep: !!str 4}]", ("line 1", "the tag", "plain values")),
        ("stages: !!python/object/apply:os.getcwd []", ("line 1", "the tag")),
        ("stages: " + "[" * 1500, "no readable YAML"),
        ("#" * (LARGEST + 1), f"more than {LARGEST} bytes"),
    ],
)
def test_a_plan_file_that_is_no_plan_is_refused(shared: Path, tmp_path: Path, text: str, says: str | tuple[str, ...]):
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    refused("prune", shared, "--plan", path, says=(str(path), *([says] if isinstance(says, str) else says)), keeps=shared)


def test_a_plan_file_that_cannot_be_read_or_comes_with_other_cuts_is_refused(shared: Path, checkpoint: Path, tmp_path: Path):
    (tmp_path / "plan.yaml").write_text(PLAN)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    refused("prune", shared, "--plan", tmp_path / "no.yaml", says=("no.yaml", "cannot be read"))
    refused("prune", shared, "--plan", tmp_path, says=("is no file", "YAML"))
    refused("prune", shared, "--plan", tmp_path / "binary.yaml", says="no readable YAML")
    plan = ("--plan", tmp_path / "plan.yaml")
    for others in (("--layer", 1), ("--keep", "22%"), ("--selector", "iwp"), ("--option", "text=all"), ("--positions", "keep")):
        refused("prune", shared, *plan, *others, says=("--plan", "--layer, --keep", "leave out"), keeps=shared)
        refused("export", checkpoint, tmp_path / "out", *plan, *others, says="--plan was given together")
    refused("export", checkpoint, tmp_path / "out", *plan, "--no-prune", says="--no-prune")
    assert not (tmp_path / "out").exists()
