"""Which module of the model a node comes from."""

from __future__ import annotations

from collections import deque
from typing import Final

import onnx_ir as ir

from sievert.graph_passes.scopes import read_built, read_exported

_SELECTOR: Final = "select."
_LOWERED: Final = "lower."
_ROTARY: Final = "rotary_emb"


def find_scope(node: ir.Node) -> str:
    """The module a node belongs to: ``model.layers.3.mlp``, or ``select.0/round.2`` of a selector; empty where nothing says so.

    A node that a pass put in (a fused attention, or one written out for an engine; a cache update) has that of the nearest node it reads
    from, and where it reads only inputs, of the nearest that reads it.
    """
    if found := _own_scope(node):
        return found
    return _nearest(node, upward=True) or _nearest(node, upward=False)


def is_float32_island(scope: str) -> bool:
    """Whether a 16-bit export computes this module in float32: a selector's arithmetic, and the tables of rotary positions."""
    return scope.startswith(_SELECTOR) or _ROTARY in scope


def _own_scope(node: ir.Node) -> str:
    torch = read_exported(node)
    if torch:
        return torch[-2] if len(torch) > 1 else ""  # the last is the operation itself
    ours = read_built(node)
    return "" if ours and ours[0].startswith(_LOWERED) else "/".join(ours)


def _nearest(start: ir.Node, *, upward: bool) -> str:
    queue, seen = deque([start]), {start}
    while queue:
        node = queue.popleft()
        if found := _own_scope(node):
            return found
        for near in node.predecessors() if upward else node.successors():
            if near not in seen:
                seen.add(near)
                queue.append(near)
    return ""
