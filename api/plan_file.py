"""Pruning plans as small YAML files, read with every mistake named, and written so that they read back.

::

    positions: keep
    stages:
      - {selector: iwp, layer: 4, keep: 50%}
      - {selector: iwp, layer: 8, keep: 22%, options: {strength: 4}}
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import PlanError
from sievert.bundle.names import FULL
from sievert.bundle.plan import Option, Plan
from sievert.plan_yaml import EXAMPLE, load_file, shorten
from sievert.planning import Cut, Positions

_KEYS: Final = ("positions", "stages")
_STAGE_KEYS: Final = ("selector", "layer", "keep", "options")


def choose_cuts(cuts: Sequence[Cut], positions: Positions, plan: str | Path | Plan) -> tuple[tuple[Cut, ...], Positions]:
    """What is asked for: ``cuts`` and ``positions``, or in their place a plan or the file of one (empty: none).

    Raises:
        PlanError: both were given, or the file is no plan.
    """
    given: tuple[tuple[Cut, ...], Positions]
    if isinstance(plan, Plan):
        given = describe_cuts(plan), plan.positions
    elif str(plan):
        given = read_plan(Path(plan))
    else:
        return tuple(cuts), positions
    if tuple(cuts) != (Cut(),) or positions != "auto":
        raise PlanError("a plan was given together with cuts or positions: give one or the other")
    return given


def describe_cuts(plan: Plan) -> tuple[Cut, ...]:
    """The cuts that make ``plan`` again."""
    return tuple(Cut(keep=stage.requested, layer=stage.layer, selector=stage.selector, options=stage.options) for stage in plan.stages)


def write_plan(plan: Plan) -> str:
    """``plan`` as YAML that :func:`read_plan` and ``--plan`` read back."""
    import yaml

    stages: list[dict[str, Any]] = []
    for stage in plan.stages:
        keep = int(stage.requested) if stage.requested.isdecimal() else stage.requested
        stages.append({"selector": stage.selector, "layer": stage.layer, "keep": keep})
        if stage.options:
            stages[-1]["options"] = dict(stage.options)
    text: str = yaml.safe_dump({"positions": plan.positions, "stages": stages}, sort_keys=False)
    return text


def read_plan(path: Path) -> tuple[tuple[Cut, ...], Positions]:
    """The cuts and positions of a plan file. ``layer`` and ``keep`` that are missing or ``auto`` are the selector's own.

    Raises:
        PlanError: the file cannot be read or is no plan; the message names the file, the stage and the key.
    """
    values = load_file(path)
    if not isinstance(values, dict):
        raise PlanError(f"{path} holds no plan: write it like {EXAMPLE}")
    _refuse_unknown(str(path), values, _KEYS)
    positions, stages = values.get("positions", "auto"), values.get("stages")
    if positions not in ("auto", "keep", "compact"):
        raise PlanError(f"{path}, key 'positions': {shorten(positions)} must be keep or compact")
    if not isinstance(stages, list):
        raise PlanError(f"{path}, key 'stages': expected a list of cuts like {EXAMPLE}")
    if not stages:
        raise PlanError(
            f"{path}, key 'stages': no cut is listed, so nothing would be pruned: write one like {EXAMPLE}; the unpruned variant is "
            f"{FULL!r}, which every bundle has"
        )
    return tuple(_read_stage(f"{path}, stage {number}", stage) for number, stage in enumerate(stages, 1)), positions


def _read_stage(where: str, stage: Any) -> Cut:
    if not isinstance(stage, dict):
        raise PlanError(f"{where}: {shorten(stage)} is no cut: write it like {EXAMPLE}")
    _refuse_unknown(where, stage, _STAGE_KEYS)
    if not isinstance(selector := stage.get("selector"), str):
        raise PlanError(f"{where}, key 'selector': {'is missing' if selector is None else shorten(selector)}: name one of `sievert list`")
    layer, keep, options = stage.get("layer", "auto"), stage.get("keep", "auto"), stage.get("options", {})
    if layer != "auto" and type(layer) is not int:
        raise PlanError(f"{where}, key 'layer': {shorten(layer)} must be a whole number or auto")
    if type(keep) not in (str, int, float):
        raise PlanError(f"{where}, key 'keep': {shorten(keep)} must be a share (22%), a count (64) or auto")
    return Cut(keep=str(keep), layer=layer, selector=selector, options=_read_options(where, options), source=where)


def _read_options(where: str, options: Any) -> dict[str, Option]:
    if not isinstance(options, dict):
        raise PlanError(f"{where}, key 'options': {shorten(options)} must be like {{strength: 4}}")
    for key, value in options.items():
        if type(key) is not str or type(value) not in (bool, int, float, str):
            raise PlanError(f"{where}, key 'options': {shorten({key: value})} must be a name with a number, a text, true or false")
    return options


def _refuse_unknown(where: str, values: dict[Any, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise PlanError(f"{where}: unknown key {shorten(key)}: choose from {', '.join(known)}")
