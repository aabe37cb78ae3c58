"""Qwen2-VL: pictures of any size, merged patches, positions of three axes."""

from sievert.exporter.architectures.base import Architecture, Video

QWEN2_VL = Architecture(
    name="qwen2-vl",
    model_class="Qwen2VLForConditionalGeneration",
    towers={"qwen2_vl_vision": 0},
    decoders=("qwen2_vl_text",),
    image_size=(448, 448),
    video=Video(),
)
