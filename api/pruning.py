"""Add a variant to a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sievert.bundle.errors import VariantError
from sievert.bundle.manifest import Variant
from sievert.bundle.names import FULL, check_variant_name
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.plan_file import choose_cuts
from sievert.planning import Cut, Positions, describe_plan, describe_profile, make_plan, make_profile, name_variant
from sievert.progress import Progress, Size, silent
from sievert.sampling import check_samples, count_text, leave_room


@dataclass(frozen=True)
class Made:
    """A variant that a step made, and where."""

    path: Path
    name: str
    variant: Variant
    depth: int


def prune(
    bundle: str | Path,
    *,
    cuts: Sequence[Cut] = (Cut(),),
    positions: Positions = "auto",
    plan: str | Path | Plan = "",
    name: str = "",
    max_text: Size = "auto",
    max_new_tokens: Size = "auto",
    dynamic_text: bool | Literal["auto"] = "auto",
    batch: Size = "auto",
    decode_batch: Size = "auto",
    images: Size = "auto",
    sample_prompts: Sequence[str] = (),
    force: bool = False,
    progress: Progress = silent,
) -> Made:
    """Add a variant that drops visual tokens; no ``cuts`` make an unpruned one. ``plan``, or the YAML file of one, takes their place.

    Sizes that are ``auto`` are those of the variant ``full``; ``images`` is how many each prompt has. With ``sample_prompts`` ``max_text``
    is what the longest of them takes, rounded up to a multiple of 16. With ``dynamic_text`` prefill takes prompts of any length up to
    ``max_text``. An empty ``name`` is made from the plan, for example ``iwp-22``, or ``iwp-22-2-images`` and ``iwp-22-dynamic`` where
    ``full`` is otherwise.

    Raises:
        PlanError, ProfileError: what is asked for does not fit the model.
        VariantError: the name is taken (``force`` replaces the variant), or cannot name one.
        BundleError: the bundle is not what its manifest says, or cannot be written. Nothing was changed.
    """
    cuts, positions = choose_cuts(cuts, positions, plan)
    check_samples(sample_prompts, max_text)
    progress("checking the bundle")
    opened = Bundle.open(bundle, verify="full")
    geometry = opened.manifest.geometry
    full = opened.manifest.variants.get(FULL)
    defaults = full.profile if full is not None else make_profile(geometry)
    images = defaults.images if images == "auto" else images
    if sample_prompts:
        progress("reading the sample prompts")
        max_text = leave_room(count_text(opened.path, geometry, sample_prompts, images=images))
    given_batch = defaults.batch if batch == "auto" else batch
    profile = make_profile(
        geometry,
        batch=given_batch,
        decode_batch=(defaults.decode_batch if batch == "auto" else given_batch) if decode_batch == "auto" else decode_batch,
        images=images,
        max_text=defaults.max_text if max_text == "auto" else max_text,
        max_new_tokens=defaults.max_new_tokens if max_new_tokens == "auto" else max_new_tokens,
        dynamic_text=defaults.dynamic_text if dynamic_text == "auto" else dynamic_text,
    )
    checked = make_plan(geometry, cuts, positions=positions, images=profile.images)
    chosen = name or name_variant(checked, _differences(profile, defaults))
    check_name(chosen, checked)
    opened.require_new_variant(chosen, force=force)
    if full is None and chosen != FULL:  # an export was interrupted before it came to that
        add(opened, plan=Plan(), profile=profile, name=FULL, force=False, progress=progress)
    return add(opened, plan=checked, profile=profile, name=chosen, force=force, progress=progress)


def _differences(profile: Profile, defaults: Profile) -> str:
    """What a variant's name says beside its plan: how its prompts are others than those of ``full``."""
    suffix = "" if profile.images == defaults.images else f"-{profile.images}-images"
    if profile.dynamic_text != defaults.dynamic_text:
        suffix += "-dynamic" if profile.dynamic_text else "-static"
    return suffix


def check_name(name: str, plan: Plan) -> None:
    """Refuse a variant's name, before any work is done.

    Raises:
        VariantError: it cannot name a variant, or it is ``full`` for a plan that prunes.
    """
    check_variant_name(name)
    if name == FULL and plan.stages:
        raise VariantError(f"{FULL!r} names the unpruned variant that every bundle has: choose another name")


def add(bundle: Bundle, *, plan: Plan, profile: Profile, name: str, force: bool, progress: Progress) -> Made:
    """Make the variant of a checked plan and profile. Raises as :func:`prune`."""
    from sievert.graph_passes.prune import add_variant

    command = " ".join(filter(None, ["prune", describe_plan(plan), describe_profile(profile), f"--name {name}"]))
    variant = add_variant(
        bundle,
        name=name,
        plan=plan,
        profile=profile,
        force=force,
        command=command,
        progress=lambda stage: progress(f"making the variant {name}: {stage}"),
    )
    return Made(bundle.path, name, variant, bundle.manifest.geometry.depth)
