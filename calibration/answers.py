"""Answers as they come, appended to a file, so that what was interrupted goes on where it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sievert.calibration.json_lines import JsonLines
from sievert.calibration.questions import Asked

NAME: Final = "answers.jsonl"
_FORMAT: Final = 2


@dataclass(frozen=True)
class Said:
    """What a variant said: the text, the number of tokens, and whether it ended by itself (``stop``)."""

    text: str
    tokens: int
    finish: str


class Journal:
    """Every answer ever given in one folder, each with all that it depends on; those under ``settings`` can be looked up.

    An answer is found by what was asked and by the identity of the variant (a hash of what is run), not by its line in some data: lines
    may come, go and move, and accepted answers may be corrected. Made by one process at a time: hold the folder's lock. ``command`` is
    the one whose answers these are.

    Raises:
        InputError: the file is damaged, of another version, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], *, command: str = "eval") -> None:
        self._settings = dict(settings)
        self._said: dict[str, dict[Asked, Said]] = {}
        self._lines = JsonLines(folder / NAME, {f"sievert_{command}": _FORMAT}, command=command)
        for number, record in enumerate(self._lines.records):
            if not _is_answer(record):
                raise self._lines.damaged(number)
            if record["settings"] == self._settings:
                said = Said(record["text"], record["tokens"], record["finish"])
                self._said.setdefault(record["made"], {})[Asked(record["image"], record["prompt"])] = said

    def said(self, made: str) -> Mapping[Asked, Said]:
        """The answers of the variant with identity ``made``."""
        return self._said.get(made, {})

    def add(self, variant: str, made: str, answers: Sequence[tuple[Asked, Said]]) -> int:
        """Keep answers, and count those that are new. ``variant`` is for readers of the file.

        Raises:
            InputError: the folder cannot be written.
        """
        known = self._said.setdefault(made, {})
        new = {asked: said for asked, said in answers if asked not in known}
        marks = {"variant": variant, "made": made, "settings": self._settings}
        self._lines.append([{**marks, **asdict(asked), **asdict(said)} for asked, said in new.items()])
        known.update(new)
        return len(new)


def _is_answer(record: dict[str, Any]) -> bool:
    kinds = {"variant": str, "made": str, "settings": dict, "image": str, "prompt": str, "text": str, "tokens": int, "finish": str}
    return all(type(record.get(key)) is kind for key, kind in kinds.items())
