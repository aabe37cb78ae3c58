"""Sizes of a profile from prompts as they will be."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

from PIL import Image

from sievert.bundle.errors import InputError
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.engines.run.images import load_image
from sievert.engines.run.prompt import Pictures, Prompter
from sievert.engines.run.videos import Video
from sievert.progress import Size

STEP: Final = 16
"""``max_text`` of samples is rounded up to a multiple of this, in tokens: the next question is seldom of just their length."""


def count_text(
    folder: Path, geometry: Geometry, prompts: Sequence[str], *, images: int = 1, pictures: Sequence[Image.Image] = (), kind: str = ""
) -> int:
    """Tokens of the longest of ``prompts`` beside its visual ones, as the processor in ``folder`` makes them of a question.

    The chat template counts too; a model without one is given the prompt as it stands. Without ``pictures`` there are ``images``
    grey ones of the geometry's size, or a video's frames of it, two a second. ``kind`` is the processor's class, if not the one its
    files name.

    Raises:
        BundleError: there is no processor, or it cannot be loaded.
        ImageError, PromptError: a prompt or a picture that the model does not take.
    """
    number = len(pictures) or images
    profile = Profile(images=number, visual_tokens=number * geometry.visual_tokens, max_text=1, max_new_tokens=1)
    profile.check(geometry)
    grey = Image.new("RGB", (geometry.image_width, geometry.image_height), "grey")
    seen: Pictures = Video((grey,) * geometry.film.frames) if geometry.film else list(pictures) or [grey] * number
    prompter = Prompter(folder, geometry, profile, kind=kind)
    return max(prompter.count_text(seen, prompt) for prompt in prompts)


def leave_room(tokens: int) -> int:
    """The ``max_text`` for samples of up to ``tokens``: the next multiple of :data:`STEP`."""
    return -(-tokens // STEP) * STEP


def load_samples(paths: Sequence[str | Path], prompts: Sequence[str], *, max_text: Size, images: Size, frames: int) -> list[Image.Image]:
    """The sample pictures of one prompt.

    Raises:
        InputError: what they decide was also given as a number, or there is no prompt with them.
        ImageError: one that cannot be read.
    """
    check_samples(prompts, max_text)
    if paths and not prompts:
        raise InputError("--sample-image was given without --sample-prompt: give a question too, or --image-size FILE and --images N")
    if paths and images != "auto":
        raise InputError(f"--images {images} was given with --sample-image, whose number it is: leave out one or the other")
    if paths and frames:
        raise InputError("--sample-image was given with --frames: such prompts have a video; leave it out, and give --image-size FILE")
    return [load_image(path) for path in paths]


def check_samples(prompts: Sequence[str], max_text: Size) -> None:
    """Refuse a length that is given twice.

    Raises:
        InputError: both ``prompts`` and ``max_text``.
    """
    if prompts and max_text != "auto":
        raise InputError(f"--max-text {max_text} was given with --sample-prompt, which it is taken from: leave out one or the other")
