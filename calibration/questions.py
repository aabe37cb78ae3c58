"""The user's own images, prompts and accepted answers, one JSON object per line, all checked before anything runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import ImageError, InputError, PromptError
from sievert.bundle.names import FULL
from sievert.bundle.store import Bundle
from sievert.engines.run.prompt import Prompter

LINE: Final = '{"image": "photo.png", "prompt": "what is this?", "answer": "a cat"}'
"""One with several images has ``"images": ["one.png", "two.png"]`` in the place of ``"image"``."""
_ENDS: Final = ".,;:!?…。！？，；：、"


@dataclass(frozen=True)
class Asked:
    """What an answer is to: the SHA-256 of the image file's bytes (of several, that of their hashes in order), and the prompt."""

    image: str
    prompt: str


@dataclass(frozen=True)
class Question:
    """One line. ``answers`` are all that count as right, none where the line gives none; ``names`` are the images as the line names them,
    ``hashes`` the SHA-256 of their bytes.

    ``asked`` is what the model is given: lines that differ in nothing else are one question to it.
    """

    line: int
    images: tuple[Path, ...]
    names: tuple[str, ...]
    hashes: tuple[str, ...]
    prompt: str
    answers: tuple[str, ...]
    asked: Asked

    @property
    def image_name(self) -> str:
        """How the line names the image; several as JSON."""
        return self.names[0] if len(self.names) == 1 else json.dumps(self.names, ensure_ascii=False)


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
    """The first ``limit`` questions of a file (0: all). Their images are paths relative to the file, or absolute ones.

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
        images, prompt, answers = _read_line(f"{path}, line {number}", line)
        places = tuple(path.parent / image for image in images)
        for place in places:
            if place not in hashes:
                hashes[place] = _hash_image(f"{path}, line {number}", place)
        found = tuple(hashes[place] for place in places)
        questions.append(Question(number, places, tuple(images), found, prompt, answers, Asked(_join_hashes(found), prompt)))
        if len(questions) == limit:
            break
    if not questions:
        raise InputError(f"{path} has no lines: give at least one {LINE}")
    return Questions(path, hashlib.sha256(data).hexdigest(), tuple(questions))


def check_questions(questions: Questions, bundle: Bundle, variants: Sequence[str], *, template: bool, tell: Callable[[int], None]) -> None:
    """Bring every question to what the graphs of all ``variants`` take, so that none fails after hours. ``tell`` is given the number done.

    The variants take the same number of images per prompt.

    Raises:
        ImageError, PromptError: an image or prompt that the model, or a variant, cannot take; the message names the line and the variant.
    """
    geometry = bundle.manifest.geometry
    # All the text the model has positions for: it is said below which variant has less room.
    roomy = bundle.variant(variants[0]).profile.model_copy(update={"batch": 1, "max_text": geometry.max_positions})
    prompter = Prompter(bundle.path, geometry, roomy)
    for number, question in enumerate(questions.questions):
        tell(number)
        try:
            batch = prompter.prepare([question.images], [question.prompt], template=template)
            words = batch.lengths[0] - roomy.visual_tokens
            _check_variants(bundle, variants, words, asks=batch.without_question() is None)
        except (ImageError, PromptError) as error:
            raise type(error)(f"{questions.path}, line {question.line}: {error}") from error


def _check_variants(bundle: Bundle, variants: Sequence[str], words: int, *, asks: bool) -> None:
    """Refuse a prompt of ``words`` text tokens that one of the variants cannot take; ``asks``: there is text after the image.

    Raises:
        PromptError: names the variant that takes least, and those that take the prompt.
    """
    room = {name: bundle.variant(name).profile.max_text for name in variants}
    silent = [name for name in variants if not asks and bundle.variant(name).reads_question]
    able = [name for name in variants if words <= room[name] and name not in silent]
    if words > min(room.values()):
        least = min(room, key=lambda name: room[name])
        raise PromptError(
            f"the prompt has {words} text tokens, template included, but the variant {least!r} takes {room[least]}: shorten it, "
            f"{_ask_others(able)}or make variants with a larger --max-text"
        )
    if silent:
        raise PromptError(
            f"the prompt has no text after the image, but the variant {silent[0]!r} keeps the tokens that such text asks for: "
            f"{_ask_others(able)}or write the question after the image"
        )


def _ask_others(able: Sequence[str]) -> str:
    """How to leave out those variants that are not able to answer, if that can be done: ``full`` always answers."""
    if FULL not in able:
        return ""
    return f"ask only those that take it ({' '.join(f'--variant {name}' for name in able if name != FULL) or f'--variant {FULL}'}), "


def read_entry(where: str, line: str, like: str) -> tuple[dict[str, Any], list[str], str]:
    """A line's object, the images it names (``image``, or ``images`` in their order) and its prompt.

    Raises:
        InputError: not such an object; the message says ``where``, and what it should be ``like``.
    """
    try:
        entry: Any = json.loads(line)
        prompt, images = entry["prompt"], entry["images"] if "images" in entry else [entry["image"]]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{where}: {line[:80]!r} is not like {like}") from error
    if "image" in entry and "images" in entry:
        raise InputError(f"{where}: it has both image and images: give one of them")
    if not isinstance(images, list) or not images or not all(isinstance(each, str) for each in (*images, prompt)):
        raise InputError(f"{where}: image and prompt must be texts, images a list of texts")
    return entry, images, prompt


def _read_line(where: str, line: str) -> tuple[list[str], str, tuple[str, ...]]:
    entry, images, prompt = read_entry(where, line, LINE)
    for image in images:
        if "://" in image:
            raise ImageError(f"{where}: image {image!r} is an address: download it and give the file's path")
    given = entry.get("answer")
    answers = [] if given is None else given if isinstance(given, list) else [given]
    if given is not None and (not answers or not all(isinstance(answer, str) and normalise(answer) for answer in answers)):
        raise InputError(
            f"{where}: answer must be a text or a list of texts, none of them empty, but it is {json.dumps(given)[:80]}: write it like "
            '"answer": "3", and leave it out where there is none'
        )
    try:
        "".join([*images, prompt, *answers]).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a character that needs two
        raise InputError(f"{where}: {error.object[error.start : error.end]!r} is no character") from error
    return images, prompt, tuple(answers)


def _join_hashes(hashes: Sequence[str]) -> str:
    return hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()


def _hash_image(where: str, path: Path) -> str:
    try:
        if not path.is_file():
            raise ImageError(f"{where}: image {path} {'is not a file' if path.exists() else 'does not exist'}")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except (OSError, ValueError) as error:
        raise ImageError(f"{where}: image {str(path)!r} cannot be read ({error})") from error
