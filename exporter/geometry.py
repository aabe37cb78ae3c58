"""The numbers of a model, read from its configuration and confirmed by its processor."""

from __future__ import annotations

from typing import Any

import numpy as np
import transformers
from PIL import Image
from transformers import GenerationConfig, PreTrainedConfig

from sievert.bundle.errors import CheckpointError, UnsupportedModelError
from sievert.bundle.specs import Geometry
from sievert.exporter.checkpoint import Checkpoint
from sievert.exporter.quiet import quiet


def read_geometry(checkpoint: Checkpoint, config: PreTrainedConfig, *, window: int | None) -> Geometry:
    """Geometry of the checkpoint. ``window`` is the decoder's sliding window, if any: no position beyond it is promised.

    Where the tower's class token is kept, or a patch is dropped, ``visual_tokens`` differs from the patches of ``grid``: the visual
    token of place p then is patch ``p - (visual_tokens - rows * columns)``, and a negative number is a class token.

    Raises:
        CheckpointError: the processor is missing, broken, or made for another model.
        UnsupportedModelError: the model has no room for a prompt beside one image.
    """
    architecture, given = checkpoint.architecture, checkpoint.given
    text, vision = config.get_text_config(), config.vision_config
    side = _one_size(vision.image_size, "image_size", given)
    rows = side // _one_size(vision.patch_size, "patch_size", given)
    select = getattr(config, architecture.feature_select)
    if select not in architecture.leading_dropped:
        raise UnsupportedModelError(
            f"{given}: {architecture.feature_select} is {select!r}; Sievert exports {', '.join(map(repr, architecture.leading_dropped))}"
        )
    visual = rows * rows + architecture.towers[vision.model_type] - architecture.leading_dropped[select]
    positions = text.max_position_embeddings if window is None else min(text.max_position_embeddings, window)
    if positions <= visual + 1:
        limit = "sliding window" if window == positions else "position table"
        raise UnsupportedModelError(
            f"{given}: an image takes {visual} tokens but the decoder's {limit} ends at {positions}: no prompt fits"
        )
    image_token: int = config.image_token_id
    if not 0 <= image_token < text.vocab_size:
        raise CheckpointError(
            f"{given}: the image token {image_token} lies outside the embedding table of {text.vocab_size} rows: resize the embeddings "
            "(model.resize_token_embeddings) and save the checkpoint again"
        )
    processor = _load_processor(checkpoint)
    _check_processor(processor, given=given, size=(vision.num_channels, side, side), image_token=image_token, visual=visual, text=text)
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    eos = _stop_tokens(checkpoint, text, processor.tokenizer)
    return Geometry(
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        attention_scale=head_size**-0.5,
        max_positions=positions,
        image_token_id=image_token,
        pad_token_id=_pad_token(text, processor.tokenizer, eos),
        eos_token_ids=eos,
        image_height=side,
        image_width=side,
        channels=vision.num_channels,
        grid=(rows, rows),
        visual_tokens=visual,
        vision_layers=vision.num_hidden_layers,
        class_tokens=architecture.towers[vision.model_type],
    )


def _one_size(value: Any, name: str, given: str) -> int:
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise UnsupportedModelError(f"{given}: {name} of the vision tower is {value}, expected a square")
    return int(sides.pop())


def _load_processor(checkpoint: Checkpoint) -> Any:
    auto: Any = transformers.AutoProcessor
    try:
        with quiet("loading the processor"):
            processor = auto.from_pretrained(checkpoint.folder, trust_remote_code=False, local_files_only=True)
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


def _check_processor(
    processor: Any, *, given: str, size: tuple[int, int, int], image_token: int, visual: int, text: PreTrainedConfig
) -> None:
    """Run the processor on a blank image: what it makes must be what the model takes."""
    tokenizer = processor.tokenizer
    if len(tokenizer) > text.vocab_size:
        raise CheckpointError(
            f"{given}: the tokenizer has {len(tokenizer)} tokens but the embedding table {text.vocab_size} rows: they are of two models"
        )
    token = tokenizer.convert_ids_to_tokens(image_token)
    if token != getattr(processor, "image_token", token):
        raise CheckpointError(f"{given}: the model's image token is {token!r} ({image_token}), the processor's {processor.image_token!r}")
    try:
        with quiet("trying the processor"):
            made = processor(images=[Image.new("RGB", (size[2], size[1]))], text=[token], return_tensors="np")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(
            f"{given}: its processor fails on a blank image and the prompt {token!r} ({error}): processor_config.json must hold patch_size "
            "and vision_feature_select_strategy of this model"
        ) from error
    pixels = np.asarray(made["pixel_values"]).shape
    if pixels != (1, *size):
        raise CheckpointError(f"{given}: the processor makes images of shape {list(pixels)}, the vision tower takes {[1, *size]}")
    count = int((np.asarray(made["input_ids"]) == image_token).sum())
    if count != visual:
        raise CheckpointError(
            f"{given}: the processor writes {count} image tokens, the vision tower gives {visual}: its patch_size, "
            "num_additional_image_tokens and vision_feature_select_strategy must be this model's"
        )


def _stop_tokens(checkpoint: Checkpoint, text: PreTrainedConfig, tokenizer: Any) -> tuple[int, ...]:
    """The generation config's stop tokens; where it has none the text config's, then the tokenizer's."""
    found: Any = None
    if "generation_config.json" in checkpoint.files:
        try:
            found = GenerationConfig.from_pretrained(checkpoint.folder, local_files_only=True).eos_token_id
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{checkpoint.given}: generation_config.json cannot be read ({error})") from error
    for other in (text.eos_token_id, tokenizer.eos_token_id):
        found = other if found is None else found
    if found is None:
        raise CheckpointError(f"{checkpoint.given} names no stop token: set eos_token_id in generation_config.json")
    return tuple(int(token) for token in (found if isinstance(found, list | tuple) else [found]))


def _pad_token(text: PreTrainedConfig, tokenizer: Any, eos: tuple[int, ...]) -> int:
    """The tokenizer's padding, or the text config's; padded rows are masked, so a stop token serves where there is none."""
    for token in (tokenizer.pad_token_id, text.pad_token_id):
        if isinstance(token, int) and 0 <= token < text.vocab_size:
            return token
    return eos[0]
