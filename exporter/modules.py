"""The modules that are traced, put together from parts of the loaded model; parameters are shared, never copied."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Final

import torch
import transformers
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from sievert.bundle.errors import UnsupportedModelError
from sievert.exporter.architectures.base import Tower, TwoWay
from sievert.exporter.attention import attending_by

_ATTENTION: Final = "sievert_attention"


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


class TwoWayDecoder(nn.Module):
    """The whole model but its vision part, where that alone knows which tokens see one another both ways: embeddings to logits and caches.

    The masks are the model's own, its caches keep every row whatever the window of their layer.
    """

    def __init__(self, model: PreTrainedModel, two_way: TwoWay) -> None:
        super().__init__()
        self.whole = _without_vision(model)
        self._types = (two_way.token_type, two_way.other)

    def forward(
        self, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor, two_way: torch.Tensor
    ) -> dict[str, Any]:
        """``two_way[B, S]`` is 1 for tokens of that kind, else 0. Return ``{"logits": [B, S, V], "past_key_values": cache}``."""
        outputs = self.whole(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            token_type_ids=torch.where(two_way > 0, *self._types),
            past_key_values=DynamicCache(),
            use_cache=True,
        )
        return {"logits": outputs.logits, "past_key_values": outputs.past_key_values}


def two_way_decoder(model: PreTrainedModel, two_way: TwoWay) -> TwoWayDecoder:
    """The model's decoder with its head, and the masks that the model makes for it."""
    config = model.config.get_text_config()
    config.use_cache, config.output_attentions, config.output_hidden_states = True, False, False
    return TwoWayDecoder(model, two_way).eval()


def embedding_scale(model: PreTrainedModel) -> float:
    """What the model multiplies the rows of its embedding table by.

    Raises:
        UnsupportedModelError: it does something else with them.
    """
    embed: Any = model.get_input_embeddings()
    scale = torch.as_tensor(getattr(embed, "embed_scale", 1.0)).to(embed.weight.dtype)
    # With a table of its own: the checkpoint's may be a blank.
    table = torch.linspace(1, 2, len(embed.weight), dtype=embed.weight.dtype)[:, None].expand(embed.weight.shape)
    some = torch.arange(min(8, len(table)))
    with torch.no_grad():
        if not torch.equal(torch.func.functional_call(embed, {"weight": table}, (some,)), table[some] * scale):
            raise UnsupportedModelError(f"{type(embed).__name__} gives other rows than those of its table times {float(scale):g}")
    return float(scale)


@contextmanager
def one_attention(model: PreTrainedModel) -> Iterator[None]:
    """For the length of a trace, a decoder that spells its attention out (because it caps its scores) goes through one operator."""
    config = model.config.get_text_config()
    with attending_by(_ATTENTION, _attend, [config]) if config._attn_implementation == "eager" else nullcontext():
        yield


def _attend(
    _module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of q ``[B, H, S, d]`` to k, v ``[B, G, T, d]`` as ONNX defines it: ``[B, S, H, d]``."""
    output, *_rest = torch.onnx.ops.attention(query, key, value, attention_mask, scale=scaling, softcap=softcap or 0.0)
    return output.transpose(1, 2).contiguous(), None


def _without_vision(model: PreTrainedModel) -> PreTrainedModel:
    """A second handle on the model that shares its decoder and head, without what the tracer would carry along for nothing."""
    whole: Any = copy.copy(model)
    base: Any = copy.copy(model.base_model)
    decoder = whole.get_decoder()
    base._modules = {name: child for name, child in model.base_model._modules.items() if child is decoder}
    whole._modules = {name: base if child is model.base_model else child for name, child in model._modules.items()}
    kept: PreTrainedModel = whole
    return kept
