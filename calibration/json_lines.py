"""A file of JSON objects that only grows, so that long work goes on where it was interrupted."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sievert.bundle.errors import InputError

AGAIN = "give another --out, or remove that folder to start again"


class JsonLines:
    """One object per line after a header that names the format; a kill costs at most the line it left unfinished.

    Made by one process at a time: hold the folder's lock. ``command`` is the one that writes such files, for messages.

    Raises:
        InputError: the file is damaged, of another version, or cannot be written.
    """

    def __init__(self, path: Path, header: Mapping[str, Any], *, command: str) -> None:
        self.path = path
        with writing(path.parent):
            lines = self._read().splitlines()
            if not lines:
                self.append([header])
        self.records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            record = self._parse(number, line)
            if number > 1:
                self.records.append(record)
            elif record != header:
                raise InputError(f"{path} was not written by this version of `sievert {command}`: {AGAIN}")

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Add lines in one write.

        Raises:
            InputError: the folder cannot be written.
        """
        text = "".join(json.dumps(record) + "\n" for record in records)
        with writing(self.path.parent), self.path.open("ab") as file:
            file.write(text.encode())

    def damaged(self, number: int) -> InputError:
        """The error about record ``number``, counted from 0, that is not what its format says."""
        return InputError(f"{self.path}, line {number + 2} is damaged: {AGAIN}")

    def _read(self) -> str:
        """The file's whole lines; a line that a kill left unfinished is cut off."""
        if not self.path.exists():
            return ""
        data = self.path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            with self.path.open("r+b") as file:
                file.truncate(len(whole))
        return whole.decode("utf-8", errors="replace")

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise self.damaged(number - 2)
        return record


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
