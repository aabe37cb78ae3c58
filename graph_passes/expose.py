"""Make inner values of a graph outputs, so that runtimes and parity can look at them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

import onnx_ir as ir

from sievert.bundle.errors import GraphError


def expose(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` with the values ``names`` as further outputs, in that order; names that are outputs already stay where they are.

    Inputs, outputs, weights and all names are kept. Graph inputs cannot be exposed: the caller has them.

    Raises:
        GraphError: a name no node of the graph computes (the message lists those that come near), or one without type and shape.
    """
    exposed = model.clone()
    graph = exposed.graph
    computed = {str(value.name): value for node in graph for value in node.outputs if value.name}
    outputs = {str(value.name) for value in graph.outputs}
    for name in dict.fromkeys(names):
        if name in outputs:
            continue
        if name not in computed:
            raise GraphError(_explain_missing(name, list(computed), {str(value.name) for value in graph.inputs}))
        value = computed[name]
        if value.dtype is None or value.shape is None:
            raise GraphError(f"{name!r} has dtype {value.dtype} and shape {value.shape}: an output needs both known; infer shapes first")
        graph.outputs.append(value)
    return exposed


def to_bytes(model: ir.Model) -> bytes:
    """The model as ONNX bytes; external weights stay references to their file, so ONNX Runtime must be told its folder.

    (``session.model_external_initializers_file_folder_path``.)
    """
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _explain_missing(name: str, computed: list[str], inputs: set[str]) -> str:
    if name in inputs:
        return f"{name!r} is an input of the graph, which the caller has already: expose a computed value"
    near = difflib.get_close_matches(name, computed, n=4, cutoff=0.5)
    stages = [value for value in computed if value.startswith("stage.")]
    return f"no node computes {name!r}; near it: {', '.join(near) or 'nothing'}; stage values: {', '.join(stages) or 'none'}"
