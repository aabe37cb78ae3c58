"""Which modules a node says it comes from, outermost first: of the model that was exported, or of what passes built."""

from __future__ import annotations

import ast
import re
from typing import Final

import onnx_ir as ir

EXPORTED: Final = "pkg.torch.onnx.name_scopes"
BUILT: Final = "pkg.onnxscript.name_scopes"
_LAYER: Final = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")


def read_exported(node: ir.Node) -> list[str]:
    """Modules of the exported model, the last the operation itself; none where a pass built the node."""
    return _parse(node.metadata_props.get(EXPORTED, ""))


def read_built(node: ir.Node) -> list[str]:
    """Modules that a pass pushed; none where the exporter made the node."""
    return _parse(node.metadata_props.get(BUILT, ""))


def read_layers(node: ir.Node) -> list[int]:
    """The numbers of the layers among the modules of the exported model."""
    return [int(found[1]) for scope in read_exported(node) if (found := _LAYER.search(scope))]


def _parse(text: str) -> list[str]:
    try:
        found = ast.literal_eval(text) if text else []
    except (ValueError, SyntaxError):
        return []
    return [str(part) for part in found] if isinstance(found, list) else []
