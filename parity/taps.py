"""What selectors read of the decoder, collected from an unmodified layer while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np

from sievert.bundle.errors import PlanError, UnsupportedModelError
from sievert.bundle.plan import Plan
from sievert.parity.hooks import watch_arguments, watch_outputs
from sievert.parity.selectors.base import Array, Tap
from sievert.parity.selectors.steps import ReferenceSelector

_HEADS: Final = {"q": "q", "q_rotary": "q", "k": "k", "k_rotary": "k", "v": "v"}
_MODULES: Final = {
    "attention_in": "input_layernorm",
    "attention_out": "self_attn",
    "mlp_in": "post_attention_layernorm",
    "mlp_out": "mlp",
}
OF_STREAM: Final = ("residual", "final_normed")
"""Kinds that are read off the stream entering a layer, before it runs."""


def list_taps(plan: Plan, selectors: Sequence[ReferenceSelector], depth: int) -> list[tuple[Tap, ...]]:
    """What each stage's selector reads.

    Raises:
        PlanError: a tensor that does not exist yet at the cut, or of a layer that ran on more tokens than are left.
    """
    wanted, since = list[tuple[Tap, ...]](), 0
    for stage, selector in zip(plan.stages, selectors, strict=True):
        taps = selector.taps(stage.layer, depth, since)
        for kind, layer in taps:
            if not since <= layer <= stage.layer:
                raise PlanError(f"{kind} of layer {layer} is not to be had at a cut before layer {stage.layer} after one at {since}")
        wanted.append(taps)
        since = stage.layer
    return wanted


@contextmanager
def watch_layer(layer: Any, kinds: Collection[str]) -> Iterator[dict[str, Array]]:
    """Collect tensors of a decoder layer that is called once in the block; they are there when the block has ended.

    q, k and v ``[heads, S, d]``, after any norm of theirs; the others ``[S, D]``; all float64. The layer sees one sample.
    """
    attention = layer.self_attn
    watched = {kind: getattr(layer, _MODULES[kind]) for kind in kinds if kind in _MODULES}
    names = {_HEADS[kind] for kind in kinds if kind in _HEADS}
    watched |= {name: getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj")) for name in names}
    found: dict[str, Array] = {}
    with watch_outputs(watched) as seen, watch_arguments(attention) as arguments:
        yield found
    d = attention.head_dim
    tensors = {name: tensor[0].double().numpy().copy() for name, tensor in seen.items()}
    for kind in kinds:
        if kind in _MODULES:
            found[kind] = tensors[kind]
        elif kind in _HEADS:
            heads = tensors[_HEADS[kind]].reshape(len(tensors[_HEADS[kind]]), -1, d).transpose(1, 0, 2)
            found[kind] = _rotate(heads, arguments["position_embeddings"]) if kind.endswith("_rotary") else heads


def _rotate(heads: Array, tables: Any) -> Array:
    """The rotary step, in float64 with the model's own cos and sin."""
    cos, sin = (table[0].double().numpy() for table in tables)
    d, half = heads.shape[-1], heads.shape[-1] // 2
    if cos.shape[-1] != d:
        raise UnsupportedModelError(f"rotary turns {cos.shape[-1]} of {d} elements of a head: partial rotary is not supported")
    # (a, b) -> (-b, a) over the two halves of a head, as transformers pairs them
    turned = np.concatenate([-heads[..., half:], heads[..., :half]], axis=-1)
    rotated: Array = heads * cos + turned * sin
    return rotated
