"""Ask a variant about an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from sievert.bundle.errors import InputError, ProfileError, VariantError
from sievert.bundle.names import FULL
from sievert.bundle.plan import Plan
from sievert.bundle.specs import Geometry
from sievert.bundle.store import Bundle
from sievert.drawing import from_pixels
from sievert.engines.run.dtypes import Array
from sievert.engines.run.generate import Finish, stream
from sievert.engines.run.pipeline import Features, Pipeline, PrefillResult
from sievert.engines.run.prompt import Pictures, PromptBatch, Prompter, load_processor
from sievert.engines.run.registry import find_runtime
from sievert.engines.run.sampling import Sampling
from sievert.progress import Progress, Size, silent

OnText = Callable[[int, str], None]
"""Called with the number of the prompt and the text that became certain; an empty text says that the answer is complete."""


@dataclass(frozen=True)
class Answer:
    """What was said to one prompt.

    ``finish`` is ``stop`` or ``length``. ``kept[s]`` are the numbers of the patches left after stage s, in the grid, row by row, on from
    image to image (see :func:`number_patches`); ``seconds`` is the time to the first token and to the last.
    """

    prompt: str
    text: str
    tokens: tuple[int, ...]
    finish: Finish
    kept: tuple[tuple[int, ...], ...]
    seconds: tuple[float, float]


@dataclass(frozen=True)
class Answers:
    """All answers about the same images. ``pictures`` are what the vision encoder saw; ``vision_seconds`` what looking took."""

    variant: str
    engine: str
    plan: Plan
    visual_tokens: int
    grid: tuple[int, int] | None
    pictures: tuple[Image.Image, ...]
    vision_seconds: float
    answers: tuple[Answer, ...]


def run(
    bundle: str | Path,
    image: Pictures,
    prompts: Sequence[str],
    *,
    variant: str = "",
    engine: str = "onnxruntime",
    low_memory: bool = False,
    max_new_tokens: Size = "auto",
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    template: bool = True,
    on_text: OnText = lambda _, __: None,
    progress: Progress = silent,
) -> Answers:
    """Answer prompts about one image, or a list of as many as the variant takes per prompt, or a video
    (:func:`sievert.engines.run.videos.load_video`); their features are computed once.

    An empty ``variant`` means the only pruned one, or ``full`` where there is none. ``max_new_tokens`` ``auto`` is what the variant
    has room for. Without ``template`` a prompt is the model's whole input, with an image token where each image belongs (in front, if it
    has none). ``temperature`` 0 takes the likeliest token. ``low_memory``: see :func:`~sievert.engines.run.registry.find_runtime`.

    Raises:
        ImageError, PromptError, ProfileError, InputError: what was given cannot be used.
        VariantError: no such variant, or it has no such engine.
        EngineUnavailableError: the engine cannot run on this machine.
        BundleError: the bundle is not what its manifest says.
    """
    if not prompts:
        raise InputError("no prompt was given: ask at least one question")
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    opened = Bundle.open(bundle)
    name = variant or choose_variant(opened)
    profile = opened.variant(name).profile
    prompter = Prompter(opened.path, opened.manifest.geometry, profile)
    batches = [
        prompter.prepare([image], prompts[start : start + profile.batch], template=template)
        for start in range(0, len(prompts), profile.batch)
    ]
    limit = profile.max_new_tokens if max_new_tokens == "auto" else max_new_tokens
    progress("loading the engine")
    with Watched(opened, name, find_runtime(engine, low_memory=low_memory)) as pipeline:
        progress("looking at the image" if profile.images == 1 else "looking at the images")
        start = time.perf_counter()
        features = pipeline.encode(batches[0].pixel_values)
        looked = time.perf_counter() - start
        progress("")
        answers: list[Answer] = []
        for batch in batches:
            answers += answer_batch(pipeline, prompter, batch, features, prompts, len(answers), limit, sampling, on_text)
    return Answers(
        variant=name,
        engine=engine,
        plan=opened.variant(name).plan,
        visual_tokens=profile.visual_tokens,
        grid=opened.manifest.geometry.grid,
        pictures=show_pictures(opened.path, opened.manifest.geometry, batches[0]),
        vision_seconds=looked,
        answers=tuple(answers),
    )


def choose_variant(bundle: Bundle) -> str:
    """The variant meant where none is named: the only pruned one, or ``full`` where none is pruned.

    Raises:
        VariantError: there are several to choose from, or none at all.
    """
    names = sorted(bundle.manifest.variants)
    pruned = [name for name in names if bundle.manifest.variants[name].plan.stages]
    if len(pruned) > 1:
        raise VariantError(f"the bundle has several pruned variants: choose one with --variant ({', '.join(names)})")
    chosen = pruned[0] if pruned else FULL
    bundle.variant(chosen)
    return chosen


def choose_limit(bundle: Bundle, variants: Sequence[str], asked: Size) -> int:
    """How many tokens all of ``variants`` may write: ``asked``, or what they all have room for.

    Raises:
        ProfileError: one of them has less room.
    """
    room = {name: bundle.variant(name).profile.max_new_tokens for name in variants}
    name = min(room, key=lambda each: room[each])
    if asked != "auto" and not 1 <= asked <= room[name]:
        raise ProfileError(
            f"max_new_tokens={asked}, but the caches of {name!r} hold 1..{room[name]}: ask for fewer, leave that variant out, or make one "
            "with a larger --max-new-tokens"
        )
    return room[name] if asked == "auto" else asked


class Watched(Pipeline):
    """A pipeline that remembers what its last prefill kept."""

    last: PrefillResult | None = None

    def prefill(self, batch: PromptBatch, features: Features) -> PrefillResult:
        """As :class:`Pipeline` does."""
        self.last = super().prefill(batch, features)
        return self.last


def answer_batch(
    pipeline: Watched,
    prompter: Prompter,
    batch: PromptBatch,
    features: Features,
    prompts: Sequence[str],
    first: int,
    limit: int,
    sampling: Sampling,
    on_text: OnText,
) -> list[Answer]:
    """Answers to the prompts of one batch, the first of which is number ``first``."""
    start = time.perf_counter()
    texts, tokens = [""] * batch.rows, [list[int]() for _ in range(batch.rows)]
    finishes: list[Finish] = ["length"] * batch.rows
    begun, ended = [0.0] * batch.rows, [0.0] * batch.rows
    for piece in stream(pipeline, prompter.tokenizer, batch, max_new_tokens=limit, features=features, sampling=sampling):
        ended[piece.row] = time.perf_counter() - start
        begun[piece.row] = begun[piece.row] or ended[piece.row]
        texts[piece.row] += piece.text
        tokens[piece.row].append(piece.token)
        if piece.text:
            on_text(first + piece.row, piece.text)
        if piece.finish is not None:
            finishes[piece.row] = piece.finish
            on_text(first + piece.row, "")
    kept = pipeline.last.kept_index if pipeline.last is not None else ()
    return [
        Answer(
            prompt=prompts[first + row],
            text=texts[row],
            tokens=tuple(tokens[row]),
            finish=finishes[row],
            kept=tuple(number_patches(pipeline.geometry, np.searchsorted(batch.visual_index[row], stage[row])) for stage in kept),
            seconds=(begun[row], ended[row]),
        )
        for row in range(batch.rows)
    ]


def number_patches(geometry: Geometry, tokens: Array) -> tuple[int, ...]:
    """The patches that visual tokens of a prompt stand for: 0 to P-1 in the first image, row by row, P to 2P-1 in the second, and so on.

    A class token of image i, which comes before its patches, is -1 - i.
    """
    rows, columns = geometry.grid or (1, geometry.visual_tokens)
    image, token = np.divmod(tokens, geometry.visual_tokens)
    patch = token + rows * columns - geometry.visual_tokens
    numbers: list[int] = np.where(patch < 0, -1 - image, image * rows * columns + patch).tolist()
    return tuple(numbers)


def show_pictures(folder: Path, geometry: Geometry, batch: PromptBatch) -> tuple[Image.Image, ...]:
    """The pictures of the first prompt as the vision encoder sees them, or, where it takes them apart, as they were given."""
    if len(geometry.picture_shape) != len("CHW"):
        return tuple(picture.resize((geometry.image_width, geometry.image_height)) for picture in batch.pictures[0])
    images = load_processor(folder).image_processor
    several = batch.pixel_values[0].reshape(-1, *geometry.picture_shape)
    channels = several.shape[1]
    normalised = bool(getattr(images, "do_normalize", True))
    mean, std = (images.image_mean, images.image_std) if normalised else ([0.0] * channels, [1.0] * channels)
    return tuple(from_pixels(each, mean, std) for each in several)
