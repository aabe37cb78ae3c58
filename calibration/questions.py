"""The user's own images, prompts and accepted answers, one JSON object per line, all checked before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import ImageError, InputError, PromptError
from sievert.engines.run.prompt import Prompter

LINE: Final = '{"image": "photo.png", "prompt": "what is this?", "answer": "a cat"}'
_ENDS: Final = ".,;:!?…。！？，；：、"


@dataclass(frozen=True)
class Question:
    """One line. ``answers`` are all that count as right, none where the line gives none; ``image_sha256`` is of the file's bytes.

    ``image_name`` is how the line names the image.
    """

    line: int
    image: Path
    image_name: str
    prompt: str
    answers: tuple[str, ...]
    image_sha256: str


@dataclass(frozen=True)
class Questions:
    """A file of questions, and the SHA-256 of all its bytes."""

    path: Path
    sha256: str
    questions: tuple[Question, ...]


def normalise(text: str) -> str:
    """What answers are compared by: without surrounding space, without case, without punctuation at the end."""
    return text.strip().casefold().rstrip(_ENDS + " \t\r\n")


def read_questions(path: Path, *, limit: int = 0) -> Questions:
    """The first ``limit`` questions of a file (0: all). Images are paths relative to the file, or absolute ones.

    Raises:
        InputError: no such file, a line that is not like :data:`LINE`, or no lines at all; the message names the line.
        ImageError: an image that does not exist.
    """
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no file")
        data = path.read_bytes()
        lines = data.decode("utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}): give a file of lines {LINE}") from error
    questions: list[Question] = []
    hashes: dict[Path, str] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        image, prompt, answers = _read_line(f"{path}, line {number}", line)
        place = path.parent / image
        if place not in hashes:
            hashes[place] = _hash_image(f"{path}, line {number}", place)
        questions.append(Question(number, place, image, prompt, answers, hashes[place]))
        if len(questions) == limit:
            break
    if not questions:
        raise InputError(f"{path} has no lines: give at least one {LINE}")
    return Questions(path, hashlib.sha256(data).hexdigest(), tuple(questions))


def check_questions(questions: Questions, prompter: Prompter, *, template: bool, tell: Callable[[int], None]) -> None:
    """Bring every question to what the graphs take, so that none fails after hours. ``tell`` is given how many are done.

    Raises:
        ImageError, PromptError: an image or prompt the model cannot take; the message names the line.
    """
    for number, question in enumerate(questions.questions):
        tell(number)
        try:
            prompter.prepare([question.image], [question.prompt], template=template)
        except (ImageError, PromptError) as error:
            raise type(error)(f"{questions.path}, line {question.line}: {error}") from error


def _read_line(where: str, line: str) -> tuple[str, str, tuple[str, ...]]:
    try:
        entry: Any = json.loads(line)
        image, prompt = entry["image"], entry["prompt"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: {line[:80]!r} is not like {LINE}") from error
    if not isinstance(image, str) or not isinstance(prompt, str):
        raise InputError(f"{where}: image and prompt must be texts")
    if "://" in image:
        raise ImageError(f"{where}: image {image!r} is an address: download it and give the file's path")
    given = entry.get("answer")
    answers = [] if given is None else given if isinstance(given, list) else [given]
    if given is not None and (not answers or not all(isinstance(answer, str) and normalise(answer) for answer in answers)):
        raise InputError(f"{where}: answer must be a text or a list of texts, none of them empty; leave it out where there is none")
    try:
        "".join([image, prompt, *answers]).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character that needs two
        raise InputError(f"{where}: {error.object[error.start : error.end]!r} is no character") from error
    return image, prompt, tuple(answers)


def _hash_image(where: str, path: Path) -> str:
    try:
        if not path.is_file():
            raise ImageError(f"{where}: image {path} {'is not a file' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ImageError(f"{where}: image {str(path)!r} cannot be read ({error})") from error
