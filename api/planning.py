"""What a user asks for, as the plan, the profile and the name of a variant."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Option, Plan, PositionPolicy, Stage, default_layer, resolve_keep
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.progress import Size

DEFAULT_KEEP = "22%"
DEFAULT_SELECTOR = "iwp"
FULL = "full"
"""The unpruned variant that every bundle has."""


@dataclass(frozen=True)
class Cut:
    """One cut as a user asks for it.

    ``keep`` is a share (``22%``) or a count (``64``); ``layer`` is the first to run on the kept tokens, ``auto`` a seventh of the
    depth. ``options`` are the selector's; a text is read as the type of the option's default.
    """

    keep: str = DEFAULT_KEEP
    layer: Size = "auto"
    selector: str = DEFAULT_SELECTOR
    options: Mapping[str, Option] = field(default_factory=dict)


def pair_cuts(layers: Sequence[int], keeps: Sequence[str], selectors: Sequence[str], options: Sequence[str]) -> tuple[Cut, ...]:
    """Cuts from repeated command line options: one ``--keep`` per ``--layer``; one ``--selector`` for all, or one each.

    ``options`` are ``key=value`` and go to every cut.

    Raises:
        PlanError: numbers that do not match, or an option without ``=``.
    """
    count = max(len(layers), len(keeps), len(selectors), 1)
    for what, given, least in (("--layer", layers, count > 1), ("--keep", keeps, count > 1), ("--selector", selectors, False)):
        if len(given) not in ({count} if least else {0, 1, count}):
            raise PlanError(f"{len(given)} times {what} for {count} cuts: give one --layer and one --keep per cut, in the same order")
    values = parse_options(options)
    return tuple(
        Cut(
            keep=keeps[place] if keeps else DEFAULT_KEEP,
            layer=layers[place] if layers else "auto",
            selector=(selectors[place] if len(selectors) == count else selectors[0]) if selectors else DEFAULT_SELECTOR,
            options=values,
        )
        for place in range(count)
    )


def parse_options(pairs: Sequence[str]) -> dict[str, Option]:
    """``key=value`` texts as a mapping.

    Raises:
        PlanError: no ``=``, or a key given twice.
    """
    values: dict[str, Option] = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found or not key.strip():
            raise PlanError(f"--option {pair!r}: write key=value, for example --option strength=4")
        if key.strip() in values:
            raise PlanError(f"--option {key.strip()} is given twice: give it once")
        values[key.strip()] = value.strip()
    return values


def make_plan(geometry: Geometry, cuts: Sequence[Cut], *, positions: PositionPolicy = "keep") -> Plan:
    """The plan for a model, checked against it. No cuts give the unpruned plan.

    Raises:
        PlanError: a selector, option, layer or keep the model cannot take; the message says what it could.
    """
    if len(cuts) > 1 and any(cut.layer == "auto" for cut in cuts):
        raise PlanError(f"{len(cuts)} cuts need a layer each: choose from 0..{geometry.depth - 1}")
    stages = [
        Stage(
            selector=cut.selector,
            layer=default_layer(geometry.depth) if cut.layer == "auto" else cut.layer,
            keep=resolve_keep(cut.keep, geometry.visual_tokens),
            requested=cut.keep.strip(),
            options=_read_options(cut),
        )
        for cut in cuts
    ]
    plan = Plan(stages=tuple(stages), positions=positions)
    plan.check(geometry)
    return plan


def make_profile(
    geometry: Geometry, *, batch: int = 1, decode_batch: Size = "auto", max_text: int = 128, max_new_tokens: int = 128
) -> Profile:
    """The profile for a model, checked against it; ``decode_batch`` ``auto`` is ``batch``.

    Raises:
        ProfileError: a size below 1, or more positions than the model has.
    """
    profile = Profile(
        batch=batch,
        decode_batch=batch if decode_batch == "auto" else decode_batch,
        visual_tokens=geometry.visual_tokens,
        max_text=max_text,
        max_new_tokens=max_new_tokens,
    )
    profile.check(geometry)
    return profile


def name_variant(plan: Plan) -> str:
    """A name that says what was asked for: ``iwp-22`` for 22 %, ``iwp-k64`` for 64 tokens, ``iwp-50-22`` for two cuts."""
    parts: list[str] = []
    selector = ""
    for stage in plan.stages:
        if stage.selector != selector:
            parts.append(stage.selector)
        selector = stage.selector
        share = stage.requested.endswith("%")
        parts.append(stage.requested[:-1].replace(".", "_") if share else f"k{stage.keep}")
    if plan.positions != "keep":
        parts.append(plan.positions)
    return re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(parts)) or FULL


def describe_plan(plan: Plan) -> str:
    """The plan as command line options."""
    parts = []
    for stage in plan.stages:
        parts += [f"--layer {stage.layer} --keep {stage.requested} --selector {stage.selector}"]
        parts += [f"--option {key}={_write(value)}" for key, value in stage.options.items()]
    if plan.positions != "keep":
        parts.append(f"--positions {plan.positions}")
    return " ".join(parts)


def describe_profile(profile: Profile) -> str:
    """The profile as command line options."""
    return (
        f"--batch {profile.batch} --decode-batch {profile.decode_batch} --max-text {profile.max_text} "
        f"--max-new-tokens {profile.max_new_tokens}"
    )


def _read_options(cut: Cut) -> dict[str, Option]:
    """The options that differ from the selector's defaults, with the types of those defaults."""
    from sievert.graph_passes.selectors import registry

    defaults = registry.options(cut.selector)
    given = {key: _read(cut.selector, key, value, defaults[key]) if key in defaults else value for key, value in cut.options.items()}
    registry.make(cut.selector, given)
    return {key: value for key, value in given.items() if value != defaults[key]}


def _read(selector: str, key: str, value: Option, default: Option) -> Option:
    if not isinstance(value, str) or isinstance(default, str):
        return value
    try:
        if isinstance(default, bool):
            return {"true": True, "false": False}[value.lower()]
        return type(default)(value)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise PlanError(f"selector {selector}: option {key}={value!r} must be {expected}, for example {key}={_write(default)}") from None


def _write(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
