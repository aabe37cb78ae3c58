"""Qwen3-VL: pictures of any size, merged patches, positions of three axes, features added behind the first layers (DeepStack)."""

from sievert.exporter.architectures.base import Architecture, Video

QWEN3_VL = Architecture(
    name="qwen3-vl",
    model_class="Qwen3VLForConditionalGeneration",
    towers={"qwen3_vl_vision": 0},
    decoders=("qwen3_vl_text",),
    image_size=(448, 448),
    video=Video(whole=True),
)
