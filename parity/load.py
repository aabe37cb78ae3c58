"""A checkpoint as the reference: its own weights, rounded as the bundle's are, computed in float32."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from sievert.bundle.errors import CheckpointError, InputError
from sievert.bundle.manifest import Manifest
from sievert.bundle.names import DOWNLOADS
from sievert.bundle.remote_code import is_trusted
from sievert.parity.reference import Reference


def load_reference(manifest: Manifest, *, model: str | Path | None = None) -> Reference:
    """The model a bundle was made from, or ``model``: a folder or hub id. What the export downloaded is read again if it is still there.

    A 16 bit bundle is judged against its own rounded weights in float32 arithmetic, so that every difference is the engine's.

    Raises:
        InputError: the manifest's source is gone: say where the model is.
        CheckpointError: no such model can be loaded, or it is another one than the bundle's.
    """
    import transformers

    name = str(model if model is not None else _find_source(manifest.source.model))
    # A hub id is `name` or `owner/name`; whatever else is no folder is not asked of the network.
    if not Path(name).is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name):
        given = "the model to compare with" if model is not None else "the model this bundle was exported from"
        raise InputError(f"{given} is not at {name!r} any more: pass --model with its folder or hub id")
    dtype: torch.dtype = getattr(torch, manifest.source.dtype)
    architecture: Any = getattr(transformers, manifest.source.architecture)  # transformers gives `from_pretrained` no useful type
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=is_trusted())
        loaded = architecture.from_pretrained(
            name, config=config, dtype=dtype, attn_implementation=_attention_of(config), use_safetensors=True, trust_remote_code=False
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{name!r} cannot be loaded as the reference: {error}; pass --model with the model's folder") from error
    text, geometry = loaded.config.get_text_config(), manifest.geometry
    found = (text.num_hidden_layers, text.hidden_size, text.vocab_size)
    wanted = (geometry.depth, geometry.width, geometry.vocabulary)
    if found != wanted:
        raise CheckpointError(
            f"{name!r} has {found[0]} layers, width {found[1]} and {found[2]} words, the bundle's model {wanted[0]}, {wanted[1]} and "
            f"{wanted[2]}: pass --model with the model the bundle was made from"
        )
    return Reference(loaded.float(), rounded_to=dtype, visual_token=geometry.image_token_id)


def _find_source(model: str) -> str | Path:
    """The folder that export fetched a hub id into; the name itself where it is a folder, or the download is gone."""
    folder = DOWNLOADS.expanduser() / model
    return folder if not Path(model).is_dir() and folder.is_dir() else model


def _attention_of(config: Any) -> dict[str, str]:
    """PyTorch's operator in every part, but for decoders that spell their attention out, as those do that cap its scores."""
    import transformers

    text: Any = transformers.MODEL_MAPPING[type(config.get_text_config())]
    return {"": "sdpa", "vision_config": "sdpa", "text_config": "sdpa" if text._supports_sdpa else "eager"}


def describe_other_weights(manifest: Manifest, model: torch.nn.Module) -> str:
    """Which of the bundle's weights the model has otherwise, in words; empty where it is the model that was exported."""
    state = model.state_dict()
    compared, different = 0, list[str]()
    for weight in manifest.weights:
        tensor = state.get(weight.name.removesuffix(".T"))
        if tensor is None:  # a constant of the exporter's
            continue
        compared += 1
        tensor = tensor.t() if weight.name.endswith(".T") else tensor
        content = tensor.to(getattr(torch, weight.dtype)).contiguous().view(torch.uint8).numpy()
        if tuple(tensor.shape) != weight.shape or hashlib.sha256(content.data).hexdigest() != weight.sha256:
            different.append(weight.name)
    if not different:
        return ""
    return f"{len(different)} of the {compared} weights compared are not those that were exported, such as {different[0]}"
