"""What the models are compared on: the user's pictures and questions, or made-up ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from sievert.bundle.errors import InputError, PromptError
from sievert.engines.run.prompt import Prompter
from sievert.engines.run.videos import Video

COLOURS = ("red", "green", "blue", "yellow", "white", "black", "purple", "orange")


@dataclass(frozen=True)
class Sample:
    """A picture, or a prompt's pictures in their order, or a video; and a question, without the template the model's whole input."""

    image: Image.Image | tuple[Image.Image, ...] | Video
    prompt: str

    @property
    def images(self) -> tuple[Image.Image, ...]:
        """The pictures, also where there is one; a video's frames."""
        if isinstance(self.image, Video):
            return self.image.frames
        return self.image if isinstance(self.image, tuple) else (self.image,)


def synthetic_samples(prompter: Prompter, count: int, *, template: bool, seed: int = 0) -> tuple[Sample, ...]:
    """Deterministic pictures (shapes over smooth noise) with words of the model's own vocabulary, of many lengths up to the longest.

    ``template``: they will be put into the model's chat template, which takes room. Such questions mean nothing; numerics do not
    need them to. What pruning keeps on them says nothing about accuracy.

    Raises:
        InputError: not even one word fits the variant's maximum text.
    """
    words = _words(prompter)
    samples = []
    for number in range(count):
        rng = np.random.default_rng((seed, number))
        film = prompter.geometry.film
        many = prompter.profile.images if film is None else film.frames
        pictures = tuple(_picture(rng, prompter.geometry.image_width, prompter.geometry.image_height) for _ in range(many))
        image = pictures if film is None else Video(pictures)
        length = int(rng.integers(1, prompter.profile.max_text + 1))
        question = [words[int(place)] for place in rng.integers(0, len(words), length)]
        samples.append(Sample(image, _fitting_prompt(prompter, image, question, template)))
    return tuple(samples)


def _words(prompter: Prompter) -> list[str]:
    """Whole words among the tokens, in the order of their ids."""
    tokenizer = prompter.tokenizer
    special = set(tokenizer.all_special_tokens)
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: int(item[1]))
    words = [token.lstrip("\u2581\u0120") for token, _ in tokens if token not in special]  # what marks a space before a word
    plain = [word for word in words if word.isascii() and word.isalnum() and word.islower()]
    if not plain:
        raise InputError("the tokenizer has no plain words to make questions of: give images and prompts of your own")
    return plain[:20_000]


def _fitting_prompt(prompter: Prompter, image: tuple[Image.Image, ...] | Video, words: list[str], template: bool) -> str:
    """The longest beginning of ``words`` that the variant takes, halving."""
    while words:
        prompt = " ".join(words)
        try:
            prompter.prepare([image], [prompt], template=template)
        except PromptError:
            words = words[: len(words) // 2]
            continue
        return prompt
    raise InputError(f"no question fits max_text={prompter.profile.max_text}: make a variant with a larger --max-text")


def _picture(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth noise with a few shapes and a little grain."""
    coarse = rng.integers(0, 256, (6, 6, 3)).astype(np.uint8)
    image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(rng.integers(2, 7))):
        x, y = rng.integers(0, width), rng.integers(0, height)
        side = int(rng.integers(max(2, width // 12), max(3, width // 3)))
        box = (int(x), int(y), int(x) + side, int(y) + side)
        shape = draw.ellipse if rng.integers(2) else draw.rectangle
        shape(box, fill=COLOURS[int(rng.integers(len(COLOURS)))])
    grain = rng.normal(0, 6, (height, width, 3))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.5)), np.float64) + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
