"""Which part of prefill a node belongs to: a layer, a selector, the head, or the bookkeeping of rows.

Copied nodes carry the scopes of the exporter and of their instance in the graph; nodes of the splice carry the module they were built
in, or none, and then belong where their inputs come from.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Final

import onnx_ir as ir

from sievert.bundle.plan import Plan
from sievert.graph_passes.scopes import read_layers

REST: Final = "rows and positions"
HEAD: Final = "head"
_INSTANCE: Final = re.compile(r"(front|tail\.\d+|last|head)\.")
_SELECTOR: Final = re.compile(r"select\.(\d+)(?:/|$)")


def name_parts(model: ir.Model, plan: Plan) -> dict[str, str]:
    """The part of every named node of a static prefill: ``layer 3``, ``selector 0``, ``head`` or ``rows and positions``.

    What a selector reads of the layer that is cut before (its projections of all rows) is computed for the selector, and belongs to it;
    so does the gathering of the rows that go on.
    """
    graph = model.graph
    layers = {node: found for node in graph if (found := _exported_layer(node)) is not None}
    # The instance that runs up to each cut goes beyond it only as far as the selector reads.
    ends = {("front", *(f"tail.{cut}" for cut in range(number)))[-1]: (stage.layer, number) for number, stage in enumerate(plan.stages)}
    parts: dict[ir.Node, str] = {}
    for node in graph:
        name = str(node.name)
        selector, instance = _SELECTOR.match(name), _instance(name)
        if selector is not None:
            parts[node] = _selector(int(selector[1]))
        elif node in layers:
            owner, layer = layers[node]
            parts[node] = _selector(ends[owner][1]) if owner in ends and layer >= ends[owner][0] else f"layer {layer}"
        elif instance is not None:
            parts[node] = HEAD if instance == HEAD else REST
        else:
            parts[node] = _follow(node, parts)
    return {str(node.name): part for node, part in parts.items()}


def find_part(parts: Mapping[str, str], node: str) -> str:
    """The part of a node as an engine names it: a fused one has a name behind that of a node it is made of, after a slash.

    Nodes that an engine made up are ``rows and positions``: seen of ONNX Runtime are only reshapes, which take no time.
    """
    name = node.rstrip("/")
    while name not in parts and "/" in name:
        name = name.rpartition("/")[0]
    return parts.get(name, REST)


def _exported_layer(node: ir.Node) -> tuple[str, int] | None:
    """The instance and the layer a node was copied for."""
    instance, numbers = _instance(str(node.name)), read_layers(node)
    return (instance, numbers[-1]) if instance is not None and numbers else None


def _instance(name: str) -> str | None:
    found = _INSTANCE.match(name)
    return None if found is None else found[1]


def _follow(node: ir.Node, parts: Mapping[ir.Node, str]) -> str:
    """The part of a node of the splice's own: a selector's if an input comes from one, else that of the last layer it reads."""
    sources = [parts.get(producer, REST) for value in node.inputs if value is not None and (producer := value.producer()) is not None]
    selectors, layers = ([part for part in sources if part.startswith(kind)] for kind in ("selector", "layer"))
    if HEAD in sources:
        return HEAD
    if selectors:
        return selectors[0]
    return max(layers, key=lambda part: int(part.split()[1]), default=REST)


def _selector(number: int) -> str:
    return f"selector {number}"
