"""The model's shape, and how a small one grows into a larger one."""

import re
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, GenerationConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from examples.digits_lvlm.data import CELL_PX
from examples.digits_lvlm.processing import MAX_POSITIONS
from examples.digits_lvlm.words import BOS, COLOURS, EOS, IMAGE, PAD, VOCABULARY


@dataclass(frozen=True)
class Shape:
    """What differs between the stages: visual tokens a side, and decoder layers."""

    grid: int
    layers: int


def build(shape: Shape) -> LlavaForConditionalGeneration:
    """A fresh model of this shape, with weights drawn from torch's global generator."""
    ids = {word: index for index, word in enumerate(VOCABULARY)}
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        projection_dim=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=shape.grid * CELL_PX,
        patch_size=CELL_PX,
    )
    text = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        bos_token_id=ids[BOS],
        eos_token_id=ids[EOS],
        pad_token_id=ids[PAD],
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=ids[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=shape.grid**2,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=ids[BOS], eos_token_id=ids[EOS], pad_token_id=ids[PAD], do_sample=False, max_new_tokens=20
    )
    return model


class PatchReader(nn.Module):
    """Reads digit and colour off every visual token: a training aid, not part of the checkpoint.

    Without its loss the model stays on a plateau: no answer improves until the tower can tell digits apart, and the tower hears
    nothing from the answers until the decoder looks at the right patches.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, 11)  # 0..9, and 10 for "no digit here"
        self.colour = nn.Linear(width, len(COLOURS) + 1)

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, Nv, 11] and [B, Nv, colours + 1] from visual tokens [B, Nv, D]."""
        normed = self.norm(features)
        return self.value(normed), self.colour(normed)


def grow(small: LlavaForConditionalGeneration, shape: Shape) -> LlavaForConditionalGeneration:
    """A model of `shape` that starts from what `small` knows.

    New decoder layers are spread between the old ones with zero output projections, so each starts as the identity. The tower's
    table of patch positions is stretched to the new grid.
    """
    old_depth = len(small.model.language_model.layers)
    model = build(shape)
    weights = model.state_dict()
    depth_of = {old: old * shape.layers // old_depth for old in range(old_depth)}
    kept: set[str] = set()
    for name, value in small.state_dict().items():
        target = re.sub(r"(language_model\.layers\.)(\d+)", lambda match: f"{match[1]}{depth_of[int(match[2])]}", name)
        kept.add(target)
        weights[target] = _stretch(value, shape.grid) if name.endswith("position_embedding.weight") else value.clone()
    for name, value in weights.items():
        if name not in kept and name.endswith(("o_proj.weight", "down_proj.weight")):
            value.zero_()
    model.load_state_dict(weights)
    return model


def _stretch(table: Tensor, grid: int) -> Tensor:
    """A position table [1 + old * old, D], CLS first, interpolated to [1 + grid * grid, D]."""
    cls, patches = table[:1], table[1:]
    old = round(len(patches) ** 0.5)
    plane = patches.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    stretched = nn.functional.interpolate(plane, size=(grid, grid), mode="bicubic", align_corners=False)
    return torch.cat([cls, stretched.permute(0, 2, 3, 1).reshape(grid * grid, -1)])
