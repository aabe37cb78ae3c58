"""SmolVLM and SmolVLM2: a picture in tiles with text between them, its small version last, patches merged."""

from sievert.exporter.architectures.base import Architecture, Video

SMOLVLM = Architecture(
    name="smolvlm",
    model_class="SmolVLMForConditionalGeneration",
    towers={"smolvlm_vision": 0},
    decoders=("llama",),
    processor="Idefics3Processor",
    video=Video(pixels="pixel_values", features="get_image_features", visual="image_token_id"),
)
