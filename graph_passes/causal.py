"""Find what each layer attends to, and prove it on the exported mask, so that ``is_causal`` or a mask made anew may stand for it.

With right padding no real row of a causal layer sees a padded one, and no block holds one: the padding part of the mask is then not needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from sievert.bundle.errors import GraphError
from sievert.graph_passes.decoder import Decoder
from sievert.graph_passes.sight import CAUSAL, Sight, Sights, TwoWay


def prove_causal(decoder: Decoder, length: int) -> None:
    """Refuse a decoder with a layer whose rows see anything else than all rows up to themselves at ``length`` tokens without padding.

    Raises:
        GraphError: a layer whose mask is not causal at this length; the message names it.
    """
    for index, sight in enumerate(read_sights(decoder, length).layers):
        if not sight.causal:
            raise GraphError(
                f"layer {index} is not causal at {length} tokens: it has a sliding window of {sight.window}; lower --max-text or "
                "--max-new-tokens below the window, or use another model"
            )


def read_sights(decoder: Decoder, length: int, *, two_way: TwoWay = "none", prompt: int = 0, images: Sequence[int] = ()) -> Sights:
    """What each layer attends to at ``length`` tokens: read off its exported mask there, and proved on every pair of rows.

    ``two_way`` are the tokens that see one another in both directions: of ``images`` with so many tokens each, which are set between
    words here, or all ``prompt`` tokens that stand first. A window that is not shorter than ``length`` is none.

    Raises:
        GraphError: a layer whose mask is not what such a rule gives; the message names the layer and the first pair that differs. Or tokens
            that see both ways, and a decoder that was exported without them.
    """
    if (two_way != "none") != (decoder.two_way is not None):
        raise GraphError(
            f"the decoder {'has' if decoder.two_way is not None else 'lacks'} the input 'two_way', but the model's tokens that see one "
            f"another both ways are: {two_way}: export the model again"
        )
    block = _place_blocks(length, two_way, prompt, images)
    found: dict[ir.Value, Sight] = {}
    sights = []
    for layer in decoder.layers:
        if layer.mask is None:
            if two_way != "none":
                raise GraphError(f"layer {layer.index} has no mask in the exported graph, but tokens of this model see both ways")
            sights.append(CAUSAL)
            continue
        if layer.mask not in found:
            found[layer.mask] = _recognise(layer.index, _evaluate(decoder, layer.mask, block), block, two_way != "none")
        sights.append(found[layer.mask])
    return Sights(tuple(sights), two_way)


def _place_blocks(length: int, two_way: TwoWay, prompt: int, images: Sequence[int]) -> NDArray[np.int64]:
    """``[length]``: the block of each row, -1 of words; the last row is always a word."""
    block = np.full(length, -1, np.int64)
    if two_way == "prompt":
        block[: min(prompt, length - 1)] = 0
    if two_way == "images":
        start = 1
        for number, tokens in enumerate(images):
            block[start : min(start + tokens, length - 1)] = number
            start += tokens + 1
    return block


def _recognise(index: int, allowed: NDArray[np.bool_], block: NDArray[np.int64], two_way: bool) -> Sight:
    """The sight whose rule gives ``allowed[S, S]``."""
    seen = np.flatnonzero(allowed[-1])
    window = len(block) - int(seen[0]) if len(seen) and seen[0] else 0
    candidates = [Sight(window, two_way, clipped) for clipped in (True, False)]
    for sight in candidates:
        if np.array_equal(allowed, sight.allow(block)):
            return sight
    rule = candidates[0].allow(block)
    query, key = (int(number) for number in np.argwhere(allowed != rule)[0])
    verb = "sees" if allowed[query, key] else "does not see"
    kind = "causal but for blocks" if two_way else "causal"
    within = f" within the window of {window} tokens that its last row has" if window else ""
    raise GraphError(
        f"layer {index} is not {kind} at {len(block)} tokens: row {query} {verb} row {key}{within}; no rule that is known gives this "
        "mask: use another model"
    )


def _evaluate(decoder: Decoder, mask: ir.Value, block: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Which keys each query may see, ``[S, S]``, of one prompt without padding."""
    length = len(block)
    inputs = [decoder.inputs_embeds, decoder.attention_mask, decoder.position_ids]
    feeds = {
        "inputs_embeds": np.zeros((1, length, decoder.width), decoder.dtype.numpy()),
        "attention_mask": np.ones((1, length), np.int64),
        "position_ids": np.broadcast_to(np.arange(length, dtype=np.int64), decoder.position_shape(1, length)),
    }
    if decoder.two_way is not None:
        inputs.append(decoder.two_way)
        feeds["two_way"] = (block >= 0).astype(np.int64)[None]
    graph = ir.convenience.extract(decoder.model.graph, inputs, [mask])
    model = ir.Model(graph, ir_version=decoder.model.ir_version)
    value = np.asarray(next(iter(ReferenceEvaluator(ir.to_proto(model)).run(None, feeds))))
    # An additive mask holds 0 where attention is allowed and the dtype's minimum (at least 1e4 in magnitude) elsewhere.
    allowed = value if value.dtype == np.bool_ else value.astype(np.float32) > -1e4
    square: NDArray[np.bool_] = np.broadcast_to(allowed, (1, 1, length, length))[0, 0]
    return square
