"""InternVL 2.5 to 3.5 as transformers has them: pictures in tiles, four patches merged into one token."""

from sievert.exporter.architectures.base import Architecture

INTERNVL = Architecture(
    name="internvl",
    model_class="InternVLForConditionalGeneration",
    towers={"internvl_vision": 1},
    decoders=("qwen2", "qwen3", "llama"),
)
