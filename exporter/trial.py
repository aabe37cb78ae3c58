"""Pictures of noise through the checkpoint's own processor: what it makes is what the model will be given."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedConfig

from sievert.bundle.errors import CheckpointError, UnsupportedModelError
from sievert.bundle.films import process_film, rename_pixels, stamp
from sievert.bundle.pictures import OF_TEXT, PIXELS, Pictures, first_picture, same_layout, split_pictures
from sievert.bundle.processor import load_pictures
from sievert.bundle.specs import Film
from sievert.exporter.checkpoint import Checkpoint
from sievert.exporter.films import choose_film
from sievert.exporter.quiet import quiet

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Trial:
    """``arrays`` are the processor's for one picture, as it shapes them; it has ``visual`` tokens. ``picture``, ``layout``, ``images``
    and ``film`` are those of :class:`~sievert.bundle.specs.Geometry`.
    """

    processor: Any
    arrays: Mapping[str, NDArray[Any]]
    visual: int
    picture: tuple[int, ...]
    layout: dict[str, tuple[int, ...]]
    images: int
    film: Film | None = None


@dataclass(frozen=True)
class _Made:
    """What the processor made of a prompt's pictures, and the visual tokens of each."""

    arrays: Mapping[str, NDArray[Any]]
    pictures: Pictures
    visual: int

    def like(self, other: _Made) -> bool:
        """Whether a picture became the same in both prompts."""
        shapes = [each.pictures.pixels.shape[1:] for each in (self, other)]
        layouts = [each.pictures.layout[0] for each in (self, other)]
        return shapes[0] == shapes[1] and self.visual == other.visual and same_layout(*layouts)


def try_processor(checkpoint: Checkpoint, config: PreTrainedConfig, size: tuple[int, int], *, images: int = 1, frames: int = 0) -> Trial:
    """Load the checkpoint's processor and give it prompts of one, and of several, pictures of ``size`` (height, width).

    What it makes of a picture may depend on how many there are; the trial then is of prompts of ``images``. With ``frames`` it is of a
    prompt of one video of so many.

    Raises:
        CheckpointError: it cannot be loaded, fails, or was made for another model.
        UnsupportedModelError: it hides pixels of a picture of this size, or takes no prompt of so many.
    """
    given, text = checkpoint.given, config.get_text_config()
    video = checkpoint.architecture.video if frames else None
    image_token = int(getattr(config, video.visual) if video else config.image_token_id)
    if not 0 <= image_token < text.vocab_size:
        raise CheckpointError(
            f"{given}: the image token {image_token} lies outside the embedding table of {text.vocab_size} rows: resize the embeddings "
            "(model.resize_token_embeddings) and save the checkpoint again"
        )
    processor = _load(checkpoint, videos=bool(frames))
    tokenizer = processor.tokenizer
    if len(tokenizer) > text.vocab_size:
        raise CheckpointError(
            f"{given}: the tokenizer has {len(tokenizer)} tokens but the embedding table {text.vocab_size} rows: they are of two models"
        )
    if frames:
        return _try_film(checkpoint, config, processor, image_token, size, frames)
    token = tokenizer.convert_ids_to_tokens(image_token)
    # Where a prompt marks the place of an image otherwise, the processor may give that mark this name, and the tokenizer has the other.
    if token not in (getattr(processor, "image_token", token), getattr(tokenizer, "image_token", None)):
        raise CheckpointError(f"{given}: the model's image token is {token!r} ({image_token}), the processor's {processor.image_token!r}")
    one, several = _process(given, processor, image_token, size, 1), _process_several(processor, image_token, size, max(images, 2))
    same = several is not None and several.like(one)
    made, fixed = one if same or images == 1 else several, 0 if same else images
    if made is None:
        raise UnsupportedModelError(f"{given}: its processor takes no prompt of {images} images: leave --images out")
    if made.pictures.masked:
        raise UnsupportedModelError(
            f"{given}: of an image of {size[0]}x{size[1]} pixels (height x width) the processor hides a part "
            f"({', '.join(made.pictures.masked)}): choose an --image-size that needs no padding"
        )
    arrays = {**made.arrays, PIXELS: made.arrays[PIXELS].astype(np.float32)}
    return Trial(processor, arrays, made.visual, made.pictures.pixels.shape[1:], dict(made.pictures.layout[0]), fixed)


def _try_film(
    checkpoint: Checkpoint, config: PreTrainedConfig, processor: Any, video_token: int, size: tuple[int, int], frames: int
) -> Trial:
    """A prompt of one video, one frame a second."""
    film = choose_film(checkpoint, config, processor, size, frames)
    try:
        with quiet("trying the processor"):
            made = process_film(processor, film, [_picture(*size)] * frames, stamp(frames, range(frames), 1.0), film.place)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, ImportError) as error:
        raise CheckpointError(f"{checkpoint.given}: its processor fails on a video of {frames} frames ({error})") from error
    visual = int((made["input_ids"] == video_token).sum())
    pictures = split_pictures(rename_pixels(made, film), 1)
    arrays = {name: array for name, array in made.items() if name not in OF_TEXT}
    return Trial(processor, arrays, visual, pictures.pixels.shape[1:], dict(pictures.layout[0]), 1, film)


def _process(given: str, processor: Any, image_token: int, size: tuple[int, int], images: int) -> _Made:
    """A prompt of ``images`` pictures, and nothing else.

    Raises:
        CheckpointError: the processor fails.
    """
    # Where a prompt marks the place of an image otherwise than by the token itself.
    place = getattr(processor, "boi_token", processor.tokenizer.convert_ids_to_tokens(image_token))
    try:
        with quiet("trying the processor"):
            made = processor(images=[[_picture(*size)] * images], text=[" ".join([place] * images)], return_tensors="np")
        pictures = split_pictures(made, images)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{given}: its processor fails on an image of {size[0]}x{size[1]} pixels and the prompt {place!r} ({error}): "
            "processor_config.json must hold patch_size and vision_feature_select_strategy of this model"
        ) from error
    visual = int((np.asarray(made["input_ids"]) == image_token).sum())
    return _Made(first_picture(made, images), pictures, visual // images)


def _process_several(processor: Any, image_token: int, size: tuple[int, int], images: int) -> _Made | None:
    """A prompt of several pictures; None of a processor that takes one."""
    try:
        return _process("", processor, image_token, size, images)
    except CheckpointError as error:
        logger.debug("a prompt of %d images: %s", images, error)
        return None


def _picture(height: int, width: int) -> Image.Image:
    """Noise: a tile of one colour may be taken for padding."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def _load(checkpoint: Checkpoint, *, videos: bool) -> Any:
    try:
        with quiet("loading the processor"):
            processor = load_pictures(checkpoint.folder, transformers, name="" if videos else checkpoint.architecture.processor)
    except (OSError, ValueError, ImportError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{checkpoint.given}: its processor cannot be loaded ({error}): add the processor and tokenizer files of the model it came from"
        ) from error
    if not all(hasattr(processor, part) for part in ("image_processor", "tokenizer")):
        raise CheckpointError(
            f"{checkpoint.given}: its processor is a {type(processor).__name__}, which does not take an image and a text: "
            "add the processor_config.json of the model it came from"
        )
    return processor
