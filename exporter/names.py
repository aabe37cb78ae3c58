"""Names that the graphs of a bundle go by."""

from __future__ import annotations

from typing import Final

OPSET: Final = 24
PRODUCER: Final = "sievert"
BATCH: Final = "batch"
SEQUENCE: Final = "sequence"
VISUAL: Final = "visual"
VISION_ENCODER: Final = "vision_encoder"
EMBED_TOKENS: Final = "embed_tokens"
DECODER: Final = "decoder"
SCOPES: Final = "pkg.torch.onnx.name_scopes"
"""Metadata key of a node's module path, as the tracer writes it."""


def vision_outputs(planes: int) -> tuple[str, ...]:
    """Names of the vision encoder's outputs in order: the features, then those that each of the first layers adds."""
    return ("image_features", *(f"deepstack.{plane}" for plane in range(planes)))


def decoder_outputs(depth: int) -> tuple[str, ...]:
    """Names of the decoder's outputs in order: logits, then the fresh keys and values of each layer."""
    return ("logits", *(f"present.{layer}.{part}" for layer in range(depth) for part in ("key", "value")))
