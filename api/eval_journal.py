"""Answers as they come, appended to a file, so that an interrupted evaluation goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import InputError

NAME: Final = "answers.jsonl"
_AGAIN: Final = "give another --out, or remove that folder to start again"


@dataclass(frozen=True)
class Said:
    """What a variant said to one line of the data: the text, the number of tokens, and whether it ended by itself (``stop``)."""

    line: int
    text: str
    tokens: int
    finish: str


class Journal:
    """The answers of one data file under one set of settings.

    The first line of the file says which; every other line is one answer and which variant and image it is of. ``variants`` gives the
    identity of each variant that is asked now, ``images`` that of each line's image. Made by one process at a time: hold the folder's lock.

    Raises:
        InputError: the folder holds answers to other data, under other settings, of a variant or image that has changed, or is damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], variants: Mapping[str, str], images: Mapping[int, str]) -> None:
        self._path = folder / NAME
        self._variants, self._images = variants, images
        self._said: dict[str, dict[int, Said]] = {name: {} for name in variants}
        text = self._read()
        header, *records = [self._parse(number, line) for number, line in enumerate(text.splitlines(), 1)] or [dict(settings)]
        if not text:
            self._append([header])
        for key, value in settings.items():
            if header.get(key) != value:
                raise InputError(_explain_setting(folder, key, header.get(key), value))
        for record in records:
            self._take(folder, record)

    def said(self, variant: str) -> Mapping[int, Said]:
        """The answers of a variant by line."""
        return self._said[variant]

    def add(self, variant: str, answers: Sequence[Said]) -> None:
        """Keep answers; those of lines that are answered already are dropped."""
        new = [said for said in answers if said.line not in self._said[variant]]
        marks = {"variant": variant, "made": self._variants[variant]}
        self._append([{**marks, "image": self._images[said.line], **asdict(said)} for said in new])
        self._said[variant].update((said.line, said) for said in new)

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

    def _take(self, folder: Path, record: dict[str, Any]) -> None:
        variant, line = record["variant"], record["line"]
        if variant not in self._variants:
            return
        if record["made"] != self._variants[variant]:
            raise InputError(f"the variant {variant!r} has changed since {folder} got its answers: {_AGAIN}")
        if record["image"] != self._images.get(line, record["image"]):
            raise InputError(f"the image of line {line} has changed since {folder} got its answers: {_AGAIN}")
        self._said[variant][line] = Said(line, record["text"], record["tokens"], record["finish"])

    def _append(self, records: Sequence[Mapping[str, Any]]) -> None:
        # One write, so that a kill leaves at most one unfinished line.
        text = "".join(json.dumps(record) + "\n" for record in records)
        with self._path.open("ab") as file:
            file.write(text.encode())


def _is_answer(record: dict[str, Any]) -> bool:
    kinds = {"variant": str, "made": str, "image": str, "line": int, "text": str, "tokens": int, "finish": str}
    return all(type(record.get(key)) is kind for key, kind in kinds.items())


def _explain_setting(folder: Path, key: str, then: Any, now: Any) -> str:
    if key == "data":
        return f"{folder} holds answers to another version of the data file: {_AGAIN}"
    if key == "sievert_eval":
        return f"{folder / NAME} was not written by this version of `sievert eval`: {_AGAIN}"
    return f"{folder} holds answers with {key}={then}, now it is {now}: {_AGAIN}"
