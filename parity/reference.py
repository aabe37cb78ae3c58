"""The PyTorch reference: the unmodified transformers model, one sample alone and unpadded, looked at through hooks.

Pruned runs call the model's own decoder layers one by one: layers before a cut on all tokens that are left, later ones on the kept
ones. A plan without stages is the unpruned model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from sievert.bundle.errors import UnsupportedModelError
from sievert.bundle.plan import Plan
from sievert.parity.hooks import stop_before, watch_arguments, watch_outputs
from sievert.parity.record import (
    EMBEDDINGS,
    LOGITS,
    VISION,
    ReferenceRecord,
    StageTrace,
    as_index,
    cache_names,
    end_cache_names,
    residual_name,
    scores_name,
    step_name,
)
from sievert.parity.selectors.base import Array, Index, TokenInputs
from sievert.parity.selectors.registry import reference_selector


@dataclass(frozen=True)
class ReferenceInputs:
    """One prompt: ``input_ids[S]`` int64 with the image's placeholders in it, ``pixel_values[3, H, W]``."""

    input_ids: Index
    pixel_values: NDArray[Any]


@dataclass
class ReferenceState:
    """A prompt that was read: caches of a length per layer, and the position that comes next without pruning."""

    cache: Any
    plan: Plan
    visual_tokens: int
    position: int
    logits: NDArray[np.float64]  # [V]


class Reference:
    """A ``LlavaForConditionalGeneration``; its weights and its forward are left alone.

    ``rounded_to`` is the dtype images are rounded to before they enter, as an engine of that dtype would receive them.
    """

    def __init__(self, model: Any, *, rounded_to: torch.dtype = torch.float32) -> None:
        self.model = model.eval()
        self.text = model.model.language_model
        self.layers: Sequence[Any] = self.text.layers
        self.image_token_id = int(model.config.image_token_id)
        self.rounded_to = rounded_to
        self.dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def embed(self, inputs: ReferenceInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The projected image features ``[Nv, D]`` and the merged embeddings ``[1, S, D]``, as the model's own forward makes them."""
        pixels = torch.from_numpy(np.asarray(inputs.pixel_values, np.float32)).to(self.rounded_to).to(self.dtype)
        ids = torch.from_numpy(as_index(inputs.input_ids))
        with watch_outputs({"features": self.model.model.multi_modal_projector}) as seen, stop_before(self.text) as arguments:
            self.model(input_ids=ids[None], pixel_values=pixels[None], attention_mask=torch.ones_like(ids)[None])
        return seen["features"][0], arguments["inputs_embeds"]

    @torch.inference_mode()
    def prefill(
        self, inputs: ReferenceInputs, plan: Plan, kept: Sequence[Index | None] | None = None
    ) -> tuple[ReferenceState, dict[str, NDArray[Any]], tuple[StageTrace, ...]]:
        """Read a prompt under ``plan``; ``kept[s]`` are original rows to go on with, or None to follow the float64 selectors.

        Returns the state, the arrays by name (``sievert.parity.record``) and what each cut saw.
        """
        features, hidden = self.embed(inputs)
        arrays: dict[str, NDArray[Any]] = {VISION: _numpy(features), EMBEDDINGS: _numpy(hidden[0])}
        visual = np.flatnonzero(as_index(inputs.input_ids) == self.image_token_id)
        rows, positions = np.arange(hidden.shape[1]), torch.arange(hidden.shape[1])[None]
        stages = {stage.layer: index for index, stage in enumerate(plan.stages)}
        traces: list[StageTrace] = []
        cache = DynamicCache()
        for number, layer in enumerate(self.layers):
            if number in stages:
                index = stages[number]
                trace = self._trace(number, hidden, positions, rows, visual, plan, index, None if kept is None else kept[index])
                traces.append(trace)
                arrays[residual_name(index)] = _numpy(hidden[0])
                if trace.selector.computes:
                    arrays[scores_name(index)] = trace.choice.scores
                stay = np.isin(rows, trace.kept) | ~np.isin(rows, visual)
                hidden, rows = hidden[:, stay], rows[stay]
                positions = positions[:, stay] if plan.positions == "keep" else torch.arange(len(rows))[None]
            hidden = self._call(layer, hidden, positions, cache)
        logits = _numpy(self.model.lm_head(self.text.norm(hidden[:, -1:]))[0, -1])
        state = ReferenceState(cache, plan, len(visual), len(inputs.input_ids), logits)
        arrays[LOGITS] = logits
        arrays |= _caches(cache, cache_names)
        return state, arrays, tuple(traces)

    @torch.inference_mode()
    def decode(self, state: ReferenceState, token: int) -> NDArray[np.float64]:
        """Feed one token and return the logits ``[V]`` after it; the state moves on."""
        hidden = self.text.embed_tokens(torch.tensor([[token]]))
        for number, layer in enumerate(self.layers):
            dropped = state.plan.dropped_at(number, state.visual_tokens) if state.plan.positions == "compact" else 0
            hidden = self._call(layer, hidden, torch.tensor([[state.position - dropped]]), state.cache)
        state.position += 1
        state.logits = _numpy(self.model.lm_head(self.text.norm(hidden))[0, -1])
        return state.logits

    def record(self, inputs: ReferenceInputs, plan: Plan, *, kept: Sequence[Index | None] | None = None, tokens: int) -> ReferenceRecord:
        """Read a prompt and feed ``tokens`` greedy tokens, keeping everything a comparison needs."""
        state, arrays, traces = self.prefill(inputs, plan, kept)
        greedy: list[int] = []
        for step in range(tokens):
            greedy.append(int(np.argmax(state.logits)))
            arrays[step_name(step)] = self.decode(state, greedy[-1])
        arrays |= _caches(state.cache, end_cache_names)
        return ReferenceRecord(arrays, traces, tuple(greedy), len(inputs.input_ids), plan)

    def _call(self, layer: Any, hidden: torch.Tensor, positions: torch.Tensor, cache: Any) -> torch.Tensor:
        """One decoder layer on the rows it is given, causal among themselves and after everything in its cache."""
        length = hidden.shape[1]
        window = getattr(layer.self_attn, "sliding_window", None)
        if window is not None and length + (0 if cache is None else cache.get_seq_length(layer.self_attn.layer_idx)) > window:
            raise UnsupportedModelError(f"the reference has no mask for a sliding window of {window} tokens: use shorter prompts")
        mask = None
        if length > 1 and self.text.config._attn_implementation != "sdpa":  # sdpa reads "no mask" as causal, others as no mask
            mask = torch.full((length, length), torch.finfo(hidden.dtype).min, dtype=hidden.dtype).triu(1)[None, None]
        output: torch.Tensor = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=self.text.rotary_emb(hidden, positions),
        )
        return output

    def _trace(
        self,
        layer: int,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        rows: Index,
        visual: Index,
        plan: Plan,
        index: int,
        kept: Index | None,
    ) -> StageTrace:
        """What the selector of stage ``index`` reads and would choose at the input of ``layer``."""
        stage = plan.stages[index]
        selector = reference_selector(stage.selector, stage.options)
        left = as_index(np.flatnonzero(np.isin(rows, visual)))
        text = as_index(np.flatnonzero(~np.isin(rows, visual)))
        tensors = self._taps(layer, hidden, positions)
        inputs = TokenInputs(
            **tensors,
            visual=left,
            original=as_index(np.searchsorted(visual, rows[left])),
            visual_total=len(visual),
            text=text[rows[text] > visual[0]],
            all_text=text,
            scale=float(self.layers[layer].self_attn.scaling),
        )
        choice = selector.select(inputs, stage.keep)
        own = np.sort(rows[left[choice.order]])
        return StageTrace(selector, stage.keep, rows, inputs, choice, own, own if kept is None else np.sort(as_index(kept)))

    def _taps(self, layer: int, hidden: torch.Tensor, positions: torch.Tensor) -> dict[str, Array]:
        """q, k, v of ``layer`` on every row, ``[heads, S, d]`` float64, before and after rotary; q and k after any norm of theirs."""
        attention = self.layers[layer].self_attn
        watched = {name: getattr(attention, f"{name}_norm", getattr(attention, f"{name}_proj")) for name in ("q", "k")}
        with watch_outputs({**watched, "v": attention.v_proj}) as seen, watch_arguments(attention) as arguments:
            self._call(self.layers[layer], hidden, positions, None)  # only to be looked at: the layer itself runs on the kept rows
        S, d = hidden.shape[1], attention.head_dim
        heads = {name: tensor.reshape(S, -1, d).permute(1, 0, 2).double().numpy() for name, tensor in seen.items()}
        cos, sin = (table[0].double().numpy() for table in arguments["position_embeddings"])
        if cos.shape[-1] != d:
            raise UnsupportedModelError(f"rotary turns {cos.shape[-1]} of {d} elements of a head: partial rotary is not supported")
        return {
            **heads,
            "q_rotary": heads["q"] * cos + _rotate_half(heads["q"]) * sin,
            "k_rotary": heads["k"] * cos + _rotate_half(heads["k"]) * sin,
        }


def _rotate_half(values: Array) -> Array:
    """``(a, b) -> (-b, a)`` over the two halves of the last axis, as transformers pairs them."""
    half = values.shape[-1] // 2
    return np.concatenate([-values[..., half:], values[..., :half]], axis=-1)


def _caches(cache: Any, names: Any) -> dict[str, NDArray[Any]]:
    """Every layer's keys and values ``[G, rows, d]``."""
    arrays: dict[str, NDArray[Any]] = {}
    for number, layer in enumerate(cache.layers):
        key, value = names(number)
        arrays[key], arrays[value] = _numpy(layer.keys[0]), _numpy(layer.values[0])
    return arrays


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().double().numpy().copy()
