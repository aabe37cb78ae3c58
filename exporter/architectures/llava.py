"""LLaVA 1.5 and its kin: one image of fixed size, tower, two-layer projector, decoder."""

from sievert.exporter.architectures.base import Architecture, Tower

LLAVA = Architecture(
    name="llava",
    model_class="LlavaForConditionalGeneration",
    towers={"clip_vision_model": 1, "siglip_vision_model": 0},
    decoders=("llama", "mistral", "qwen2", "qwen3"),
    tower=Tower(
        encoder="model.vision_tower",
        projector="model.multi_modal_projector",
        feature_layer="vision_feature_layer",
        feature_select="vision_feature_select_strategy",
        leading_dropped={"default": 1, "full": 0},
    ),
)
