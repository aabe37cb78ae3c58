"""Pixtral: pictures of any size, a text token at the end of each row."""

from sievert.exporter.architectures.base import Architecture

PIXTRAL = Architecture(
    name="pixtral",
    model_class="LlavaForConditionalGeneration",
    towers={"pixtral": 0},
    decoders=("mistral",),
    image_size=(448, 448),
)
