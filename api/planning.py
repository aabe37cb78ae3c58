"""What a user asks for, as the plan, the profile and the name of a variant."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from sievert.bundle.errors import PlanError
from sievert.bundle.names import FULL
from sievert.bundle.plan import Option, Plan, PositionPolicy, Stage, resolve_keep
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.progress import Size

if TYPE_CHECKING:
    from sievert.graph_passes.selectors.schedule import Schedule

DEFAULT_KEEP = "22%"
DEFAULT_SELECTOR = "iwp"
DEFAULT_TEXT = 128
LONGEST_NAME = 64

Positions = PositionPolicy | Literal["auto"]
"""What happens to positions after a cut; ``auto`` is what the selector's paper does where its own layers are taken, else ``keep``."""


@dataclass(frozen=True)
class Cut:
    """One cut as a user asks for it, or a selector's whole schedule.

    ``keep`` is a share (``22%``) or a count (``64``); ``layer`` is the first to run on the kept tokens. What is ``auto`` comes from the
    selector's paper, scaled to the model's depth: the layer, with 22 % kept where the paper leaves that to the user. A selector whose paper
    cuts several times takes either both, for one cut, or neither, for all of its own cuts. ``options`` are the selector's; a text is read
    as the type of the option's default. ``source`` says in errors where the cut was written.
    """

    keep: str = "auto"
    layer: Size = "auto"
    selector: str = DEFAULT_SELECTOR
    options: Mapping[str, Option] = field(default_factory=dict)
    source: str = field(default="", compare=False)


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
            keep=keeps[place] if keeps else "auto",
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


def make_plan(geometry: Geometry, cuts: Sequence[Cut], *, positions: Positions = "auto", images: int = 1) -> Plan:
    """The plan for a model and prompts of ``images`` images, checked against both. No cuts give the unpruned plan.

    Raises:
        PlanError: a selector, option, layer or keep the model cannot take; the message says what it could.
    """
    from sievert.graph_passes.groups import share_stage
    from sievert.graph_passes.selectors import registry

    stages: list[Stage] = []
    left = (geometry.visual_tokens,) * images
    policies: set[PositionPolicy] = set()
    for cut in cuts:
        try:
            options = _read_options(cut)
            selector, schedule = registry.make(cut.selector, options), registry.find_schedule(cut.selector, options)
            for layer, requested in _place(cut, schedule, geometry, images):
                keep = selector.resolve_keep(requested, geometry, images)
                stages.append(Stage(selector=cut.selector, layer=layer, keep=keep, requested=requested, options=options))
                Plan(stages=tuple(stages)).check(geometry, images)
                left = share_stage(selector, stages[-1], geometry, left)
        except PlanError as error:
            if not cut.source:
                raise
            raise PlanError(f"{cut.source}: {error}") from error
        if cut.layer == "auto":
            policies.add(schedule.positions)
    if geometry.position_axes > 1:
        policies = {"keep"}  # places in a picture cannot be renumbered, whatever the paper does on models of one axis
    if positions == "auto" and len(policies) > 1:
        raise PlanError("the selectors' papers treat positions differently after a cut: choose positions keep or compact")
    return Plan(stages=tuple(stages), positions=positions if positions != "auto" else (policies or {"keep"}).pop())


def choose_layer(schedule: Schedule, geometry: Geometry) -> int:
    """Where a single cut is made by default: before the paper's layer, scaled, or a seventh of the depth where it cuts several times."""
    from sievert.graph_passes.selectors.schedule import SEVENTH, scale_layers

    once = SEVENTH if schedule.shares else schedule
    # One or two layers are too few to scale to, but a cut before the last one can be made.
    if geometry.depth < 3 and once.layers != (0,):
        return geometry.depth - 1
    return scale_layers(once.layers, once.depth, geometry.depth)[0]


def _place(cut: Cut, schedule: Schedule, geometry: Geometry, images: int) -> list[tuple[int, str]]:
    """Layer and keep of every cut that is meant."""
    from sievert.graph_passes.selectors.schedule import scale_layers

    if not schedule.shares or (cut.layer != "auto" and cut.keep != "auto"):
        layer = choose_layer(schedule, geometry) if cut.layer == "auto" else cut.layer
        return [(layer, DEFAULT_KEEP if cut.keep == "auto" else cut.keep.strip())]
    if cut.layer != "auto" or cut.keep != "auto":
        given = "keep" if cut.layer == "auto" else "layer"
        raise PlanError(
            f"{cut.selector} got a {given} alone, but its paper cuts {len(schedule.layers)} times (before "
            f"layers {_join(schedule.layers)} of {schedule.depth}, keeping {_join(_percent(share, 4) for share in schedule.shares)}): give "
            "neither --layer nor --keep for these cuts scaled to your model, or both for one cut by its score"
        )
    layers = scale_layers(schedule.layers, schedule.depth, geometry.depth)
    return [(layer, _write_share(share, images * geometry.visual_tokens)) for layer, share in zip(layers, schedule.shares, strict=True)]


def _write_share(share: float, visual_tokens: int) -> str:
    """The shortest percentage that keeps ``floor(share * Nv + 0.5)`` tokens: ``52.08%`` for 300 of 576."""
    exact = max(1, math.floor(share * visual_tokens + 0.5))
    for digits in range(4, 17):
        if resolve_keep(text := _percent(share, digits), visual_tokens) == exact:
            return text
    return str(exact)


def _percent(share: float, digits: int) -> str:
    return f"{share * 100:.{digits}g}%"


def _join(parts: Iterable[object]) -> str:
    return ", ".join(str(part) for part in parts)


def make_profile(
    geometry: Geometry,
    *,
    batch: int = 1,
    decode_batch: Size = "auto",
    images: int = 1,
    max_text: int = DEFAULT_TEXT,
    max_new_tokens: int = 128,
    dynamic_text: bool = False,
) -> Profile:
    """The profile for a model, checked against it; ``decode_batch`` ``auto`` is ``batch``. ``images`` are those of one prompt.

    Raises:
        ProfileError: a size below 1, or more positions than the model has.
    """
    profile = Profile(
        batch=batch,
        decode_batch=batch if decode_batch == "auto" else decode_batch,
        images=images,
        visual_tokens=images * geometry.visual_tokens,
        max_text=max_text,
        max_new_tokens=max_new_tokens,
        dynamic_text=dynamic_text,
    )
    profile.check(geometry)
    return profile


def name_variant(plan: Plan, suffix: str = "") -> str:
    """A name that says what was asked for: ``iwp-22`` for 22 %, ``iwp-k64`` for 64 tokens, ``iwp-50-22`` for two cuts.

    Where that is too long for a name it says how many cuts there are. ``suffix`` comes last.
    """
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
    name = (re.sub(r"[^A-Za-z0-9_-]", "_", "-".join(parts)) or FULL) + suffix
    return name if len(name) <= LONGEST_NAME else f"{plan.stages[0].selector}-{len(plan.stages)}-cuts{suffix}"


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
    images = f"--images {profile.images} " if profile.images > 1 else ""
    return (
        f"--batch {profile.batch} --decode-batch {profile.decode_batch} {images}--max-text {profile.max_text} "
        f"--max-new-tokens {profile.max_new_tokens}{' --dynamic-text' if profile.dynamic_text else ''}"
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
        if "_" in value:  # Python reads 1_00 as 100
            raise ValueError(value)
        return type(default)(value)
    except (KeyError, ValueError):
        expected = {bool: "true or false", int: "a whole number", float: "a number"}[type(default)]
        raise PlanError(f"selector {selector}: option {key}={value!r} must be {expected}, for example {key}={_write(default)}") from None


def _write(value: Option) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
