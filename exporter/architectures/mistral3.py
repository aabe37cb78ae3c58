"""Mistral Small 3.1: pictures of any size, merged patches, a text token at the end of each row."""

from sievert.exporter.architectures.base import Architecture

MISTRAL3 = Architecture(
    name="mistral3",
    model_class="Mistral3ForConditionalGeneration",
    towers={"pixtral": 0},
    decoders=("mistral",),
    image_size=(448, 448),
)
