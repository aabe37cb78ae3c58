"""Prompts of several images: every image ranked by itself, the budget shared, everything else as transformers has it."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

import numpy as np
import onnx_ir as ir
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from sievert.bundle.errors import PlanError, ProfileError
from sievert.bundle.plan import Option, Plan, Stage
from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported
from sievert.graph_passes.groups import share_keep
from sievert.graph_passes.lint import lint
from sievert.graph_passes.lower import lower
from sievert.graph_passes.lowering.targets import TARGETS
from sievert.graph_passes.variant import make_variant
from sievert.parity.reference import Reference
from sievert.parity.selectors.images import share_budget
from tests.graph_passes.conftest import Tiny
from tests.graph_passes.llavas import IMAGE, Array, Prompts, Static, assert_close, compare, plan_of, reference_inputs

Model = tuple[Exported, Reference]
MAX_TEXT = 9


@pytest.fixture(scope="module")
def model(tiny: Tiny) -> Model:
    folder, exported = tiny("clip-llama")
    return exported, Reference(LlavaForConditionalGeneration.from_pretrained(folder))


def profile_of(exported: Exported, images: int, batch: int = 2) -> Profile:
    visual = images * exported.geometry.visual_tokens
    return Profile(batch=batch, decode_batch=batch, images=images, visual_tokens=visual, max_text=MAX_TEXT, max_new_tokens=4)


def make_prompts(exported: Exported, images: int, batch: int = 2, seed: int = 0) -> Prompts:
    """Text before, between and after the images, another amount in each row; in the first row two images touch."""
    rng, g = np.random.default_rng(seed), exported.geometry
    ids = []
    for row in range(batch):
        text = [1 + row, *[row] * (images - 1), MAX_TEXT - 1 - (images + 1) * row]
        runs = [np.append(rng.integers(5, 60, words), np.full(g.visual_tokens, IMAGE)) for words in text[:-1]]
        ids.append(np.concatenate([*runs, rng.integers(5, 60, text[-1])]))
    return Prompts(tuple(ids), rng.standard_normal((batch, images, g.channels, g.image_height, g.image_width)).astype(np.float32))


def images_of(ids: Array, rows: Array, each: int) -> list[int]:
    """How many of ``rows`` belong to each image of a prompt."""
    visual = np.flatnonzero(ids == IMAGE)
    return [int(count) for count in np.bincount(np.searchsorted(visual, rows) // each, minlength=len(visual) // each)]


def stages_of(selector: str, cuts: list[tuple[int, int]], options: Mapping[str, Option] = {}) -> Plan:
    stages = (Stage(selector=selector, layer=layer, keep=keep, requested=str(keep), options=dict(options)) for layer, keep in cuts)
    return Plan(stages=tuple(stages))


@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.data())
def test_the_budget_is_shared_in_proportion(tokens: list[int], data: st.DataObject) -> None:
    keep = data.draw(st.integers(1, sum(tokens)))
    shares = share_keep(keep, tokens)
    assert sum(shares) == keep and list(shares) == share_budget(keep, tokens)
    for share, own in zip(shares, tokens, strict=True):
        assert 0 <= share <= own and abs(share - keep * own / sum(tokens)) < 1


@given(st.integers(1, 6), st.integers(1, 20), st.data())
def test_images_of_one_size_differ_by_one_at_most_at_every_stage(images: int, each: int, data: st.DataObject) -> None:
    """And no image goes empty as long as there is a token for each."""
    left = (each,) * images
    for _ in range(3):
        left = share_keep(data.draw(st.integers(images, sum(left))), left)
        assert all(before >= after for before, after in pairwise(left)) and left[0] - left[-1] <= 1 and left[-1] >= 1


@pytest.mark.parametrize("images", [2, 3])
def test_unpruned_prompts_equal_transformers(model: Model, images: int) -> None:
    exported, reference = model
    prompts = make_prompts(exported, images)
    first = compare(exported, reference, Plan(), profile_of(exported, images), prompts)
    for row, ids in enumerate(prompts.ids):
        with torch.inference_mode():
            whole = reference.model(input_ids=torch.from_numpy(ids)[None], pixel_values=torch.from_numpy(prompts.pixels[row]))
        assert_close(first["logits"][row], whole.logits[0, -1].numpy(), f"the model's own forward on row {row}")


@pytest.mark.parametrize(
    ("selector", "images", "options"),
    [
        ("iwp", 3, {}),
        ("fastv", 2, {}),
        ("random", 3, {}),
        ("dart", 2, {}),
        ("transprune", 2, {"weights": "image"}),
        ("sparsevlm", 2, {}),
    ],
)
def test_every_selector_ranks_every_image_by_itself(model: Model, selector: str, images: int, options: dict[str, Option]) -> None:
    """Two cuts, so that what is carried goes back to its image, with keeps that leave a remainder."""
    exported, reference = model
    each, keeps = exported.geometry.visual_tokens, (8 * images + 1, 3 * images - 1)
    plan = stages_of(selector, list(zip((1, 3), keeps, strict=True)), options)
    prompts, profile = make_prompts(exported, images), profile_of(exported, images)
    shown = [f"stage.{stage}.{what}" for stage in range(2) for what in ("scores", "order")] if selector != "random" else []  # constants
    first = compare(exported, reference, plan, profile, prompts, exposed=shown)
    for row, ids in enumerate(prompts.ids):
        kept = [first[f"kept_index.{stage}"][row] for stage in range(2)]
        assert [images_of(ids, rows, each) for rows in kept] == [[9, *[8] * (images - 1)], [*[3] * (images - 1), 2]]
        _, arrays, traces = reference.prefill(reference_inputs(ids, prompts.pixels[row]), plan, kept)
        for stage, (rows, trace) in enumerate(zip(kept, traces, strict=True)):
            np.testing.assert_array_equal(rows, trace.own_kept)
            if shown:
                np.testing.assert_array_equal(first[f"stage.{stage}.order"][row], trace.choice.order)
                np.testing.assert_allclose(first[f"stage.{stage}.scores"][row], arrays[f"stage.{stage}.scores"], rtol=1e-3, atol=2e-6)


@pytest.mark.parametrize("options", [{"strategy": "row"}, {"queries": "class_token"}])
def test_vision_scores_are_each_images_own(model: Model, options: dict[str, Option]) -> None:
    exported, reference = model
    each = exported.geometry.visual_tokens
    plan = Plan(stages=(*stages_of("fopru", [(0, 16)], options).stages, *stages_of("iwp", [(2, 5)]).stages))
    prompts, profile = make_prompts(exported, 2), profile_of(exported, 2)
    several = Static(exported, plan, profile).run("vision_encoder", {"pixel_values": prompts.pixels})
    one = plan.model_copy(update={"stages": stages_of("fopru", [(0, 8)], options).stages})
    alone = Static(exported, one, profile_of(exported, 1, batch=4))
    single = alone.run("vision_encoder", {"pixel_values": prompts.pixels.reshape(4, *prompts.pixels.shape[2:])})
    assert several["visual_scores"].shape == (2, 2 * each) and several["image_features"].shape[:2] == (2, 2 * each)
    np.testing.assert_allclose(several["visual_scores"], single["visual_scores"].reshape(2, -1), rtol=1e-5)
    assert_close(several["image_features"], single["image_features"].reshape(several["image_features"].shape), "features")
    first = compare(exported, reference, plan, profile, prompts)
    for row, ids in enumerate(prompts.ids):
        kept = [first[f"kept_index.{stage}"][row] for stage in range(2)]
        assert [images_of(ids, rows, each) for rows in kept] == [[8, 8], [3, 2]]
        _, arrays, traces = reference.prefill(reference_inputs(ids, prompts.pixels[row]), plan, kept)
        np.testing.assert_allclose(several["visual_scores"][row], arrays["visual_scores"], rtol=1e-4)
        np.testing.assert_array_equal(kept[0], traces[0].own_kept)


def test_the_same_image_twice_keeps_the_same_patches(model: Model) -> None:
    """Where the score does not depend on what else the prompt holds: a seeded choice, and attention in the vision encoder."""
    exported, _ = model
    prompts = make_prompts(exported, 2)
    same = Prompts(prompts.ids, prompts.pixels[:, [0, 0]])
    for selector in ("random", "fopru"):
        first, _ = Static(exported, plan_of([(0, 10)], selector=selector), profile_of(exported, 2)).answer(same, np.full((2, 1), 7))
        for ids, rows in zip(same.ids, first["kept_index.0"], strict=True):
            places = np.searchsorted(np.flatnonzero(ids == IMAGE), rows)
            np.testing.assert_array_equal(places[:5], places[5:] - exported.geometry.visual_tokens)


def test_the_interface_and_every_target(model: Model) -> None:
    exported, _ = model
    plan = Plan(stages=(*stages_of("visionzip", [(0, 20)]).stages, *stages_of("iwp", [(2, 7)]).stages))
    graphs = make_variant(exported.graphs, exported.geometry, plan, profile_of(exported, 3))
    vision, prefill = graphs["vision_encoder"].graph, graphs["prefill"].graph
    assert {str(value.name): list(value.shape or ()) for value in (*vision.inputs, *vision.outputs)} == {
        "pixel_values": [2, 3, 3, 32, 32],
        "image_features": [2, 48, 64],
        "visual_scores": [2, 48],
    }
    values = {str(value.name): list(value.shape or ()) for node in prefill for value in node.outputs}
    shown = {name: shape for name, shape in values.items() if name.startswith(("stage.0.o", "stage.0.s", "stage.1.o", "stage.1.s"))}
    assert shown == {"stage.0.order": [2, 20], "stage.0.scores": [2, 48], "stage.1.order": [2, 7], "stage.1.scores": [2, 20]}
    for name, model_graph in graphs.items():
        for target in TARGETS:
            assert [found for found in lint(lower(model_graph, target), target) if found.severity == "error"] == [], name


def test_one_image_adds_nothing(model: Model) -> None:
    """The batch axis alone, as before there were several."""
    exported, _ = model
    graphs = make_variant(exported.graphs, exported.geometry, plan_of([(1, 5)]), profile_of(exported, 1))
    assert list(graphs["vision_encoder"].graph.inputs[0].shape or ()) == [2, 3, 32, 32]
    assert not [node for node in graphs["prefill"].graph if "image." in str(node.name)]


@pytest.mark.parametrize(
    ("selector", "layer", "keep", "options", "message"),
    [
        ("iwp", 1, 2, {}, r"keep=2 but the model has 48 visual tokens in 3 images, which keep at least 1 each: choose 3\.\.48"),
        ("iwp", 1, 49, {}, r"choose 3\.\.48"),
        ("fopru", 0, 20, {"strategy": "row"}, r"image 1 of 3 gets 7 of the 20 .*choose a multiple of 4, such as 8"),
        ("fastv", 0, 20, {}, "image 1 of 3 .*reads the attention of the layer before"),
    ],
)
def test_plans_that_do_not_fit(model: Model, selector: str, layer: int, keep: int, options: dict[str, Option], message: str) -> None:
    exported, _ = model
    with pytest.raises(PlanError, match=message):
        make_variant(exported.graphs, exported.geometry, stages_of(selector, [(layer, keep)], options), profile_of(exported, 3))


def test_profiles_and_bundles_that_do_not_fit(model: Model) -> None:
    exported, _ = model
    with pytest.raises(ProfileError, match="has 16 visual tokens but 2 images of 32x32 pixels give 32"):
        make_variant(exported.graphs, exported.geometry, Plan(), profile_of(exported, 2).model_copy(update={"visual_tokens": 16}))
    old = exported.graphs["embed_tokens"].clone()
    for value in old.graph.inputs[1:]:
        value.shape = ir.Shape([axis if place != 1 else 16 for place, axis in enumerate(value.shape or ())])
    with pytest.raises(ProfileError, match="one image per prompt: export the model again"):
        make_variant({**exported.graphs, "embed_tokens": old}, exported.geometry, Plan(), profile_of(exported, 2))
    make_variant({**exported.graphs, "embed_tokens": old}, exported.geometry, Plan(), profile_of(exported, 1))
