"""One picture of noise through the checkpoint's own processor: what it makes is what the model will be given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import transformers
from numpy.typing import NDArray
from PIL import Image
from transformers import PreTrainedConfig

from sievert.bundle.errors import CheckpointError, UnsupportedModelError
from sievert.bundle.pictures import OF_TEXT, PIXELS, split_pictures
from sievert.bundle.processor import choose_processor
from sievert.exporter.checkpoint import Checkpoint
from sievert.exporter.quiet import quiet


@dataclass(frozen=True)
class Trial:
    """``arrays`` are the processor's for one picture, as it shapes them; it has ``visual`` tokens. ``picture`` and ``layout`` are those of
    :class:`~sievert.bundle.specs.Geometry`.
    """

    processor: Any
    arrays: Mapping[str, NDArray[Any]]
    visual: int
    picture: tuple[int, ...]
    layout: dict[str, tuple[int, ...]]


def try_processor(checkpoint: Checkpoint, config: PreTrainedConfig, size: tuple[int, int]) -> Trial:
    """Load the checkpoint's processor and give it a picture of ``size`` (height, width).

    Raises:
        CheckpointError: it cannot be loaded, fails, or was made for another model.
        UnsupportedModelError: it hides pixels of a picture of this size.
    """
    given, text = checkpoint.given, config.get_text_config()
    image_token = int(config.image_token_id)
    if not 0 <= image_token < text.vocab_size:
        raise CheckpointError(
            f"{given}: the image token {image_token} lies outside the embedding table of {text.vocab_size} rows: resize the embeddings "
            "(model.resize_token_embeddings) and save the checkpoint again"
        )
    processor = _load(checkpoint)
    tokenizer = processor.tokenizer
    if len(tokenizer) > text.vocab_size:
        raise CheckpointError(
            f"{given}: the tokenizer has {len(tokenizer)} tokens but the embedding table {text.vocab_size} rows: they are of two models"
        )
    token = tokenizer.convert_ids_to_tokens(image_token)
    # Where a prompt marks the place of an image otherwise, the processor may give that mark this name, and the tokenizer has the other.
    if token not in (getattr(processor, "image_token", token), getattr(tokenizer, "image_token", None)):
        raise CheckpointError(f"{given}: the model's image token is {token!r} ({image_token}), the processor's {processor.image_token!r}")
    place = getattr(processor, "boi_token", token)  # where a prompt marks the place of an image otherwise than by the token itself
    try:
        with quiet("trying the processor"):
            made = processor(images=[_picture(*size)], text=[place], return_tensors="np")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{given}: its processor fails on an image of {size[0]}x{size[1]} pixels and the prompt {place!r} ({error}): "
            "processor_config.json must hold patch_size and vision_feature_select_strategy of this model"
        ) from error
    pictures = split_pictures(made, 1)
    if pictures.masked:
        raise UnsupportedModelError(
            f"{given}: of an image of {size[0]}x{size[1]} pixels (height x width) the processor hides a part "
            f"({', '.join(pictures.masked)}): choose an --image-size that needs no padding"
        )
    arrays = {name: np.asarray(made[name]) for name in made.keys() - OF_TEXT}
    arrays[PIXELS] = arrays[PIXELS].astype(np.float32)
    visual = int((np.asarray(made["input_ids"]) == image_token).sum())
    return Trial(processor, arrays, visual, pictures.pixels.shape[1:], dict(pictures.layout[0]))


def _picture(height: int, width: int) -> Image.Image:
    """Noise: a tile of one colour may be taken for padding."""
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(noise)


def _load(checkpoint: Checkpoint) -> Any:
    pictures: Any = transformers.AutoImageProcessor
    options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": True}
    try:
        with quiet("loading the processor"):
            kind = choose_processor(checkpoint.folder, transformers, checkpoint.architecture.processor)
            processor = kind.from_pretrained(checkpoint.folder, **options)
            if hasattr(processor, "image_processor"):
                processor.image_processor = pictures.from_pretrained(checkpoint.folder, backend="pil", **options)
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
