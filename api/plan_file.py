"""Pruning plans as small YAML files, read with every mistake named, and written so that they read back.

::

    positions: keep
    stages:
      - {selector: iwp, layer: 4, keep: 50%}
      - {selector: iwp, layer: 8, keep: 22%, options: {strength: 4}}
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Option, Plan
from sievert.planning import Cut, Positions

LARGEST: Final = 64 * 1024
"""Bytes of a plan file; a plan of a hundred cuts has a tenth of that."""

_EXAMPLE: Final = "stages: [{selector: iwp, layer: 4, keep: 22%}]"
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
    values = _load(path)
    if not isinstance(values, dict):
        raise PlanError(f"{path} holds no plan: write it like {_EXAMPLE}")
    _refuse_unknown(str(path), values, _KEYS)
    positions, stages = values.get("positions", "auto"), values.get("stages")
    if positions not in ("auto", "keep", "compact"):
        raise PlanError(f"{path}, key 'positions': {_shorten(positions)} must be keep or compact")
    if not isinstance(stages, list):
        raise PlanError(f"{path}, key 'stages': expected a list of cuts like {_EXAMPLE}")
    return tuple(_read_stage(f"{path}, stage {number}", stage) for number, stage in enumerate(stages, 1)), positions


def _read_stage(where: str, stage: Any) -> Cut:
    if not isinstance(stage, dict):
        raise PlanError(f"{where}: {_shorten(stage)} is no cut: write it like {_EXAMPLE}")
    _refuse_unknown(where, stage, _STAGE_KEYS)
    if not isinstance(selector := stage.get("selector"), str):
        raise PlanError(f"{where}, key 'selector': {'is missing' if selector is None else _shorten(selector)}: name one of `sievert list`")
    layer, keep, options = stage.get("layer", "auto"), stage.get("keep", "auto"), stage.get("options", {})
    if layer != "auto" and type(layer) is not int:
        raise PlanError(f"{where}, key 'layer': {_shorten(layer)} must be a whole number or auto")
    if type(keep) not in (str, int, float):
        raise PlanError(f"{where}, key 'keep': {_shorten(keep)} must be a share (22%), a count (64) or auto")
    return Cut(keep=str(keep), layer=layer, selector=selector, options=_read_options(where, options), source=where)


def _read_options(where: str, options: Any) -> dict[str, Option]:
    if not isinstance(options, dict):
        raise PlanError(f"{where}, key 'options': {_shorten(options)} must be like {{strength: 4}}")
    for key, value in options.items():
        if type(key) is not str or type(value) not in (bool, int, float, str):
            raise PlanError(f"{where}, key 'options': {_shorten({key: value})} must be a name with a number, a text, true or false")
    return options


def _refuse_unknown(where: str, values: dict[Any, Any], known: Sequence[str]) -> None:
    for key in values:
        if key not in known:
            raise PlanError(f"{where}: unknown key {_shorten(key)}: choose from {', '.join(known)}")


def _load(path: Path) -> Any:
    """The values of a small YAML file."""
    import yaml

    try:
        if path.exists() and not path.is_file():
            raise PlanError(f"the plan {path} is no file: give a YAML file like {_EXAMPLE}")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise PlanError(f"the plan {path} has more than {LARGEST} bytes: a plan is a short list like {_EXAMPLE}")
        text = data.decode("utf-8")
        # An alias may stand for a thousand copies of what it names, and a key given twice hides one of the two.
        _refuse_tricks(path, yaml.compose(text, Loader=yaml.SafeLoader))
        return yaml.safe_load(text)
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read ({error.strerror or error}): give a YAML file like {_EXAMPLE}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan {path} is no readable YAML ({' '.join(str(error).split())}): write it like {_EXAMPLE}") from error


def _refuse_tricks(path: Path, root: Any) -> None:
    """Refuse a YAML tree with aliases or repeated keys.

    Raises:
        PlanError: names the line.
    """
    import yaml

    seen: set[int] = set()
    waiting = [] if root is None else [root]
    while waiting:
        node = waiting.pop()
        where = f"the plan {path}, line {node.start_mark.line + 1}"
        if id(node) in seen:
            raise PlanError(f"{where}: an alias repeats this part: write it out")
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            keys = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            if repeated := [key for key, count in keys.items() if count > 1]:
                raise PlanError(f"{where}: the key {_shorten(repeated[0])} is given twice")
            waiting += [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            waiting += node.value


def _shorten(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
