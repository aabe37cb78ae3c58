"""The numbers of a model, read from its configuration and confirmed by its processor."""

from __future__ import annotations

import math
from typing import Any, Final

from transformers import GenerationConfig, PreTrainedConfig

from sievert.bundle.errors import CheckpointError, InputError, UnsupportedModelError
from sievert.bundle.pictures import PIXELS
from sievert.bundle.specs import Geometry
from sievert.exporter.architectures.base import Tower
from sievert.exporter.checkpoint import Checkpoint
from sievert.exporter.trial import Trial

_CHANNELS: Final = 3
_IMAGE_AXES: Final = 3


def image_size(
    checkpoint: Checkpoint, config: PreTrainedConfig, asked: tuple[int, int] | None = None, sample: tuple[int, int] | None = None
) -> tuple[int, int]:
    """Height and width of the pictures to export for: ``asked``, a ``sample``'s, the family's, or the configuration's own.

    A tower of one size takes a sample of any.

    Raises:
        UnsupportedModelError: a tower of one size was asked for another, or is not square.
        InputError: the size has to be asked for.
    """
    own = getattr(config.vision_config, "image_size", None)
    if checkpoint.architecture.tower is not None:
        side = _one_size(own, "image_size", checkpoint.given)
        if asked not in (None, (side, side)):
            raise UnsupportedModelError(
                f"{checkpoint.given}: its vision tower takes images of {side}x{side} pixels whatever they were: leave --image-size out"
            )
        return side, side
    if found := asked or sample or checkpoint.architecture.image_size:
        return found
    if own is None:
        raise InputError(f"{checkpoint.given} takes images of any size: say with --image-size HEIGHTxWIDTH which to export for")
    return (own, own) if isinstance(own, int) else (int(own[0]), int(own[1]))


def read_geometry(checkpoint: Checkpoint, config: PreTrainedConfig, trial: Trial, size: tuple[int, int], *, window: int | None) -> Geometry:
    """Geometry of the checkpoint for pictures of ``size`` (height, width), which the processor has tried.

    ``window`` is the decoder's sliding window, if any: no position beyond it is promised.

    Where the tower's class token is kept, or a patch is dropped, ``visual_tokens`` differs from the patches of ``grid``: the visual
    token of place p then is patch ``p - (visual_tokens - rows * columns)``, and a negative number is a class token.

    Raises:
        CheckpointError: the processor was made for another model, or the stop tokens cannot be read.
        UnsupportedModelError: the model has no room for a prompt beside one image.
    """
    architecture, given = checkpoint.architecture, checkpoint.given
    text, vision = config.get_text_config(), config.vision_config
    grid = _find_grid(trial, size)
    if architecture.tower is not None:
        grid = _check_tower(checkpoint, config, trial, architecture.tower)
    positions = text.max_position_embeddings if window is None else min(text.max_position_embeddings, window)
    positions -= architecture.first_position
    if positions <= trial.visual + 1:
        limit = "sliding window" if window == positions else "position table"
        raise UnsupportedModelError(
            f"{given}: an image takes {trial.visual} tokens but the decoder's {limit} ends at {positions}: no prompt fits"
        )
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    eos = _stop_tokens(checkpoint, text, trial.processor.tokenizer)
    return Geometry(
        depth=text.num_hidden_layers,
        width=text.hidden_size,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads,
        head_size=head_size,
        vocabulary=text.vocab_size,
        attention_scale=(getattr(text, "query_pre_attn_scalar", None) or head_size) ** -0.5,
        max_positions=positions,
        image_token_id=int(getattr(config, architecture.video.visual) if trial.film and architecture.video else config.image_token_id),
        pad_token_id=_pad_token(text, trial.processor.tokenizer, eos),
        eos_token_ids=eos,
        image_height=size[0],
        image_width=size[1],
        channels=getattr(vision, "num_channels", _CHANNELS),
        grid=grid,
        visual_tokens=trial.visual,
        picture=trial.picture,
        layout=trial.layout,
        images=trial.images,
        film=trial.film,
        vision_layers=0 if architecture.tower is None else vision.num_hidden_layers,
        class_tokens=0 if architecture.tower is None else architecture.towers[vision.model_type],
        position_axes=len((getattr(text, "rope_parameters", None) or {}).get("mrope_section") or [0]),
        first_position=architecture.first_position,
        two_way="none" if architecture.two_way is None else architecture.two_way.tokens,
        visual_planes=len(getattr(vision, "deepstack_visual_indexes", None) or ()),
    )


def _find_grid(trial: Trial, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of the visual tokens, where they are one grid in the proportions of the picture; None of tiles and odd counts."""
    height, width = size
    for name, numbers in trial.layout.items():
        if "grid" in name:
            height, width = numbers[-2:]
    if len(trial.picture) > _IMAGE_AXES:
        return None
    rows = math.isqrt(trial.visual * height // width)
    columns = trial.visual // max(rows, 1)
    return (rows, columns) if rows * columns == trial.visual and rows * width == columns * height else None


def _check_tower(checkpoint: Checkpoint, config: PreTrainedConfig, trial: Trial, tower: Tower) -> tuple[int, int]:
    """What the processor made must be what the tower takes and gives; returns the grid of its patches.

    Raises:
        CheckpointError: it is not.
        UnsupportedModelError: a setting of the tower that is not exported.
    """
    given, vision = checkpoint.given, config.vision_config
    side = _one_size(vision.image_size, "image_size", given)
    rows = side // _one_size(vision.patch_size, "patch_size", given)
    select = getattr(config, tower.feature_select)
    if select not in tower.leading_dropped:
        raise UnsupportedModelError(
            f"{given}: {tower.feature_select} is {select!r}; Sievert exports {', '.join(map(repr, tower.leading_dropped))}"
        )
    taken = [1, vision.num_channels, side, side]
    if list(trial.arrays[PIXELS].shape) != taken:
        raise CheckpointError(
            f"{given}: the processor makes images of shape {list(trial.arrays[PIXELS].shape)}, the vision tower takes {taken}"
        )
    visual = rows * rows + checkpoint.architecture.towers[vision.model_type] - tower.leading_dropped[select]
    if trial.visual != visual:
        raise CheckpointError(
            f"{given}: the processor writes {trial.visual} image tokens, the vision tower gives {visual}: its patch_size, "
            "num_additional_image_tokens and vision_feature_select_strategy must be this model's"
        )
    return rows, rows


def _one_size(value: Any, name: str, given: str) -> int:
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1:
        raise UnsupportedModelError(f"{given}: {name} of the vision tower is {value}, expected a square")
    return int(sides.pop())


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
