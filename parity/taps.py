"""What selectors read of the decoder, collected from an unmodified layer while it runs."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch

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
_FOUR_NORMS: Final = {
    "attention_in": "input_layernorm",
    "attention_out": "post_attention_layernorm",
    "mlp_in": "pre_feedforward_layernorm",
    "mlp_out": "post_feedforward_layernorm",
}
"""Where what is added to the stream is normed once more: outputs are taken before the addition, so after that norm."""
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
    modules = _FOUR_NORMS if hasattr(layer, "pre_feedforward_layernorm") else _MODULES
    watched = {kind: getattr(layer, modules[kind]) for kind in kinds if kind in _MODULES}
    names = {_HEADS[kind] for kind in kinds if kind in _HEADS}
    watched |= {name: getattr(attention, f"{name}_proj") for name in names}
    found: dict[str, Array] = {}
    with watch_outputs(watched) as seen, watch_arguments(attention) as arguments:
        yield found
    d = attention.head_dim
    # Some norm the heads before they are put first, some after: here always before, so that the axes are known.
    seen |= {name: _norm_heads(attention, name, seen[name], d) for name in names}
    tensors = {name: tensor[0].double().numpy().copy() for name, tensor in seen.items()}
    for kind in kinds:
        if kind in _MODULES:
            found[kind] = tensors[kind]
        elif kind in _HEADS:
            heads = tensors[_HEADS[kind]].transpose(1, 0, 2)
            found[kind] = _rotate(heads, arguments["position_embeddings"]) if kind.endswith("_rotary") else heads


def _norm_heads(attention: Any, name: str, projected: torch.Tensor, d: int) -> torch.Tensor:
    """``[1, S, heads, d]``: the product of a projection as it is rotated, by the layer's own norm of it where it has one."""
    heads = projected.reshape(*projected.shape[:-1], -1, d)
    norm = getattr(attention, f"{name}_norm", None)
    if norm is None:
        return heads
    normed: torch.Tensor = norm(heads) if norm.weight.shape[-1] == d else norm(projected).reshape(heads.shape)
    return normed.detach()


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
