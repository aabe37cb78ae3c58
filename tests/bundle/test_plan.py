"""What a user may ask for, and what is refused in words that end the problem."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from sievert.bundle.errors import PlanError, ProfileError
from sievert.bundle.plan import Plan, Stage, resolve_keep
from sievert.bundle.profile import Profile
from tests.geometries import make_geometry

GEOMETRY = make_geometry(depth=10, image_height=128, image_width=128, grid=(16, 16), visual_tokens=256)


def stage(layer: int, keep: int) -> Stage:
    return Stage(selector="iwp", layer=layer, keep=keep, requested=str(keep))


@pytest.mark.parametrize(
    ("text", "kept"), [("22%", 127), ("22.2%", 128), ("100%", 576), ("0.01%", 1), ("1", 1), ("576", 576), (" 64 ", 64), ("12.5%", 72)]
)
def test_keep_is_a_share_or_a_count(text: str, kept: int) -> None:
    assert resolve_keep(text, 576) == kept


@pytest.mark.parametrize("visual", [1, 2, 7, 16, 576])
def test_shares_round_half_up(visual: int) -> None:
    assert resolve_keep("50%", visual) == max(1, (visual + 1) // 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0.22", "write 22% for a share"),
        ("1.0", "write 100% for a share"),
        (".5", "write 50% for a share"),
        ("22.0", "write 22% for a share or a whole number"),
        ("0", "choose 1..576"),
        ("577", "keep=577 but the model has 576 visual tokens: choose 1..576"),
        ("0%", "above 0% and at most at 100%"),
        ("101%", "above 0% and at most at 100%"),
        ("-3", "neither a percentage"),
        ("half", "neither a percentage"),
        ("", "neither a percentage"),
    ],
)
def test_other_keeps_are_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        resolve_keep(text, 576)


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([(10, 5)], "layer=10 but the decoder has 10 layers: choose 0..9"),
        ([(-1, 5)], "layer=-1"),
        ([(1, 0)], "keep=0 but the model has 256"),
        ([(1, 257)], "choose 1..256"),
        ([(3, 50), (1, 20)], "ascending order"),
        ([(3, 50), (3, 20)], "one per layer"),
        ([(1, 20), (3, 50)], "may not grow"),
    ],
)
def test_plans_out_of_range_are_refused(stages: list[tuple[int, int]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan(stages=tuple(stage(*each) for each in stages)).check(GEOMETRY)


def test_what_each_layer_no_longer_sees() -> None:
    plan = Plan(stages=(stage(1, 100), stage(4, 30)))
    plan.check(GEOMETRY)
    assert plan.dropped(256) == (156, 226)
    assert [plan.dropped_at(layer, 256) for layer in (0, 1, 3, 4, 9)] == [0, 156, 156, 226, 226]
    assert Plan().dropped_at(5, 256) == 0


def test_lengths_of_a_profile() -> None:
    profile = Profile(visual_tokens=256, max_text=40, max_new_tokens=8)
    assert (profile.sequence, profile.capacity(), profile.capacity(200)) == (296, 304, 104)
    profile.check(GEOMETRY)


@pytest.mark.parametrize("name", ["batch", "decode_batch", "max_text", "max_new_tokens"])
def test_a_profile_has_no_empty_size(name: str) -> None:
    sizes: dict[str, Any] = {"visual_tokens": 256, "max_text": 40, "max_new_tokens": 8, name: 0}
    with pytest.raises(ProfileError, match=f"{name}=0"):
        Profile(**sizes)


def test_profiles_the_model_cannot_serve() -> None:
    with pytest.raises(ProfileError, match="lower --max-text"):
        Profile(visual_tokens=256, max_text=249, max_new_tokens=8).check(GEOMETRY)
    with pytest.raises(ProfileError, match="gives 256 in this model"):
        Profile(visual_tokens=100, max_text=10, max_new_tokens=8).check(GEOMETRY)


def test_several_images_share_the_profile() -> None:
    profile = Profile(images=2, visual_tokens=512, max_text=10, max_new_tokens=8)
    assert profile.image_tokens == (256, 256) and profile.sequence == 522
    with pytest.raises(ProfileError, match="530 positions, but the model has 512: lower --images, --max-text"):
        profile.check(GEOMETRY)
    with pytest.raises(ProfileError, match="has 256 visual tokens but 2 images of 128x128 pixels give 512"):
        profile.model_copy(update={"visual_tokens": 256}).check(GEOMETRY)
    with pytest.raises(ProfileError, match="images=0"):
        Profile(images=0, visual_tokens=256, max_text=10, max_new_tokens=8)
    Plan(stages=(stage(1, 300), stage(2, 2))).check(GEOMETRY, 2)
    for keep in (1, 513):
        with pytest.raises(
            PlanError, match=rf"keep={keep} but .* 512 visual tokens in 2 images, which keep at least 1 each: choose 2\.\.512"
        ):
            Plan(stages=(stage(1, keep),)).check(GEOMETRY, 2)


def test_a_profile_written_before_there_were_several_images_has_one() -> None:
    old = '{"batch": 2, "decode_batch": 2, "visual_tokens": 256, "max_text": 40, "max_new_tokens": 8}'
    assert Profile.model_validate_json(old).images == 1


def test_records_take_no_unknown_keys_and_do_not_change() -> None:
    with pytest.raises(ValidationError):
        Stage.model_validate({"selector": "iwp", "layer": 1, "keep": 2, "requested": "2", "colour": "red"})
    with pytest.raises(ValidationError):
        stage(1, 2).layer = 3  # type: ignore[misc]
