"""What a model is calibrated on: the user's images and prompts, or random ones that say so."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

from sievert.bundle.errors import CalibrationError
from sievert.calibration.questions import Questions, read_questions
from sievert.calibration.record import SampleInfo
from sievert.engines.run.prompt import Prompter, load_processor
from sievert.parity.samples import synthetic_samples

SEED: Final = 0


@dataclass(frozen=True)
class Material:
    """Samples with each one's images. ``source`` is the data file, None for random samples; ``template``: prompts get the chat template."""

    samples: tuple[SampleInfo, ...]
    images: tuple[tuple[Path | Image.Image, ...], ...]
    source: Path | None
    template: bool

    @property
    def random(self) -> bool:
        """Whether they mean nothing."""
        return self.source is None

    def name(self, number: int) -> str:
        """A sample in words, for errors."""
        if self.source is None:
            return f"random sample {number + 1}"
        return f"{self.source}, line {self.samples[number].line}"


def find_data(data: str | Path) -> Path:
    """The file of lines: ``data`` itself, or the only ``.jsonl`` in that folder.

    Raises:
        CalibrationError: a folder with none or several.
    """
    path = Path(data).expanduser()
    if not path.is_dir():
        return path
    found = sorted(each for each in path.iterdir() if each.suffix == ".jsonl" and each.is_file())
    if len(found) != 1:
        names = ", ".join(each.name for each in found) or "none"
        raise CalibrationError(
            f'{path} must hold, beside its images, one .jsonl file of lines {{"image": "photo.png", "prompt": "what is this?"}}; it has: '
            f"{names}"
        )
    return found[0]


def use_questions(questions: Questions, *, template: bool) -> Material:
    """The user's own questions; their accepted answers are not needed."""
    samples = [
        SampleInfo(line=question.line, images=question.names, images_sha256=question.hashes, prompt=question.prompt)
        for question in questions.questions
    ]
    return Material(tuple(samples), tuple(question.images for question in questions.questions), questions.path, template)


def make_random(prompter: Prompter, folder: Path, count: int) -> Material:
    """Random pixels and words of the model's vocabulary, the same for the same model; they prove nothing about a model in use."""
    template = load_processor(folder).chat_template is not None
    made = synthetic_samples(prompter, count, template=template, seed=SEED)
    samples = []
    for number, sample in enumerate(made):
        names = tuple(f"random {number}.{place}" for place in range(len(sample.images)))
        hashes = tuple(hashlib.sha256(image.tobytes()).hexdigest() for image in sample.images)
        samples.append(SampleInfo(line=0, images=names, images_sha256=hashes, prompt=sample.prompt))
    return Material(tuple(samples), tuple(sample.images for sample in made), None, template)


def require_unchanged(questions: Questions) -> None:
    """Read the data again after it was used.

    Raises:
        CalibrationError: it, or an image, is not what it was.
    """
    if read_questions(questions.path, limit=len(questions.questions)) != questions:
        raise CalibrationError(f"{questions.path} or its images were changed while they were collected: nothing was kept, collect again")
