"""The two modules that are traced, put together from parts of the loaded model; parameters are shared, never copied."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from sievert.exporter.architectures.base import Tower


class VisionEncoder(nn.Module):
    """Tower and projector: ``pixel_values[B, C, H, W]`` to ``image_features[B, Nv, D]``.

    Concatenates the hidden states after ``layers`` (counted like ``hidden_states``: 0 is the embedding, -1 the last) along the width,
    each without its ``dropped`` leading rows.
    """

    def __init__(self, tower: nn.Module, projector: nn.Module, *, layers: Sequence[int], dropped: int) -> None:
        super().__init__()
        self.vision_tower = tower
        self.projector = projector
        self.layers = tuple(layers)
        self.dropped = dropped

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``{"image_features": [B, Nv, D]}``."""
        hidden_states = self.vision_tower(pixel_values, return_dict=True, output_hidden_states=list(self.layers)).hidden_states
        hidden = torch.cat([hidden_states[layer][:, self.dropped :] for layer in self.layers], dim=-1)
        return {"image_features": self.projector(hidden)}


def vision_encoder(model: PreTrainedModel, tower: Tower) -> VisionEncoder:
    """The model's vision encoder as one module."""
    layers = getattr(model.config, tower.feature_layer)
    return VisionEncoder(
        model.get_submodule(tower.encoder),
        model.get_submodule(tower.projector),
        layers=[layers] if isinstance(layers, int) else list(layers),
        dropped=tower.leading_dropped[getattr(model.config, tower.feature_select)],
    ).eval()


class Decoder(nn.Module):
    """Body and head of a text model that has no causal class of its own: embeddings to logits and caches."""

    def __init__(self, body: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.model = body
        self.lm_head = head

    def forward(self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> dict[str, Any]:
        """Return ``{"logits": [B, S, V], "past_key_values": cache}``."""
        outputs = self.model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, position_ids=position_ids, use_cache=True)
        return {"logits": self.lm_head(outputs.last_hidden_state), "past_key_values": outputs.past_key_values}


def decoder(model: PreTrainedModel) -> nn.Module:
    """The model's decoder with its head: embeddings to logits and caches; the text model's own causal class where it has one."""
    whole: Any = model
    config, body, head = whole.config.get_text_config(), whole.get_decoder(), whole.get_output_embeddings()
    # A checkpoint may carry its trainer's settings; the graph's outputs are logits and caches whatever they say.
    config.use_cache, config.output_attentions, config.output_hidden_states = True, False, False
    if type(config) not in transformers.MODEL_FOR_CAUSAL_LM_MAPPING:
        return Decoder(body, head).eval()
    auto: Any = transformers.AutoModelForCausalLM
    with torch.device("meta"):
        causal = auto.from_config(config, trust_remote_code=False)
    # Both classes name the body and the head alike, by convention of all decoders.
    causal.model, causal.lm_head = body, head
    module: PreTrainedModel = causal.eval()
    return module
