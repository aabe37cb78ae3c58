"""The PyTorch reference: the unmodified transformers model, one sample alone and unpadded, looked at through hooks.

Pruned runs call the model's own decoder layers one by one: layers before a cut on all tokens that are left, later ones on the kept
ones. A plan without stages is the unpruned model.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import DynamicCache

from sievert.bundle.errors import UnsupportedModelError
from sievert.bundle.plan import Plan
from sievert.parity.hooks import stop_before
from sievert.parity.masks import Masks, Seen, as_argument, read_masks
from sievert.parity.record import (
    EMBEDDINGS,
    LOGITS,
    VISION,
    VISUAL_SCORES,
    ReferenceRecord,
    StageTrace,
    as_index,
    cache_names,
    end_cache_names,
    plane_name,
    residual_name,
    scores_name,
    step_name,
)
from sievert.parity.selectors.base import Array, Index, Tap, TokenInputs, VisionTap
from sievert.parity.selectors.images import by_image
from sievert.parity.selectors.registry import reference_selector
from sievert.parity.selectors.steps import ReferenceSelector
from sievert.parity.taps import OF_STREAM, list_taps, watch_layer
from sievert.parity.vision import patch_grid, watch_vision

_AXES = 3  # time, height, width


@dataclass(frozen=True)
class ReferenceInputs:
    """One prompt: ``input_ids[S]`` int64 with the placeholders of its ``images``, ``pixel_values`` as the model takes them under the name
    ``pixels``, and what else its processor makes (sizes, grids).
    """

    input_ids: Index
    pixel_values: NDArray[Any]
    images: int = 1
    processed: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    pixels: str = "pixel_values"


@dataclass
class ReferenceState:
    """A prompt that was read: caches of a length per layer, and the position that comes next without pruning.

    ``rows[i]``: which rows of the unpruned sequence layer i's cache holds; ``length``: of how many that sequence consists.
    """

    cache: Any
    rows: list[Index]
    plan: Plan
    visual_tokens: int
    length: int
    masked: bool
    position: int
    leading: int  # axes before the sequence's: 1, or 2 where a position has several
    logits: NDArray[np.float64]  # [V]


@dataclass(frozen=True)
class _Merged:
    """What the model hands its decoder: ``features[Nv, D]``, ``hidden[1, S, D]``, ``positions`` as of :class:`_Walk`, the ``masks`` of
    all layers, ``planes[Nv, D]`` that its first layers add; and the vision encoder's ``scores``.
    """

    features: torch.Tensor
    hidden: torch.Tensor
    positions: torch.Tensor
    masks: Masks
    planes: tuple[torch.Tensor, ...]
    scores: Mapping[VisionTap, NDArray[np.float64]]


@dataclass
class _Walk:
    """A prompt between two layers. ``rows``: the original row of each token that is left; ``visual``: those that were visual tokens.

    ``taps``: what was collected since the cut before ``since``, for the next one; ``carried``: what earlier stages left.
    """

    hidden: torch.Tensor  # [1, S, D]
    positions: torch.Tensor  # [1, S], or [axes, 1, S] where a position has several
    rows: Index
    visual: Index
    embeds: Array
    carried: dict[str, Array]
    taps: dict[Tap, Array]
    planes: tuple[torch.Tensor, ...] = ()  # [Nv, D] each; layer i adds its own to its output, at the visual tokens that are left
    since: int = 0

    def add_plane(self, layer: int) -> None:
        """Let the output of ``layer`` contain its plane, if it has one."""
        if layer < len(self.planes):
            left = np.isin(self.visual, self.rows)
            self.hidden = self.hidden.clone()
            self.hidden[0, np.isin(self.rows, self.visual)] += self.planes[layer][left]

    def cut(self, layer: int, kept: Index, *, compact: bool) -> None:
        """Go on with ``kept`` and the text, before ``layer``."""
        stay = np.isin(self.rows, kept) | ~np.isin(self.rows, self.visual)
        self.hidden, self.rows, self.embeds = self.hidden[:, stay], self.rows[stay], self.embeds[stay]
        first = self.positions[..., :1]
        self.positions = first + torch.arange(len(self.rows))[None] if compact else self.positions[..., stay]
        self.carried = {name: values[stay] for name, values in self.carried.items()}
        self.taps, self.since = {}, layer


class Reference:
    """A vision-language model of transformers; its weights and its forward are left alone.

    ``rounded_to`` is the dtype images are rounded to before they enter, as an engine of that dtype would receive them. ``visual_token``
    is the id of visual tokens, if not that of images.
    """

    def __init__(self, model: Any, *, rounded_to: torch.dtype = torch.float32, visual_token: int | None = None) -> None:
        self.model = model.eval()
        self.text = model.get_decoder()
        self.layers: Sequence[Any] = self.text.layers
        self.image_token_id = int(model.config.image_token_id) if visual_token is None else visual_token
        self.rounded_to = rounded_to
        self.dtype = next(model.parameters()).dtype

    def embed(self, inputs: ReferenceInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """The projected image features ``[Nv, D]`` and the merged embeddings ``[1, S, D]``, as the model's own forward makes them."""
        merged = self._embed(inputs, ())
        return merged.features, merged.hidden

    @torch.inference_mode()
    def prefill(
        self, inputs: ReferenceInputs, plan: Plan, kept: Sequence[Index | None] | None = None
    ) -> tuple[ReferenceState, dict[str, NDArray[Any]], tuple[StageTrace, ...]]:
        """Read a prompt under ``plan``; ``kept[s]`` are original rows to go on with, or None to follow the float64 selectors.

        Returns the state, the arrays by name (``sievert.parity.record``) and what each cut saw.
        """
        selectors = [by_image(reference_selector(stage.selector, stage.options), inputs.images) for stage in plan.stages]
        wanted = list_taps(plan, selectors, len(self.layers))
        merged = self._embed(inputs, [selector.vision_tap for selector in selectors if selector.vision_tap])
        hidden, positions, masks, seen = merged.hidden, merged.positions, merged.masks, merged.scores
        arrays: dict[str, NDArray[Any]] = {VISION: _numpy(merged.features), EMBEDDINGS: _numpy(hidden[0])}
        arrays |= {plane_name(layer): _numpy(plane) for layer, plane in enumerate(merged.planes)}
        for scores in seen.values():
            arrays[VISUAL_SCORES] = scores
        visual = as_index(np.flatnonzero(as_index(inputs.input_ids) == self.image_token_id))
        walk = _Walk(hidden, positions, np.arange(hidden.shape[1]), visual, _numpy(hidden[0]), {}, {}, merged.planes)
        stages = {stage.layer: index for index, stage in enumerate(plan.stages)}
        traces: list[StageTrace] = []
        cache, left = DynamicCache(), list[Index]()
        for number in range(len(self.layers)):
            if number in stages:
                index = stages[number]
                selector = selectors[index]
                self._look(walk, number, _kinds(wanted[index], number), masks)
                said = None if selector.vision_tap is None else seen[selector.vision_tap]
                trace = self._trace(walk, number, selector, plan.stages[index].keep, masks, said, None if kept is None else kept[index])
                traces.append(trace)
                arrays[residual_name(index)] = _numpy(walk.hidden[0])
                if selector.computes:
                    arrays[scores_name(index)] = trace.choice.scores
                walk.carried = {**walk.carried, **trace.choice.carried}
                walk.cut(number, trace.kept, compact=plan.positions == "compact")
            later = wanted[len(traces)] if len(traces) < len(wanted) else ()
            walk.hidden = self._look(walk, number, _kinds(later, number), masks, cache)
            walk.add_plane(number)
            left.append(as_index(walk.rows))
        logits = self._logits(walk.hidden)
        position, leading = int(positions.max()) + 1, positions.ndim - 1
        state = ReferenceState(cache, left, plan, len(visual), hidden.shape[1], masks.given, position, leading, logits)
        arrays[LOGITS] = logits
        arrays |= _caches(cache, cache_names)
        return state, arrays, tuple(traces)

    @torch.inference_mode()
    def decode(self, state: ReferenceState, token: int) -> NDArray[np.float64]:
        """Feed one token and return the logits ``[V]`` after it; the state moves on."""
        hidden = self.text.embed_tokens(torch.tensor([[token]]))
        for number, layer in enumerate(self.layers):
            dropped = state.plan.dropped_at(number, state.visual_tokens) if state.plan.positions == "compact" else 0
            place = torch.tensor([[state.position - dropped]])
            state.rows[number] = np.append(state.rows[number], state.length)
            seen = None if not state.masked else self._see_back(layer, state.rows[number])
            hidden = self._call(number, hidden, place if state.leading == 1 else place.expand(_AXES, 1, 1), state.cache, seen, state.masked)
        state.position += 1
        state.length += 1
        state.logits = self._logits(hidden)
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

    def _see_back(self, layer: Any, rows: Index) -> Seen | None:
        """``[1, n]``: which of ``rows`` of the unpruned sequence the last of them sees; it is in no block. None: all."""
        window = getattr(layer.self_attn, "sliding_window", None)
        return None if window is None else rows[None] > rows[-1] - window

    def _logits(self, hidden: torch.Tensor) -> NDArray[np.float64]:
        """``[V]`` of the last row of ``hidden[1, n, D]``, capped where the configuration says so."""
        logits, cap = self.model.lm_head(self.text.norm(hidden[:, -1:]))[0, -1], getattr(self.text.config, "final_logit_softcapping", None)
        return _numpy(logits if cap is None else cap * torch.tanh(logits / cap))

    def _rotary(self, number: int, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        """Cosines and sines of layer ``number``; some models have tables for each kind of layer."""
        own = "layer_type" in inspect.signature(self.text.rotary_emb.forward).parameters
        return self.text.rotary_emb(hidden, positions, *((self.text.config.layer_types[number],) if own else ()))

    def _call(
        self, number: int, hidden: torch.Tensor, positions: torch.Tensor, cache: Any, seen: Seen | None = None, masked: bool = False
    ) -> torch.Tensor:
        """One decoder layer on the rows it is given, after everything in its cache. ``seen[n, m]``: what they see, if not what is causal;
        ``masked``: the model's own masks say so.
        """
        layer, length = self.layers[number], hidden.shape[1]
        window = None if masked else getattr(layer.self_attn, "sliding_window", None)
        if window is not None and length + (0 if cache is None else cache.get_seq_length(layer.self_attn.layer_idx)) > window:
            raise UnsupportedModelError(f"the reference has no mask for a sliding window of {window} tokens: use shorter prompts")
        implementation = self.text.config._attn_implementation
        if seen is None and length > 1 and implementation != "sdpa":  # sdpa reads "no mask" as causal, others as no mask
            seen = np.tri(length, dtype=bool)
        mask = None if seen is None else as_argument(seen, implementation, hidden.dtype)
        output: torch.Tensor = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions if positions.ndim == 2 else positions[0],
            past_key_values=cache,
            use_cache=cache is not None,
            position_embeddings=self._rotary(number, hidden, positions),
        )
        return output

    @torch.inference_mode()
    def _embed(self, inputs: ReferenceInputs, taps: Sequence[VisionTap]) -> _Merged:
        """:meth:`embed`, what else the model gives its decoder, and what the vision encoder says meanwhile."""
        pixels = torch.from_numpy(np.asarray(inputs.pixel_values, np.float32)).to(self.rounded_to).to(self.dtype)
        ids = torch.from_numpy(as_index(inputs.input_ids))
        others = {name: torch.from_numpy(np.asarray(array)) for name, array in inputs.processed.items()}
        others |= {"input_ids": ids[None], inputs.pixels: pixels, "attention_mask": torch.ones_like(ids)[None]}
        with watch_vision(self.model, taps) as scores, stop_before(self.text) as arguments:
            self.model(**others)
        hidden = arguments["inputs_embeds"]
        given = arguments.get("position_ids")
        # Before several axes some models put the row numbers that packed prompts are told apart by.
        given = torch.arange(hidden.shape[1])[None] if given is None else given
        positions = given if given.ndim == ids[None].ndim else given[-_AXES:]  # axes, batch, sequence
        masks = read_masks(arguments.get("attention_mask"), getattr(self.text.config, "layer_types", None), len(self.layers))
        planes = tuple(arguments.get("deepstack_visual_embeds") or ())
        return _Merged(hidden[0, ids == self.image_token_id], hidden, positions, masks, planes, scores)

    def _look(self, walk: _Walk, number: int, kinds: Sequence[str], masks: Masks, cache: Any = None) -> torch.Tensor:
        """Run layer ``number`` and take down ``kinds`` of it; without a cache it is only looked at, and not run where that will do."""
        for kind in kinds:
            if kind in OF_STREAM:
                walk.taps[kind, number] = _numpy((walk.hidden if kind == "residual" else self.text.norm(walk.hidden))[0])
        inner = [kind for kind in kinds if kind not in OF_STREAM]
        if cache is None and not inner:
            return walk.hidden
        with watch_layer(self.layers[number], inner) as found:
            seen_rows = masks.among(number, as_index(walk.rows))
            hidden = self._call(number, walk.hidden, walk.positions, cache, seen_rows, masks.given)
        walk.taps |= {(kind, number): tensor for kind, tensor in found.items()}
        return hidden

    def _trace(
        self,
        walk: _Walk,
        layer: int,
        selector: ReferenceSelector,
        keep: int,
        masks: Masks,
        scores: Array | None,
        kept: Index | None,
    ) -> StageTrace:
        """What the selector reads and would choose at the input of ``layer``."""
        left = as_index(np.flatnonzero(np.isin(walk.rows, walk.visual)))
        text = as_index(np.flatnonzero(~np.isin(walk.rows, walk.visual)))
        seen = {number: masks.among(number, as_index(walk.rows)) for number in range(len(self.layers))}
        inputs = TokenInputs(
            taps=walk.taps,
            embeds=walk.embeds,
            visual=left,
            original=as_index(np.searchsorted(walk.visual, walk.rows[left])),
            visual_total=len(walk.visual),
            text=text[walk.rows[text] > walk.visual[0]],
            all_text=text,
            scale=float(self.layers[layer].self_attn.scaling),
            layer=layer,
            depth=len(self.layers),
            since=walk.since,
            grid=patch_grid(self.model) or (1, len(walk.visual)),
            carried=walk.carried,
            visual_scores=scores,
            seen={number: rows for number, rows in seen.items() if rows is not None},
            softcap=getattr(self.layers[layer].self_attn, "attn_logit_softcapping", None) or 0.0,
        )
        choice = selector.select(inputs, keep)
        own = np.sort(walk.rows[left[choice.order]])
        return StageTrace(selector, keep, walk.rows, inputs, choice, own, own if kept is None else np.sort(as_index(kept)))


def _kinds(taps: Sequence[Tap], layer: int) -> list[str]:
    """What is read of ``layer``."""
    return [kind for kind, number in taps if number == layer]


def _caches(cache: Any, names: Any) -> dict[str, NDArray[Any]]:
    """Every layer's keys and values ``[G, rows, d]``."""
    arrays: dict[str, NDArray[Any]] = {}
    for number, layer in enumerate(cache.layers):
        key, value = names(number)
        arrays[key], arrays[value] = _numpy(layer.keys[0]), _numpy(layer.values[0])
    return arrays


def _numpy(tensor: torch.Tensor) -> NDArray[Any]:
    return tensor.detach().double().numpy().copy()
