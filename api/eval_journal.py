"""Answers as they come, appended to a file, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import InputError
from sievert.calibration.questions import Asked

NAME: Final = "answers.jsonl"
_FORMAT: Final = 2
_HEADER: Final = {"sievert_eval": _FORMAT}
_AGAIN: Final = "give another --out, or remove that folder to start again"


@dataclass(frozen=True)
class Said:
    """What a variant said: the text, the number of tokens, and whether it ended by itself (``stop``)."""

    text: str
    tokens: int
    finish: str


class Journal:
    """Every answer ever given in one folder, each with all that it depends on; those under ``settings`` can be looked up.

    An answer is found by what was asked and by the identity of the variant (a hash of what is run), not by its line in some data: lines
    may come, go and move, and accepted answers may be corrected. Made by one process at a time: hold the folder's lock.

    Raises:
        InputError: the file is damaged, of another version, or cannot be written.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._path = folder / NAME
        self._settings = dict(settings)
        self._said: dict[str, dict[Asked, Said]] = {}
        with writing(folder):
            lines = self._read().splitlines()
            if not lines:
                self._append([_HEADER])
        for number, line in enumerate(lines, 1):
            record = self._parse(number, line)
            if number == 1 and record != _HEADER:
                raise InputError(f"{self._path} was not written by this version of `sievert eval`: {_AGAIN}")
            if number > 1 and record["settings"] == self._settings:
                said = Said(record["text"], record["tokens"], record["finish"])
                self._said.setdefault(record["made"], {})[Asked(record["image"], record["prompt"])] = said

    def said(self, made: str) -> Mapping[Asked, Said]:
        """The answers of the variant with identity ``made``."""
        return self._said.get(made, {})

    def add(self, variant: str, made: str, answers: Sequence[tuple[Asked, Said]]) -> int:
        """Keep answers, and count those that are new. ``variant`` is for readers of the file."""
        known = self._said.setdefault(made, {})
        new = {asked: said for asked, said in answers if asked not in known}
        marks = {"variant": variant, "made": made, "settings": self._settings}
        with writing(self._path.parent):
            self._append([{**marks, **asdict(asked), **asdict(said)} for asked, said in new.items()])
        known.update(new)
        return len(new)

    def _read(self) -> str:
        """The file's whole lines; a line that a kill left unfinished is cut off."""
        if not self._path.exists():
            return ""
        data = self._path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self._path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode("utf-8", errors="replace")

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or (number > 1 and not _is_answer(record)):
            raise InputError(f"{self._path}, line {number} is damaged: {_AGAIN}")
        return record

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        # One write, so that a kill leaves at most one unfinished line.
        text = "".join(json.dumps(record) + "\n" for record in records)
        with self._path.open("ab") as file:
            file.write(text.encode())


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Name the folder of the answers in what the system says while something is written there.

    Raises:
        InputError: it cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{folder} cannot be written ({error.strerror or error}): what was answered stays; give another --out") from error


def _is_answer(record: dict[str, Any]) -> bool:
    kinds = {"variant": str, "made": str, "settings": dict, "image": str, "prompt": str, "text": str, "tokens": int, "finish": str}
    return all(type(record.get(key)) is kind for key, kind in kinds.items())
