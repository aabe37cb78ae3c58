"""Which plans a search may choose from: lines of plans that differ in nothing but how much they keep."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Option, Plan, Stage, resolve_keep
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.graph_passes.groups import make_cuttings
from sievert.graph_passes.selectors import registry
from sievert.graph_passes.selectors.options import Range, list_values
from sievert.graph_passes.selectors.schedule import EMBEDDINGS, scale_layers

FLOORS: Final = ("random", "uniform")
"""Selectors to be beaten: tried only where they are named."""
LAYERS: Final = (0, 2, 4, 6, 10, 14)
"""Of a decoder of :data:`DEPTH` layers, to be scaled: up to the middle, behind which little is left to save."""
DEPTH: Final = 28
KEEPS: Final = ("4%", "6%", "8%", "11%", "16%", "22%", "28%", "35%", "42%", "50%", "60%", "75%")
_NOT_TUNED: Final = "seed"


@dataclass(frozen=True, eq=False)
class Line:
    """Plans of one selector before one layer, from the one that keeps least to the one that keeps most; or a paper's own cuts alone.

    ``options`` are those that differ from the selector's defaults.
    """

    selector: str
    layers: tuple[int, ...]
    options: Mapping[str, Option]
    plans: tuple[Plan, ...]

    @property
    def name(self) -> str:
        """In words, for people."""
        options = "".join(f" {key}={str(value).lower()}" for key, value in self.options.items())
        return f"{self.selector} before layer {', '.join(map(str, self.layers))}{options}"


@dataclass(frozen=True)
class Grid:
    """What the user allows: empty ``selectors`` are all but the floors, empty ``layers`` are :data:`LAYERS`, scaled.

    ``schedules``: also the cuts of the papers that cut several times.
    """

    selectors: tuple[str, ...] = ()
    layers: tuple[int, ...] = ()
    keeps: tuple[str, ...] = KEEPS
    schedules: bool = True


@dataclass(frozen=True)
class Lines:
    """The lines that can be made of this model, and why others cannot."""

    lines: tuple[Line, ...]
    refused: Mapping[str, str]


def make_lines(grid: Grid, geometry: Geometry, profile: Profile) -> Lines:
    """Every selector before every layer. Selectors that score the embeddings or the vision encoder cut before layer 0 only.

    Raises:
        PlanError: a selector that does not exist, a layer or keep that the model does not have, or a grid of which nothing can be made.
    """
    names = grid.selectors or tuple(name for name in registry.SELECTORS if name not in FLOORS)
    layers = _choose_layers(grid, geometry)
    keeps = _sort_keeps(grid.keeps, profile)
    lines: list[Line] = []
    refused: dict[str, str] = {}
    for name in dict.fromkeys(names):
        schedule = registry.find_schedule(name, {})
        places = layers if schedule != EMBEDDINGS else tuple(layer for layer in layers if layer == 0)
        if not places:
            refused[name] = f"{name} scores the embeddings or the vision encoder, and cuts before layer 0 only"
        for layer in places:
            try:
                lines.append(_make_line(name, layer, {}, keeps, geometry, profile))
            except PlanError as error:
                refused[f"{name} before layer {layer}"] = str(error)
        if schedule.shares and grid.schedules:
            try:
                lines.append(_schedule_line(name, geometry, profile))
            except PlanError as error:
                refused[f"{name}, the cuts of its paper"] = str(error)
    if not lines:
        reasons = "; ".join(dict.fromkeys(refused.values()))
        raise PlanError(f"nothing is left to search: {reasons}. Allow more selectors, layers or keeps")
    return Lines(tuple(lines), refused)


def vary_options(line: Line, keeps: Sequence[str], geometry: Geometry, profile: Profile) -> list[Line]:
    """Lines like ``line`` that differ in one option: every other choice, and half and twice each number, as far as its range allows."""
    found: list[Line] = []
    if len(line.layers) > 1:
        return found
    for key, value in _neighbours(line):
        defaults = registry.options(line.selector)
        options = {name: each for name, each in {**line.options, key: value}.items() if each != defaults[name]}
        try:
            found.append(_make_line(line.selector, line.layers[0], options, keeps, geometry, profile))
        except PlanError:  # an option this model cannot take
            continue
    return found


def cut_line(line: Line, place: int) -> Line | None:
    """Only the plans before ``place``; None where there are none."""
    return dataclasses.replace(line, plans=line.plans[:place]) if place and line.plans else None


def refine(line: Line, place: int, geometry: Geometry, profile: Profile, *, parts: int = 4) -> Line | None:
    """A line between the plan at ``place`` and the one before it, in about ``parts`` steps; None where no plan lies between."""
    if len(line.layers) > 1:
        return None
    most = line.plans[place].stages[0].keep
    least = line.plans[place - 1].stages[0].keep if place else 0
    keeps = sorted({least + round((most - least) * part / parts) for part in range(1, parts)} - {least, most})
    try:
        return _make_line(line.selector, line.layers[0], line.options, [str(keep) for keep in keeps], geometry, profile)
    except PlanError:  # whole rows, or nothing between
        return None


def _choose_layers(grid: Grid, geometry: Geometry) -> tuple[int, ...]:
    if not grid.layers:
        return tuple(sorted({scale_layers((layer,), DEPTH, geometry.depth)[0] if geometry.depth > 2 else 0 for layer in LAYERS}))
    for layer in grid.layers:
        if not 0 <= layer < geometry.depth:
            raise PlanError(f"layer={layer} but the decoder has {geometry.depth} layers: choose 0..{geometry.depth - 1}")
    return tuple(sorted(set(grid.layers)))


def _sort_keeps(keeps: Sequence[str], profile: Profile) -> tuple[str, ...]:
    """From the least to the most.

    Raises:
        PlanError: none, or one that is no share or count of this model's tokens.
    """
    if not keeps:
        raise PlanError("no keep is given: give shares (22%) or counts (64)")
    counted = {keep.strip(): resolve_keep(keep, profile.visual_tokens) for keep in keeps}
    return tuple(sorted(counted, key=lambda keep: counted[keep]))


def _make_line(
    selector: str, layer: int, options: Mapping[str, Option], keeps: Sequence[str], geometry: Geometry, profile: Profile
) -> Line:
    """All keeps that the selector can make; several that come to the same count are one plan.

    Raises:
        PlanError: it can make none.
    """
    plans: dict[int, Plan] = {}
    reason = PlanError(f"{selector} before layer {layer} would keep everything")
    for requested in keeps:
        try:
            keep = registry.make(selector, options).resolve_keep(requested, geometry, profile.images)
            plan = Plan(stages=(Stage(selector=selector, layer=layer, keep=keep, requested=requested, options=dict(options)),))
            plan.check(geometry, profile.images)
            make_cuttings(plan, profile, geometry)
        except PlanError as error:
            reason = error
            continue
        if keep < profile.visual_tokens:
            plans.setdefault(keep, plan)
    if not plans:
        raise reason
    return Line(selector, (layer,), options, tuple(plans[keep] for keep in sorted(plans)))


def _schedule_line(name: str, geometry: Geometry, profile: Profile) -> Line:
    """The cuts of the selector's paper, scaled to the model's depth.

    Raises:
        PlanError: the model cannot take them.
    """
    schedule = registry.find_schedule(name, {})
    layers = scale_layers(schedule.layers, schedule.depth, geometry.depth)
    stages = []
    for layer, share in zip(layers, schedule.shares, strict=True):
        keep = max(profile.images, math.floor(share * profile.visual_tokens + 0.5))
        stages.append(Stage(selector=name, layer=layer, keep=keep, requested=str(keep)))
    plan = Plan(stages=tuple(stages), positions="keep" if geometry.position_axes > 1 else schedule.positions)
    plan.check(geometry, profile.images)
    make_cuttings(plan, profile, geometry)
    return Line(name, layers, {}, (plan,))


def _neighbours(line: Line) -> Iterator[tuple[str, Option]]:
    for name, (value, allowed) in list_values(registry.make(line.selector, line.options)).items():
        if name != _NOT_TUNED:
            yield from ((name, other) for other in _other_values(value, allowed))


def _other_values(value: Option, allowed: Range) -> list[Option]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, str):
        return [choice for choice in allowed.choices if choice != value]
    near: list[Option] = [value // 2, value * 2] if isinstance(value, int) else [value / 2, value * 2]
    return [other for other in near if other != value and allowed.holds(other)]
