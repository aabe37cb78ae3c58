"""Idefics3: a picture in tiles with text between them, its small version last, patches merged."""

from sievert.exporter.architectures.base import Architecture

IDEFICS3 = Architecture(
    name="idefics3",
    model_class="Idefics3ForConditionalGeneration",
    towers={"idefics3_vision": 0},
    decoders=("llama",),
)
