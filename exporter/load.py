"""A checkpoint's weights in transformers' own class, complete or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from sievert.bundle.errors import CheckpointError, InputError, UnsupportedModelError
from sievert.bundle.remote_code import is_trusted
from sievert.exporter.architectures import supported
from sievert.exporter.checkpoint import Checkpoint
from sievert.exporter.quiet import logger, quiet
from sievert.exporter.stored import all_finite, make_blanks, open_stored

DType = Literal["float32", "float16", "bfloat16"]


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of one of :data:`DType`.

    Raises:
        InputError: any other name.
    """
    if name not in get_args(DType):
        raise InputError(f"dtype {name!r}: choose {', '.join(get_args(DType))}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def load_config(checkpoint: Checkpoint) -> PreTrainedConfig:
    """The parsed configuration, its tower one of the supported.

    Raises:
        CheckpointError: a field is missing or of the wrong type.
        UnsupportedModelError: a part is of a type transformers does not know, or a tower that is not supported.
    """
    for part in ("vision_config", "text_config"):
        kind = (checkpoint.config.get(part) or {}).get("model_type")
        if kind is not None and kind not in transformers.CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{checkpoint.given}: {part} is of the type {kind!r}, which transformers {transformers.__version__} does not know; "
                f"Sievert exports {supported()}"
            )
    try:
        with quiet("reading the configuration"):
            config: PreTrainedConfig = AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=is_trusted(), local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, StrictDataclassError) as error:
        raise CheckpointError(f"{checkpoint.given}: config.json cannot be used ({error}): download it again") from error
    tower = getattr(getattr(config, "vision_config", None), "model_type", "none")
    if tower not in checkpoint.architecture.towers:
        raise UnsupportedModelError(f"{checkpoint.given}: the vision tower {tower!r} is not supported; Sievert exports {supported()}")
    return config


def take_sliding_window(config: PreTrainedConfig) -> int | None:
    """Remove a sliding window from a text configuration and return it (in tokens), None if there is none.

    Within its window a layer is purely causal, and Geometry promises no position beyond it. Left in, the window would put a mask
    that never bites into every graph, and make the cache drop rows.
    """
    window: int | None = getattr(config, "sliding_window", None)
    if window is not None:
        config.sliding_window = None
    if getattr(config, "use_sliding_window", False):
        config.use_sliding_window = False
    if getattr(config, "layer_types", None):
        config.layer_types = ["full_attention"] * len(config.layer_types)
    return window


def _attention_of(config: PreTrainedConfig) -> dict[str, str]:
    """PyTorch's attention operator for every part, but for decoders that have to spell theirs out."""
    text: Any = transformers.MODEL_MAPPING[type(config.get_text_config())]
    return {"": "sdpa", "vision_config": "sdpa", "text_config": "sdpa" if text._supports_sdpa else "eager"}


@dataclass(frozen=True)
class Loaded:
    """A model to trace. Where a parameter is a blank (see :mod:`~sievert.exporter.stored`), ``values`` holds what the checkpoint has in its
    place, by the blank's address; it is of another dtype and still in its file.
    """

    model: PreTrainedModel
    values: Mapping[int, torch.Tensor]


def load_to_trace(checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype) -> Loaded:
    """The model on the CPU in evaluation mode, every parameter from the checkpoint, none of the decoder's matrices in memory.

    Parameters that are stored in ``dtype`` are mapped from the files. Of the others, the decoder's matrices are blanks; the vision part
    is converted: constants are computed from it.

    Raises:
        CheckpointError: weights missing, of another shape, unreadable, or not finite as ``dtype``.
    """
    if getattr(config, "transformers_weights", None) is not None:  # files of another name, which transformers is left to find
        return Loaded(load_model(checkpoint, config, dtype), {})
    try:
        stored = open_stored(checkpoint.folder, given=checkpoint.given)
    except _UNREADABLE as error:
        raise _unreadable(checkpoint, error) from error
    blanks = make_blanks(stored, dtype)
    if not blanks:
        return Loaded(load_model(checkpoint, config, dtype), {})
    model, unexpected = _load(checkpoint, config, dtype, stored | blanks)
    _tell_unexpected(checkpoint, unexpected)
    # A key may be renamed on its way into the model, or converted into other parameters: only what has arrived as it was stays blank.
    arrived = {parameter.data_ptr() for parameter in _decoder_parameters(model)}
    kept = {key: blank for key, blank in blanks.items() if blank.data_ptr() in arrived}
    if len(kept) < len(blanks):
        del model
        model, _ = _load(checkpoint, config, dtype, stored | kept)
    values = {blank.data_ptr(): stored[key] for key, blank in kept.items()}
    _check_finite(checkpoint, model, dtype, values)
    return Loaded(model, values)


def load_model(checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the CPU in evaluation mode, every parameter from the checkpoint.

    Raises:
        CheckpointError: weights missing, of another shape, unreadable, or not finite.
    """
    model, unexpected = _load(checkpoint, config, dtype, None)
    _tell_unexpected(checkpoint, unexpected)
    _check_finite(checkpoint, model, dtype, {})
    return model


def _load(
    checkpoint: Checkpoint, config: PreTrainedConfig, dtype: torch.dtype, tensors: dict[str, torch.Tensor] | None
) -> tuple[PreTrainedModel, list[str]]:
    """By transformers, which knows how keys of older checkpoints are called now; ``tensors`` stand for those of the files.

    Also returns the keys that the model has no place for.
    """
    model_class: Any = getattr(transformers, checkpoint.architecture.model_class)
    try:
        with quiet("loading the weights"):
            model, info = model_class.from_pretrained(
                checkpoint.folder if tensors is None else None,
                config=config,
                state_dict=tensors,
                dtype=dtype,
                attn_implementation=_attention_of(config),
                use_safetensors=True,
                trust_remote_code=False,
                local_files_only=True,
                output_loading_info=True,
            )
    except _UNREADABLE as error:
        raise _unreadable(checkpoint, error) from error
    # transformers fills what it does not find with random numbers and goes on.
    for problem, names in (("lack", info["missing_keys"]), ("have other shapes for", info["mismatched_keys"])):
        if names:
            shown = ", ".join(sorted(map(str, names))[:5])
            raise CheckpointError(
                f"{checkpoint.given}: the weights {problem} {len(names)} of the model's tensors, such as {shown}: "
                "the files are incomplete or of another model"
            )
    loaded: PreTrainedModel = model.eval()
    return loaded, sorted(info["unexpected_keys"])


def _tell_unexpected(checkpoint: Checkpoint, keys: list[str]) -> None:
    if keys:
        logger.warning("%s: the model has no place for %s; left out", checkpoint.given, ", ".join(keys[:5]))


_UNREADABLE = (OSError, ValueError, RuntimeError, KeyError, SafetensorError)


def _unreadable(checkpoint: Checkpoint, error: BaseException) -> CheckpointError:
    return CheckpointError(f"{checkpoint.given}: its weights cannot be loaded ({error}): download them again")


def _decoder_parameters(model: PreTrainedModel) -> Iterator[torch.nn.Parameter]:
    """Of the decoder, its embedding table and its head."""
    whole: Any = model
    for part in (whole.get_decoder(), whole.get_input_embeddings(), whole.get_output_embeddings()):
        yield from part.parameters()


def _check_finite(checkpoint: Checkpoint, model: PreTrainedModel, dtype: torch.dtype, values: Mapping[int, torch.Tensor]) -> None:
    for name, parameter in model.named_parameters():
        content = values.get(parameter.data_ptr(), parameter.detach())
        if not all_finite(content, parameter.dtype):
            raise CheckpointError(
                f"{checkpoint.given}: {name} holds numbers that are not finite in {str(dtype).removeprefix('torch.')}: "
                "the file is damaged, or the weights need float32 or bfloat16"
            )
