"""The model families that can be exported: one file of data each, registered here."""

from sievert.exporter.architectures.base import Architecture
from sievert.exporter.architectures.llava import LLAVA

ARCHITECTURES: tuple[Architecture, ...] = (LLAVA,)

__all__ = ["ARCHITECTURES", "Architecture", "supported"]


def supported() -> str:
    """The supported families, for messages and listings."""
    return "; ".join(str(architecture) for architecture in ARCHITECTURES)
