"""Inputs and outputs of a foreign decoder under the names and in the form of the contract.

Before::

    tokens[B, S] -> Gather -> layers -> logits, past_key_values.layers.{i}.keys ...   (positions counted in the graph)

After::

    inputs_embeds[B, S, D], attention_mask[B, S], position_ids[B, S] -> layers -> logits, present.{i}.key/.value
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import RemoveUnusedNodesPass
from onnx_ir.tape import Tape
from onnxscript import GraphBuilder

from sievert.graph_passes.foreign.match import (
    Mismatch,
    at,
    inputs_behind,
    insert_first,
    integer_constant,
    integers,
    nodes_of,
    producer,
    scalar,
)
from sievert.graph_passes.instance import Instance

_NORMS = ("RMSNormalization", "LayerNormalization")


@dataclass(frozen=True)
class Roles:
    """What the source's inputs are for, by their names; None where it has none. Of ``ids`` and ``embeds`` it has one."""

    ids: str | None
    embeds: str | None
    mask: str | None
    positions: str | None


@dataclass(frozen=True)
class Named:
    """The graph with its inputs in the contract's form, and its embedding, ``input_ids`` to ``inputs_embeds``, if the source had it."""

    roles: Roles
    embedding: ir.Model | None


def name_inputs(model: ir.Model) -> Mismatch | Named:
    """Find what each input is for by what it reaches, and put the contract's inputs in their place."""
    graph = model.graph
    stream = _find_stream(graph)
    if isinstance(stream, Mismatch):
        return stream
    masks = [node.inputs[3] for node in nodes_of(graph, "Attention") if len(node.inputs) > 3 and node.inputs[3] is not None]
    rotary = [value for node in nodes_of(graph, "RotaryEmbedding") for value in node.inputs[1:3] if value is not None]
    if not rotary:
        return Mismatch("no RotaryEmbedding, and no rotary embedding spelled out that is known: positions cannot be followed", "the model")
    starts, places = inputs_behind(graph, [stream]), inputs_behind(graph, rotary)
    if len(starts) != 1:
        return Mismatch(f"the residual stream of layer 0 comes from {_names(starts)}, expected ids or embeddings alone", f"{stream.name!r}")
    if len(places) > 1 or (places and (places[0].shape is None or len(places[0].shape) != 2)):
        shapes = ", ".join(f"{value.name!r}{value.shape}" for value in places)
        return Mismatch(f"rotary embedding reads {shapes}, expected one input of positions [batch, sequence]", "the rotary tables")
    padding = [value for value in inputs_behind(graph, masks) if value not in places]
    if len(padding) > 1 or starts[0] in (*padding, *places):
        return Mismatch(f"the masks read {_names(padding)}, expected one input [batch, sequence]", "the attention mask")
    others = [value for value in graph.inputs if value not in (*starts, *places, *padding) and value.uses()]
    # An input that only lengths are taken of does nothing else: the mask may be one.
    others = [value for value in others if any(node.op_type != "Shape" for node, _ in value.uses())]
    if others:
        return Mismatch(f"inputs whose purpose is not known: {_names(others)}", "the inputs")
    given = starts[0]
    roles = Roles(
        ids=None if given is stream else str(given.name),
        embeds=str(given.name) if given is stream else None,
        mask=str(padding[0].name) if padding else _only_measured(graph, [*starts, *places]),
        positions=str(places[0].name) if places else None,
    )
    embedding = None
    if given is not stream:
        taken = _split_embedding(model, given, stream)
        if isinstance(taken, Mismatch):
            return taken
        embedding = taken
    embeds = next(value for value in graph.inputs if value.name == "inputs_embeds") if embedding else _rename(given, "inputs_embeds")
    mask = _put_mask(graph, next((value for value in graph.inputs if value.name == roles.mask), None))
    positions = _put_positions(graph, places[0] if places else None, rotary)
    if isinstance(positions, Mismatch):
        return positions
    for value in list(graph.inputs):
        if value not in (embeds, mask, positions) and value.uses():
            return Mismatch(f"the input {value.name!r} is still read", at(next(iter(value.uses()))[0]))
    graph.inputs.clear()
    graph.inputs.extend([embeds, mask, positions])
    return Named(roles, embedding)


def name_outputs(model: ir.Model, keys: Sequence[ir.Value], values: Sequence[ir.Value]) -> Mismatch | list[str]:
    """Rename logits and caches; ``keys`` and ``values`` are the fresh ones of each layer. Gives the names of outputs that are left out."""
    graph = model.graph
    kept: dict[str, ir.Value] = {}
    rest = []
    for value in graph.outputs:
        for part, layers in (("key", keys), ("value", values)):
            if value in layers:
                kept[f"present.{layers.index(value)}.{part}"] = value
                break
        else:
            rest.append(value)
    caches = [value for value in rest if value.shape is not None and len(value.shape) == 4]
    if caches:
        return Mismatch(
            f"the cache output {caches[0].name!r} is not the keys or values that a layer's attention reads", at(caches[0].producer())
        )
    if kept and len(kept) != 2 * len(keys):
        return Mismatch(f"{len(kept)} cache outputs for {len(keys)} layers of attention, expected none or two each", "the outputs")
    logits = [value for value in rest if value.name == "logits"] or [
        value for value in rest if value.shape is None or len(value.shape) == 3
    ]
    if len(logits) != 1:
        return Mismatch(f"outputs that could be the logits: {_names(logits)}; expected one, or one of that name", "the outputs")
    for value in rest:
        if value is not logits[0] and value.name is not None:
            value.name = f"{value.name}.unused"
    dropped = [str(value.name).removesuffix(".unused") for value in rest if value is not logits[0]]
    kept["logits"] = logits[0]
    graph.outputs.clear()
    for name in sorted(kept, key=lambda name: (name != "logits", name)):
        kept[name].name = name
        graph.outputs.append(kept[name])
    return dropped


def _find_stream(graph: ir.Graph) -> ir.Value | Mismatch:
    """The residual stream that enters layer 0: what the norm before the first attention reads."""
    first = next(iter(nodes_of(graph, "Attention")), None)
    if first is None:
        return Mismatch("no Attention, and no attention spelled out around a Softmax: this is no decoder that can be read", "the model")
    value = first.inputs[0]
    seen_product = False
    while value is not None and (node := value.producer()) is not None:
        if node.op_type in _NORMS and seen_product:
            return node.inputs[0] if node.inputs[0] is not None else Mismatch("a norm misses its input", at(node))
        seen_product |= node.op_type in ("MatMul", "Gemm")
        operands = [each for each in node.inputs if each is not None and ir.convenience.get_const_tensor(each) is None]
        value = operands[0] if operands else None
    return Mismatch("before the first attention stands no norm of a residual stream", at(first))


def _split_embedding(model: ir.Model, ids: ir.Value, stream: ir.Value) -> ir.Model | Mismatch:
    """Cut the graph at ``stream``; gives the embedding in the form of the contract's graph, image features merged in."""
    graph = model.graph
    lookups = [node for node, place in ids.uses() if node.op_type == "Gather" and place == 1]
    table = lookups[0].inputs[0] if len(lookups) == 1 else None
    others = [node for node, _ in ids.uses() if node.op_type != "Shape" and node not in lookups]
    width = None if stream.shape is None else stream.shape[-1]
    if table is None or others or stream.dtype is None or not isinstance(width, int):
        return Mismatch(f"{ids.name!r} is not looked up once in an embedding table", at(others[0] if others else None))
    embedding = _build_embedding(model, ids, stream, width)
    embeds = ir.val("inputs_embeds", stream.dtype, ("batch", "sequence", width))
    ir.convenience.replace_all_uses_with(stream, embeds)
    RemoveUnusedNodesPass()(model)
    for node, _ in list(ids.uses()):
        if node.op_type == "Shape":
            start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", 2)
            node.attributes["start"] = ir.AttrInt64("start", start if start >= 0 else start + 2)
            node.attributes["end"] = ir.AttrInt64("end", min(end if end >= 0 else end + 2, 2))
            node.replace_input_with(0, embeds)
    graph.inputs.append(embeds)
    return embedding


def _build_embedding(model: ir.Model, ids: ir.Value, stream: ir.Value, width: int) -> ir.Model:
    """``input_ids``, ``image_features``, ``visual_index`` to ``inputs_embeds``: text embedded, features in the rows of the images."""
    dtype = stream.dtype
    graph = ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="embed_tokens")
    build = GraphBuilder(graph)
    op = build.op
    input_ids = build.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
    features = build.input("image_features", dtype, ["batch", "visual", width])
    visual_index = build.input("visual_index", ir.DataType.INT64, ["batch", "visual"])
    given = input_ids if ids.dtype in (None, ir.DataType.INT64) else op.Cast(input_ids, to=ids.dtype)
    text = Instance(build, model.graph, scope="text", bound={ids: given}, weights={}).get(stream)
    batch = op.Squeeze(op.Shape(visual_index, start=0, end=1), [0])
    samples = op.Expand(op.Unsqueeze(op.Range(0, batch, 1), [1]), op.Shape(visual_index))  # [B, Nv]
    places = op.Concat(op.Unsqueeze(samples, [2]), op.Unsqueeze(visual_index, [2]), axis=2)  # [B, Nv, 2]
    merged = op.ScatterND(text, places, features)
    merged.type, merged.shape = stream.type, ir.Shape(("batch", "sequence", width))
    build.add_output(merged, "inputs_embeds")
    return ir.Model(graph, ir_version=11, producer_name="sievert")


def _only_measured(graph: ir.Graph, taken: Sequence[ir.Value]) -> str | None:
    """An input of two axes that is left and not read: the mask of a graph that folded it away."""
    left = [value for value in graph.inputs if value not in taken and value.shape is not None and len(value.shape) == 2]
    return str(left[0].name) if len(left) == 1 else None


def _put_mask(graph: ir.Graph, old: ir.Value | None) -> ir.Value:
    """``attention_mask[B, S]`` int64 in the place of the source's mask, whatever type that has."""
    mask = ir.val("attention_mask", ir.DataType.INT64, ("batch", "sequence"))
    if old is not None:
        content = _of_type(graph, mask, old)
        for node, place in list(old.uses()):
            node.replace_input_with(place, mask if node.op_type == "Shape" else content)
        old.name = f"{old.name}.source"
    return mask


def _of_type(graph: ir.Graph, value: ir.Value, old: ir.Value) -> ir.Value:
    """The input ``value`` int64 in the type that ``old`` has, if that is another."""
    if old.dtype in (None, value.dtype):
        return value
    tape = Tape()
    content = tape.op("Cast", [value], {"to": old.dtype})
    content.type, content.shape = old.type, value.shape
    insert_first(graph, tape.nodes)
    return content


def _put_positions(graph: ir.Graph, old: ir.Value | None, rotary: Sequence[ir.Value]) -> ir.Value | Mismatch:
    """``position_ids[B, S]`` int64: the source's own input, or in the place of rows counted in the graph."""
    positions = ir.val("position_ids", ir.DataType.INT64, ("batch", "sequence"))
    if old is not None:
        ir.convenience.replace_all_uses_with(old, _of_type(graph, positions, old))
        old.name = f"{old.name}.source"
        return positions
    found = _find_counters(graph, rotary)
    if isinstance(found, Mismatch):
        return found
    for node in found:
        axes = integers(node.inputs[1]) or ()
        tape = Tape()
        rest = [axis for axis in axes if axis != 0]
        output = tape.op("Unsqueeze", [positions, integer_constant(tape, rest)]) if rest else tape.op("Identity", [positions])
        shape = node.outputs[0].shape
        output.type = ir.TensorType(ir.DataType.INT64)
        output.shape = None if shape is None else ir.Shape(["batch", *list(shape)[1:]])
        graph.insert_before(node, tape.nodes)
        ir.convenience.replace_all_uses_with(node.outputs[0], output)
    _widen(positions)
    return positions


def _widen(positions: ir.Value) -> None:
    """What follows was annotated for one row of positions: its batch is that of the prompts."""
    seen, stack = {positions}, [positions]
    while stack:
        for node in dict.fromkeys(node for node, _ in stack.pop().uses() if node.op_type not in ("RotaryEmbedding", "Shape")):
            for value in node.outputs:
                if value not in seen:
                    seen.add(value)
                    stack.append(value)
                    if value.shape is not None and len(value.shape) and value.shape[0] == 1:
                        value.shape = ir.Shape(["batch", *list(value.shape)[1:]])


def _find_counters(graph: ir.Graph, rotary: Sequence[ir.Value]) -> list[ir.Node] | Mismatch:
    """The nodes that make ``[1, S, ...]`` of the counted rows ``[S]`` that the rotary tables are computed from."""
    found: dict[ir.Node, None] = {}
    seen: set[ir.Value] = set()
    stack = list(rotary)
    while stack:
        value = stack.pop()
        node = value.producer()
        if value in seen or node is None:
            continue
        seen.add(value)
        counted = node.inputs[0] if node.op_type == "Unsqueeze" else None
        if counted is not None and _counts(graph, counted):
            if 0 not in (integers(node.inputs[1]) or ()):
                return Mismatch("rows are counted for the rotary tables along an unknown axis", at(node))
            found[node] = None
        elif node.op_type == "Range":
            return Mismatch("the rotary tables read counted rows in an unknown way", at(node))
        else:
            stack.extend(each for each in node.inputs if each is not None)
    return list(found) or Mismatch("the rotary tables read neither an input of positions nor counted rows", "the rotary tables")


def _counts(graph: ir.Graph, value: ir.Value) -> bool:
    """Whether ``value`` is 0, 1, 2...: a Range, to which a graph with a cache adds the (empty) cache's rows."""
    node = producer(value, "Range", "Add")
    if node is not None and node.op_type == "Add":
        ranges = [each for each in node.inputs if producer(each, "Range") is not None]
        rest = [each for each in node.inputs if each not in ranges]
        node = ranges[0].producer() if len(ranges) == len(rest) == 1 and ranges[0] and _evaluates_to(graph, rest[0], 0) else None
    return node is not None and scalar(node.inputs[0]) == 0 and scalar(node.inputs[2]) == 1


def _evaluates_to(graph: ir.Graph, value: ir.Value | None, number: int) -> bool:
    """Whether a value that no input is needed for is this number."""
    if value is None or inputs_behind(graph, [value]):
        return False
    try:
        part = ir.convenience.extract(graph, [], [value])
    except ValueError:  # it reads the shape of an input
        return False
    found = np.asarray(next(iter(ReferenceEvaluator(ir.to_proto(ir.Model(part, ir_version=10))).run(None, {}))))
    return found.size == 1 and int(found.reshape(-1)[0]) == number


def _rename(value: ir.Value, name: str) -> ir.Value:
    value.name = name
    if value.shape is not None and len(value.shape) == 3:
        value.shape = ir.Shape(["batch", "sequence", value.shape[2]])
    return value


def _names(values: Sequence[ir.Value]) -> str:
    return ", ".join(repr(value.name) for value in values) or "nothing"
