"""Whether a decoder is built the way pruning needs it, seen from its modules and its configuration; no weights are read."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig

from sievert.bundle.errors import UnsupportedModelError
from sievert.exporter.architectures import Architecture, supported
from sievert.exporter.quiet import quiet

logger = logging.getLogger(__name__)

_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
_FUSED = ("qkv_proj", "query_key_value", "Wqkv", "c_attn", "attn_qkv", "in_proj")
_EXPERTS = ("experts", "router", "block_sparse_moe")


def check_decoder(config: PreTrainedConfig, architecture: Architecture, *, given: str) -> None:
    """Refuse a text configuration that cannot be exported and pruned.

    Raises:
        UnsupportedModelError: naming every reason found, and what is supported.
    """
    kind = config.model_type
    reasons = [*_configuration_reasons(config, architecture), *_module_reasons(config)]
    if kind not in architecture.decoders and not reasons:
        reasons = ["its structure looks right, but nothing has been proven on it"]
    if reasons:
        raise UnsupportedModelError(f"{given}: the decoder {kind!r} is not supported: {'; '.join(reasons)}. Sievert exports {supported()}")


def _configuration_reasons(config: PreTrainedConfig, architecture: Architecture) -> Iterator[str]:
    rope = getattr(config, "rope_parameters", None) or {}
    factor = rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0
    if factor != 1.0:
        yield f"partial rotary embedding (partial_rotary_factor {factor:g}): only part of each head is rotated"
    kinds = [each for each in rope.values() if isinstance(each, Mapping)] or [rope]  # tables of their own for each kind of layer
    for rope_type in sorted({each.get("rope_type", "default") for each in kinds} - {*architecture.rope_types}):
        yield (
            f"rotary type {rope_type!r}, whose tables depend on the length of the prompt or are unknown "
            f"(supported: {', '.join(architecture.rope_types)})"
        )
    odd = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"})
    if odd:
        yield f"layers that are not plain attention ({', '.join(odd)}): state-space, linear or chunked layers hold no prunable cache"


def _module_reasons(config: PreTrainedConfig) -> Iterator[str]:
    model = _build_without_weights(config)
    if model is None:
        yield "transformers cannot build it without weights"
        return
    layers = getattr(model, "layers", None)
    if not isinstance(layers, nn.ModuleList):
        yield "no list of decoder layers under `layers`: it is no decoder of the Llama kind"
        return
    if not isinstance(getattr(model, "rotary_emb", None), nn.Module):
        yield "no rotary position embedding (learned or no positions)"
    for index, layer in enumerate(layers):
        if reason := _layer_reason(layer):
            yield f"layer {index}: {reason}"
            return


def _layer_reason(layer: nn.Module) -> str | None:
    names = {name.rpartition(".")[2] for name, _ in layer.named_modules()}
    attention = getattr(layer, "self_attn", None)
    if (fused := sorted(names & set(_FUSED))) and (attention is not None or "attention" in names):
        return f"fused q, k and v projection ({fused[0]})"
    if not isinstance(attention, nn.Module):
        return f"no self attention in {type(layer).__name__}: a state-space, recurrent or hybrid layer"
    missing = [name for name in _PROJECTIONS if not isinstance(getattr(attention, name, None), nn.Linear)]
    if missing:
        return f"no separate {', '.join(missing)} in {type(attention).__name__}"
    if experts := sorted(names & set(_EXPERTS)):
        return f"mixture of experts ({experts[0]})"
    return None


def _build_without_weights(config: PreTrainedConfig) -> Any:
    auto: Any = transformers.AutoModel
    try:
        with quiet("building the decoder without weights"), torch.device("meta"):
            return auto.from_config(config, trust_remote_code=False)
    except (ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        logger.debug("building %s without weights: %s", config.model_type, error)
        return None
