"""The model families that can be exported: one file of data each, registered here."""

from sievert.exporter.architectures.base import Architecture
from sievert.exporter.architectures.gemma3 import GEMMA3
from sievert.exporter.architectures.idefics3 import IDEFICS3
from sievert.exporter.architectures.internvl import INTERNVL
from sievert.exporter.architectures.llava import LLAVA
from sievert.exporter.architectures.llava_next import LLAVA_NEXT
from sievert.exporter.architectures.llava_onevision import LLAVA_ONEVISION
from sievert.exporter.architectures.mistral3 import MISTRAL3
from sievert.exporter.architectures.paligemma import PALIGEMMA
from sievert.exporter.architectures.pixtral import PIXTRAL
from sievert.exporter.architectures.qwen2_5_vl import QWEN2_5_VL
from sievert.exporter.architectures.qwen2_vl import QWEN2_VL
from sievert.exporter.architectures.qwen3_vl import QWEN3_VL
from sievert.exporter.architectures.smolvlm import SMOLVLM

ARCHITECTURES: tuple[Architecture, ...] = (
    LLAVA,
    PIXTRAL,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    INTERNVL,
    IDEFICS3,
    SMOLVLM,
    MISTRAL3,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    GEMMA3,
    PALIGEMMA,
)

__all__ = ["ARCHITECTURES", "Architecture", "supported"]


def supported() -> str:
    """The supported families, for messages and listings."""
    return "; ".join(str(architecture) for architecture in ARCHITECTURES)
