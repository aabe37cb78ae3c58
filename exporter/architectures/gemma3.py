"""Gemma 3: pooled patches, sliding and full layers with rotary tables of their own, pictures whose tokens see one another both ways."""

from sievert.exporter.architectures.base import Architecture, TwoWay

GEMMA3 = Architecture(
    name="gemma3",
    model_class="Gemma3ForConditionalGeneration",
    towers={"siglip_vision_model": 0},
    decoders=("gemma3_text",),
    two_way=TwoWay(tokens="images", token_type=1, other=0),
)
