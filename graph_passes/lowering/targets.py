"""The targets graphs are lowered for and judged against."""

from __future__ import annotations

from typing import Final, Literal, get_args

Target = Literal["onnxruntime", "onnxruntime-cuda", "tensorrt-rtx", "tensorrt"]

TARGETS: Final[tuple[Target, ...]] = get_args(Target)
BUILDERS: Final[frozenset[Target]] = frozenset({"tensorrt-rtx", "tensorrt"})
