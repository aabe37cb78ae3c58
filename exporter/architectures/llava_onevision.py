"""LLaVA-OneVision: a picture in tiles beside its small version, a token at the end of each row."""

from sievert.exporter.architectures.base import Architecture, Video

LLAVA_ONEVISION = Architecture(
    name="llava-onevision",
    model_class="LlavaOnevisionForConditionalGeneration",
    towers={"siglip_vision_model": 0},
    decoders=("qwen2",),
    image_size=(768, 768),
    video=Video(),
)
