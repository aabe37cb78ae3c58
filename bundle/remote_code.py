"""Python code that a checkpoint brings along: found in its files, and run inside :func:`trust_remote_code` only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Final

FILES: Final = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
)
"""Those in which transformers looks for classes to import."""
_KEY: Final = "auto_map"
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)


@contextmanager
def trust_remote_code() -> Iterator[None]:
    """Let checkpoints and bundles run code of their own while the block lasts, in this thread."""
    token = _trusted.set(True)
    try:
        yield
    finally:
        _trusted.reset(token)


def is_trusted() -> bool:
    """Whether such a block is entered."""
    return _trusted.get()


def list_classes(content: Any) -> list[str]:
    """What a configuration wants imported, as ``module.Class``, at any depth: a processor's file holds those of its parts.

    Whatever else stands where this should is named too, so that it is not overlooked.
    """
    if isinstance(content, list):
        return [name for part in content for name in list_classes(part)]
    if not isinstance(content, dict):
        return []
    found = [str(name) for name in _flatten(content[_KEY])] if _KEY in content else []
    return found + [name for key, part in content.items() if key != _KEY for name in list_classes(part)]


def find_remote_code(folder: Path) -> dict[str, list[str]]:
    """The files of a folder that want something imported, and what. Files that cannot be read want nothing: nobody can load them."""
    found = {}
    for name in FILES:
        try:
            classes = list_classes(json.loads((folder / name).read_text(encoding="utf-8")))
        except (OSError, ValueError, RecursionError):
            continue
        if classes:
            found[name] = classes
    return found


def _flatten(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _flatten(part)
    elif value is not None:
        yield value
