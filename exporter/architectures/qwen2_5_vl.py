"""Qwen2.5-VL: pictures of any size, a tower with windows, merged patches, positions of three axes."""

from sievert.exporter.architectures.base import Architecture, Video

QWEN2_5_VL = Architecture(
    name="qwen2.5-vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    towers={"qwen2_5_vl_vision": 0},
    decoders=("qwen2_5_vl_text",),
    image_size=(448, 448),
    video=Video(timed=True),
)
