"""Attention for packed training rows, and the pointer: a training aid that reads one head's attention."""

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, LlavaForConditionalGeneration

_NAME = "sievert_packed_rows"


class PackedAttention:
    """Half the time of one masked call over the whole row: the image part is plainly causal, only the text needs a mask.

    After a forward pass, `looked` [B, T, S] holds the log of what the text looked at, in head 0 of layer `layer`.
    """

    def __init__(self, layer: int) -> None:
        self.layer = layer
        self.looked: Tensor | None = None

    def __call__(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, **_options: object
    ) -> tuple[Tensor, None]:
        """[B, H, S, d] attention where `attention_mask` [B, 1, T, S] speaks for the last T rows only. Returns [B, S, H, d]."""
        prefix = query.shape[2] - attention_mask.shape[2]
        if module.layer_idx == self.layer:
            scores = query[:, 0, prefix:] @ key[:, 0].mT * query.shape[-1] ** -0.5
            self.looked = scores.float().masked_fill(~attention_mask[:, 0], -torch.inf).log_softmax(-1)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        image = scaled_dot_product_attention(query[:, :, :prefix], key[:, :, :prefix], value[:, :, :prefix], is_causal=True)
        text = scaled_dot_product_attention(query[:, :, prefix:], key, value, attn_mask=attention_mask)
        return torch.cat([image, text], dim=2).transpose(1, 2), None


def use_packed(model: LlavaForConditionalGeneration) -> PackedAttention:
    """Make the decoder of this model object expect packed rows. Nothing of it is saved with the model."""
    layers = model.model.language_model.layers
    # A third of the way up, where `grow` also takes it: layer 2 of 6 becomes layer 3 of 10.
    packed = PackedAttention(len(layers) // 3)
    AttentionInterface.register(_NAME, packed)
    model.model.language_model.config._attn_implementation = _NAME
    return packed
