"""PaliGemma and PaliGemma 2: a prompt that is read in both directions, positions from 1, capped scores and logits (the second)."""

from sievert.exporter.architectures.base import Architecture, TwoWay

PALIGEMMA = Architecture(
    name="paligemma",
    model_class="PaliGemmaForConditionalGeneration",
    towers={"siglip_vision_model": 0},
    decoders=("gemma", "gemma2"),
    two_way=TwoWay(tokens="prompt", token_type=0, other=1),
    first_position=1,
)
