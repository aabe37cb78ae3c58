"""Find the layers of a decoder graph: the values around each Attention that selectors read and the splice cuts at.

The structure is read from data flow (Attention, RotaryEmbedding, the projections before them, the residual adds) and confirmed by the
module scopes the exporter leaves on the nodes and by the cache outputs; a contradiction is an error, never a guess.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, TypeVar

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.graph_passes.scopes import read_layers

_SHAPE_OPS: Final = frozenset({"Transpose", "Reshape", "Cast", "Squeeze", "Unsqueeze"})
_NORM_OPS: Final = frozenset({"RMSNormalization", "LayerNormalization"})
Size = TypeVar("Size", bound=int | str)
_CAP_OPS: Final = frozenset({"Cast", "Div", "Mul", "Tanh"})


@dataclass(frozen=True)
class Layer:
    """Values of one decoder layer in the dynamic graph (shapes as :data:`~sievert.graph_passes.selectors.base.TapKind` states).

    ``attended[B, H, S, d]`` is what the rest of the layer consumes of attention: everything between q, k, v and it is attention itself,
    mask included, and is what the passes replace. ``softcap`` bounds the scores, ``softcap * tanh(score / softcap)``; 0 leaves them.
    """

    index: int
    residual: ir.Value
    attention_in: ir.Value
    q: ir.Value
    k: ir.Value
    v: ir.Value
    q_rotary: ir.Value
    k_rotary: ir.Value
    mask: ir.Value | None
    attended: ir.Value
    attention_out: ir.Value
    mlp_in: ir.Value
    mlp_out: ir.Value
    residual_out: ir.Value
    scale: float
    softcap: float


@dataclass(frozen=True)
class Decoder:
    """A dynamic decoder graph and what was found in it. ``head_weight`` is the lm_head parameter ``[V, D]``, ``head`` its product.

    ``two_way[B, S]`` is the input that marks tokens that see one another both ways, None where there are none.
    """

    model: ir.Model
    layers: tuple[Layer, ...]
    inputs_embeds: ir.Value
    attention_mask: ir.Value
    position_ids: ir.Value
    two_way: ir.Value | None
    logits: ir.Value
    head: ir.Value
    head_input: ir.Value
    head_weight: ir.Value
    heads: int
    kv_heads: int
    head_size: int
    width: int
    dtype: ir.DataType

    @property
    def depth(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def position_axes(self) -> int:
        """How many numbers a token's position has."""
        shape = self.position_ids.shape
        return _static_axis(self.position_ids, 0) if shape is not None and len(shape) == 3 else 1

    def position_shape(self, batch: int, length: Size) -> list[int | Size]:
        """Of position ids: ``[B, S]``, or ``[axes, B, S]`` where there are several."""
        return [*([self.position_axes] if self.position_axes > 1 else ()), batch, length]


def find_decoder(model: ir.Model) -> Decoder:
    """The layers of a dynamic decoder (graph contract: ``inputs_embeds, attention_mask, position_ids -> logits, present.*``).

    Raises:
        GraphError: an input is missing, or a layer's structure is not the expected one; the message names the node.
    """
    graph = model.graph
    inputs = {value.name: value for value in graph.inputs}
    for name in ("inputs_embeds", "attention_mask", "position_ids"):
        if name not in inputs:
            raise GraphError(f"the decoder has no input {name!r} (it has {sorted(map(str, inputs))}): export it with sievert export")
    outputs = {value.name: value for value in graph.outputs}
    if "logits" not in outputs:
        raise GraphError(f"the decoder has no output 'logits' (it has {sorted(map(str, outputs))[:4]}...)")
    attentions = [node for node in graph if node.op_type == "Attention"]
    if not attentions:
        raise GraphError(
            "no Attention operator in the decoder: the exporter decomposed it. Export at opset 23, with the versions pinned in "
            "constraints.txt"
        )
    layers = tuple(_find_layer(node, index) for index, node in enumerate(attentions))
    for before, after in pairwise(layers):
        if before.residual_out is not after.residual:
            raise GraphError(
                f"layer {after.index} does not start where layer {before.index} ends: {_name(after.residual)} is not its output"
            )
    for layer in layers:
        for kind, value in (("key", layer.k_rotary), ("value", layer.v)):
            present = outputs.get(f"present.{layer.index}.{kind}")
            if present is not None and present is not value:
                raise GraphError(f"present.{layer.index}.{kind} is not the {kind} that layer {layer.index}'s attention reads")
    head, head_input, weight = _find_head(outputs["logits"])
    first = layers[0]
    return Decoder(
        model=model,
        layers=layers,
        inputs_embeds=inputs["inputs_embeds"],
        attention_mask=inputs["attention_mask"],
        position_ids=inputs["position_ids"],
        two_way=inputs.get("two_way"),
        logits=outputs["logits"],
        head=head,
        head_input=head_input,
        head_weight=weight,
        heads=_static_axis(first.q_rotary, 1),
        kv_heads=_static_axis(first.k_rotary, 1),
        head_size=_static_axis(first.k_rotary, 3),
        width=_static_axis(inputs["inputs_embeds"], 2),
        dtype=_dtype(inputs["inputs_embeds"]),
    )


def _find_layer(attention: ir.Node, index: int) -> Layer:
    confirm_scope(attention, index)
    q_rotary, key, value, *rest = list(attention.inputs)
    mask = rest[0] if rest else None
    if any(extra is not None for extra in rest[1:]) or len(attention.outputs) != 1:
        raise GraphError(f"layer {index}: {_where(attention)} has a cache inside the operator; expected fresh keys and values only")
    k_rotary, v = _strip_repeat(_given(key, attention)), _strip_repeat(_given(value, attention))
    q_rotary = _given(q_rotary, attention)
    q, k = _before_rotary(q_rotary, index, "query"), _before_rotary(k_rotary, index, "key")
    sources = {kind: _projection_input(value, index, kind) for kind, value in (("query", q), ("key", k), ("value", v))}
    attention_in = sources["query"]
    for kind, source in sources.items():
        if source is not attention_in:
            raise GraphError(f"layer {index}: the {kind} projection reads {_name(source)}, the query's reads {_name(attention_in)}")
    residual = _norm_input(attention_in, index)
    attended = _after_guard(attention.outputs[0])
    attention_out, middle = _residual_add(attended, residual, index, "attention")
    mlp_in = _only(
        (node.outputs[0] for node in _consumers(middle) if node.op_type in _NORM_OPS), f"layer {index}: one norm reading {_name(middle)}"
    )
    mlp_out, residual_out = _residual_add(mlp_in, middle, index, "mlp")
    scale = attention.attributes.get_float("scale", 0.0) or _static_axis(q_rotary, 3) ** -0.5
    softcap = attention.attributes.get_float("softcap", 0.0)
    values = (residual, attention_in, q, k, v, q_rotary, k_rotary, mask, attended, attention_out, mlp_in, mlp_out, residual_out)
    return Layer(index, *values, scale, softcap)


def _find_head(logits: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """The lm_head product behind ``logits``, its input and its weight as the checkpoint has it, ``[V, D]``."""
    value = logits
    while (node := value.producer()) is not None and node.op_type in _CAP_OPS:  # logits may be capped
        value = _given(node.inputs[0], node)
    if node is None or node.op_type != "MatMul":
        raise GraphError(f"logits come from {_where(node)}, expected the lm_head's MatMul")
    hidden, weight = _given(node.inputs[0], node), _given(node.inputs[1], node)
    transpose = weight.producer()
    if transpose is None or transpose.op_type != "Transpose" or _given(transpose.inputs[0], transpose).const_value is None:
        raise GraphError(f"the lm_head's weight {_name(weight)} is not a transposed parameter; export it with sievert export")
    return value, hidden, _given(transpose.inputs[0], transpose)


def confirm_scope(node: ir.Node, index: int) -> None:
    """Check that attention number ``index`` of a graph was exported from layer ``index``, where the exporter left its module's name.

    Raises:
        GraphError: it was exported from another one.
    """
    numbers = set(read_layers(node))
    if numbers and numbers != {index}:
        raise GraphError(
            f"attention number {index} ({_where(node)}) was exported from layer {sorted(numbers)}: a layer has no Attention or two"
        )


def _strip_repeat(value: ir.Value) -> ir.Value:
    """Undo the repetition of kv heads (Unsqueeze, Expand, Reshape): Attention takes grouped heads as they are."""
    chain: list[ir.Node] = []
    current: ir.Value | None = value
    for op in ("Reshape", "Expand", "Unsqueeze"):
        node = current.producer() if current is not None else None
        if node is None or node.op_type != op:
            return value
        chain.append(node)
        current = node.inputs[0]
    return _given(current, chain[-1])


def _before_rotary(value: ir.Value, index: int, kind: str) -> ir.Value:
    node = value.producer()
    if node is None or node.op_type != "RotaryEmbedding":
        raise GraphError(
            f"layer {index}: the {kind} comes from {_where(node)}, expected RotaryEmbedding (rotary missing, fused or decomposed)"
        )
    if node.attributes.get_int("rotary_embedding_dim", 0) not in (0, _static_axis(value, 3)):
        raise GraphError(f"layer {index}: {_where(node)} rotates only a part of the head (partial rotary), which is not supported")
    return _given(node.inputs[0], node)


def _projection_input(value: ir.Value, index: int, kind: str) -> ir.Value:
    """Walk from q, k or v back through reshapes, a head norm and a bias to the projection; its input is the normed stream."""
    current = value
    while (node := current.producer()) is not None:
        if node.op_type in {"MatMul", "Gemm"}:
            return _given(node.inputs[0], node)
        if node.op_type in _SHAPE_OPS | _NORM_OPS:
            current = _given(node.inputs[0], node)
        elif node.op_type in {"Add", "Mul"}:
            operands = [operand for operand in node.inputs if operand is not None and operand.const_value is None]
            current = _only(operands, f"layer {index}: a bias or gain at {_where(node)}")
        else:
            break
    raise GraphError(
        f"layer {index}: between the {kind} and its projection stands {_where(node)}, expected reshapes, a norm or a bias (fused qkv?)"
    )


def _norm_input(value: ir.Value, index: int) -> ir.Value:
    current = value
    while (node := current.producer()) is not None and node.op_type in {"Cast", "Mul"}:
        current = _given(node.inputs[0], node)
    if node is None or node.op_type not in _NORM_OPS:
        raise GraphError(f"layer {index}: attention reads {_where(node)}, expected the norm of the residual stream")
    return _given(node.inputs[0], node)


def _after_guard(attention: ir.Value) -> ir.Value:
    """The exporter wraps attention in Where(row masked entirely, 0, attention); no real row is, so the guard goes with the mask."""
    consumers = list(_consumers(attention))
    if len(consumers) == 1 and consumers[0].op_type == "Where" and consumers[0].inputs[2] is attention:
        return consumers[0].outputs[0]
    return attention


def _residual_add(start: ir.Value, stream: ir.Value, index: int, kind: str) -> tuple[ir.Value, ir.Value]:
    """The Add that joins what was computed from ``start`` to ``stream``: (its other operand, its output)."""
    reached, frontier = {start}, [start]
    while frontier:
        for node in _consumers(frontier.pop()):
            if node.op_type == "Add" and stream in node.inputs:
                return _only((v for v in node.inputs if v is not None and v is not stream), _where(node)), node.outputs[0]
            new = [value for value in node.outputs if value not in reached]
            reached.update(new)
            frontier.extend(new)
    raise GraphError(f"layer {index}: nothing adds the {kind}'s output to the residual stream {_name(stream)}")


def _consumers(value: ir.Value) -> Iterable[ir.Node]:
    return dict.fromkeys(node for node, _ in value.uses())


def _only(values: Iterable[ir.Value], what: str) -> ir.Value:
    found = list(values)
    if len(found) != 1:
        raise GraphError(f"{what}: expected exactly one, found {len(found)}")
    return found[0]


def _given(value: ir.Value | None, node: ir.Node) -> ir.Value:
    if value is None:
        raise GraphError(f"{_where(node)} misses an input")
    return value


def _static_axis(value: ir.Value, axis: int) -> int:
    size = None if value.shape is None else value.shape[axis]
    if isinstance(size, int):
        return size
    text = str(getattr(size, "value", size))
    if text.isdigit():  # the exporter writes some fixed axes as symbols that spell a number
        return int(text)
    raise GraphError(f"{_name(value)} has shape {value.shape}: axis {axis} should be a fixed number")


def _dtype(value: ir.Value) -> ir.DataType:
    if value.dtype is None:
        raise GraphError(f"{_name(value)} has no dtype")
    return value.dtype


def _name(value: ir.Value) -> str:
    return f"{value.name!r}"


def _where(node: ir.Node | None) -> str:
    return "a graph input" if node is None else f"{node.op_type} node {node.name!r}"
