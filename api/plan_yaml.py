"""Small YAML files as plain values, by the core rules of YAML 1.2: ``on`` is a text, ``010`` is ten, and nothing stands for something else.

The YAML 1.1 of most loaders reads ``on`` as true, ``010`` as 8, ``1:30`` as 90 and ``1_00`` as 100: in a plan each is another cut.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import yaml

from sievert.bundle.errors import PlanError

LARGEST: Final = 64 * 1024
"""Bytes of a plan file; a plan of a hundred cuts has a tenth of that."""
EXAMPLE: Final = "stages: [{selector: iwp, layer: 4, keep: 22%}]"

_WORDS: Final = {
    **dict.fromkeys(("", "~", "null", "Null", "NULL")),
    **dict.fromkeys(("true", "True", "TRUE"), True),
    **dict.fromkeys(("false", "False", "FALSE"), False),
}
_INTEGER: Final = re.compile(r"[-+]?[0-9]+")
_FLOAT: Final = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")


def load_file(path: Path) -> Any:
    """The values of a small file: mappings, lists, texts, decimal numbers, true, false and null.

    Raises:
        PlanError: it cannot be read, is too large or no YAML, or uses tags, aliases or repeated keys; the message names the file.
    """
    try:
        if path.exists() and not path.is_file():
            raise PlanError(f"the plan {path} is no file: give a YAML file like {EXAMPLE}")
        with path.open("rb") as file:
            data = file.read(LARGEST + 1)
        if len(data) > LARGEST:
            raise PlanError(f"the plan {path} has more than {LARGEST} bytes: a plan is a short list like {EXAMPLE}")
        text = data.decode("utf-8")
        _refuse_tricks(path, text)
        root = yaml.compose(text, Loader=yaml.BaseLoader)
        return None if root is None else _read_node(path, root)
    except OSError as error:
        raise PlanError(f"the plan {path} cannot be read ({error.strerror or error}): give a YAML file like {EXAMPLE}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise PlanError(f"the plan {path} is no readable YAML ({' '.join(str(error).split())}): write it like {EXAMPLE}") from error


def shorten(value: object) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _refuse_tricks(path: Path, text: str) -> None:
    """An alias may stand for a thousand copies of what it names, and a tag may make anything of what follows."""
    for event in yaml.parse(text, Loader=yaml.BaseLoader):
        where = f"the plan {path}, line {event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent):
            raise PlanError(f"{where}: an alias repeats another part: write it out")
        if (tag := getattr(event, "tag", None)) is not None:
            raise PlanError(f"{where}: the tag {shorten(tag)} is not read: a plan holds plain values like {EXAMPLE}")


def _read_node(path: Path, node: Any) -> Any:
    where = f"the plan {path}, line {node.start_mark.line + 1}"
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(path, part) for part in node.value]
    if isinstance(node, yaml.ScalarNode):
        return node.value if node.style else _read_plain(node.value)
    values: dict[Any, Any] = {}
    for name, part in node.value:
        if not isinstance(name, yaml.ScalarNode):
            raise PlanError(f"{where}: a key must be a name")
        key = _read_node(path, name)
        if key in values:
            raise PlanError(f"{where}: the key {shorten(key)} is given twice")
        values[key] = _read_node(path, part)
    return values


def _read_plain(text: str) -> bool | int | float | str | None:
    """What a text without quotes means."""
    if text in _WORDS:
        return _WORDS[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text
