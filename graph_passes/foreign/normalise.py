"""A decoder that another tool exported, in the form the splice knows: one visible list of steps, each of which says what it matched."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import onnx_ir as ir
from onnx_ir.passes import common

from sievert.bundle.errors import GraphError
from sievert.graph_passes.decoder import Decoder, find_decoder
from sievert.graph_passes.foreign.caches import Past, cut_past, drop_past
from sievert.graph_passes.foreign.causality import write_masks
from sievert.graph_passes.foreign.clean import clean
from sievert.graph_passes.foreign.fuse_attention import fuse_attention
from sievert.graph_passes.foreign.head import turn_head
from sievert.graph_passes.foreign.heads import split_heads
from sievert.graph_passes.foreign.interface import Named, Roles, name_inputs, name_outputs
from sievert.graph_passes.foreign.match import Mismatch, nodes_of, producer

_REPEAT = ("Reshape", "Expand", "Unsqueeze")


@dataclass(frozen=True)
class ForeignDecoder:
    """A decoder in the contract's form. ``model`` takes inputs_embeds, attention_mask, position_ids and gives logits and present.*.

    ``embedding`` is its ``embed_tokens``, None of a source that takes embeddings. ``roles`` and ``past`` say what the source's own inputs
    are for, ``max_positions`` how many positions its tables have (None: as many as one likes), ``matched`` what was found on the way.
    """

    model: ir.Model
    decoder: Decoder
    embedding: ir.Model | None
    roles: Roles
    past: tuple[Past, ...]
    max_positions: int | None
    matched: tuple[str, ...]


@dataclass
class _Progress:
    """What the steps found so far."""

    model: ir.Model
    matched: list[str]
    named: Named | None = None
    past: tuple[Past, ...] = ()


def check_lengths(model: ir.Model) -> None:
    """Refuse a graph of one batch or one length: its reshapes hold these as numbers, and no other can be made of it.

    Raises:
        GraphError: an input whose batch or length is fixed; the message names it.
    """
    for value in model.graph.inputs:
        shape = value.shape
        floats = value.dtype is not None and value.dtype.is_floating_point()
        if value.is_initializer() or shape is None or len(shape) not in ((3, 4) if floats else (2,)):
            continue
        for axis, what in ((0, "batch"), (2 if len(shape) == 4 else 1, "length")):
            size = shape[axis]
            if isinstance(size, int) or str(size.value).isdigit():
                raise GraphError(
                    f"the input {value.name!r}{shape} has a fixed {what}: static graphs of other sizes cannot be made of it. "
                    "Export it with dynamic axes for batch and length"
                )


def normalise(model: ir.Model) -> ForeignDecoder:
    """Bring ``model`` into form; it is changed on the way and may be left half done by an error.

    Raises:
        GraphError: a step did not find what it needs; the message says what was found before, why it stopped and where.
    """
    progress = _Progress(model, [])
    for name, step in _STEPS:
        try:
            wrong = step(progress)
        except GraphError as error:  # find_decoder's own
            raise _refuse(name, str(error), progress) from error
        if wrong is not None:
            raise _refuse(name, str(wrong), progress)
    assert progress.named is not None  # noqa: S101 - a step has set it
    decoder = find_decoder(model)
    return ForeignDecoder(
        model=model,
        decoder=decoder,
        embedding=progress.named.embedding,
        roles=progress.named.roles,
        past=progress.past,
        max_positions=_count_positions(model),
        matched=tuple(progress.matched),
    )


def _refuse(step: str, reason: str, progress: _Progress) -> GraphError:
    matched = "; ".join(progress.matched) or "nothing"
    return GraphError(f"this graph cannot be read as a decoder. Matched: {matched}. Stopped at {step}: {reason}")


def _clean(progress: _Progress) -> Mismatch | None:
    done = clean(progress.model)
    if isinstance(done, Mismatch):
        return done
    progress.matched += done
    return None


def _find_attention(progress: _Progress) -> Mismatch | None:
    whole = len(list(nodes_of(progress.model.graph, "Attention")))
    fused = fuse_attention(progress.model)
    if isinstance(fused, Mismatch):
        return fused
    if not whole + fused:
        return Mismatch("no Attention, and no attention spelled out around a Softmax", "the model")
    progress.matched.append(f"{whole + fused} layers of attention" + (f", {fused} of them spelled out" if fused else ""))
    return None


def _split_heads(progress: _Progress) -> Mismatch | None:
    split = split_heads(progress.model)
    if isinstance(split, Mismatch):
        return split
    if split:
        progress.matched.append(f"{split} with a cache or all heads in one axis")
    return None


def _cut_past(progress: _Progress) -> Mismatch | None:
    past = cut_past(progress.model)
    if isinstance(past, Mismatch):
        return past
    progress.past = tuple(past)
    if past:
        progress.matched.append(f"{len(past)} cache inputs ({past[0].name}, ...)")
    return None


def _write_masks(progress: _Progress) -> Mismatch | None:
    done = write_masks(progress.model)
    return done if isinstance(done, Mismatch) else None


def _name_inputs(progress: _Progress) -> Mismatch | None:
    common.RemoveUnusedNodesPass()(progress.model)
    named = name_inputs(progress.model)
    if isinstance(named, Mismatch):
        return named
    drop_past(progress.model.graph, list(progress.past))
    progress.named = named
    roles = named.roles
    progress.matched.append(
        f"inputs {roles.ids or roles.embeds!r}, mask {roles.mask or 'none'}, positions {roles.positions or 'counted in the graph'}"
    )
    return None


def _name_outputs(progress: _Progress) -> Mismatch | None:
    keys, values = [], []
    for node in nodes_of(progress.model.graph, "Attention"):
        key, value = (_strip_repeat(each) for each in node.inputs[1:3])
        keys.append(key)
        values.append(value)
    dropped = name_outputs(progress.model, keys, values)
    if isinstance(dropped, Mismatch):
        return dropped
    progress.matched.append("logits and caches" + (f"; left out: {', '.join(dropped)}" if dropped else ""))
    return None


def _turn_head(progress: _Progress) -> Mismatch | None:
    done = turn_head(progress.model)
    return done if isinstance(done, Mismatch) else None


def _read_decoder(progress: _Progress) -> Mismatch | None:
    common.CommonSubexpressionEliminationPass()(progress.model)
    common.RemoveUnusedNodesPass()(progress.model)
    common.TopologicalSortPass()(progress.model)
    progress.model.graph.name = "decoder"
    find_decoder(progress.model)
    return None


_STEPS: tuple[tuple[str, Callable[[_Progress], Mismatch | None]], ...] = (
    ("operators", _clean),
    ("attention", _find_attention),
    ("caches", _cut_past),
    ("heads", _split_heads),
    ("masks", _write_masks),
    ("inputs", _name_inputs),  # after the caches, whose lengths the inputs' lengths are confused with
    ("outputs", _name_outputs),  # after the heads: a cache output is a layer's fresh key or value
    ("lm_head", _turn_head),  # after the outputs: logits have their name
    ("layers", _read_decoder),
)


def _strip_repeat(value: ir.Value | None) -> ir.Value:
    """Keys or values before they are repeated for grouped heads."""
    current = value
    for op in _REPEAT:
        node = producer(current, op)
        if node is None:
            break
        current = node.inputs[0]
    else:
        value = current
    assert value is not None  # noqa: S101 - attention has keys and values
    return value


def _count_positions(model: ir.Model) -> int | None:
    """How many rows a table of the rotary embedding has, where positions are looked up."""
    position_ids = next(value for value in model.graph.inputs if value.name == "position_ids")
    rows = [
        node.inputs[0].const_value.shape[0]
        for node, place in position_ids.uses()
        if node.op_type == "Gather" and place == 1 and node.inputs[0] is not None and node.inputs[0].const_value is not None
    ]
    return min((row for row in rows if isinstance(row, int)), default=None)
