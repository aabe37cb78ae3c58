"""LLaVA-NeXT (1.6): a picture in tiles beside its small version, a token at the end of each row."""

from sievert.exporter.architectures.base import Architecture

LLAVA_NEXT = Architecture(
    name="llava-next",
    model_class="LlavaNextForConditionalGeneration",
    towers={"clip_vision_model": 1, "siglip_vision_model": 0},
    decoders=("llama", "mistral", "qwen2"),
    image_size=(672, 672),
)
