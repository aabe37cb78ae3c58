"""TransPrune (arXiv 2507.20630): how much layers transform a token, and how much the instruction attends to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import numpy as np

from sievert.bundle.errors import PlanError
from sievert.parity.selectors.base import Array, Tap, Text, TokenInputs
from sievert.parity.selectors.shared import attention, cosine, length, softmax
from sievert.parity.selectors.steps import TopK

TRANSITION = "transition"
_LEAST = 1e-8


@dataclass(frozen=True)
class TransPrune(TopK):
    """``A / (sum A + 1e-8) + IGA / (sum IGA + 1e-8)``, sums over the visual tokens.

    ``weights``: the softmax of ``1 - cos`` over the whole sequence, or of ``1 - |cos|`` over the visual tokens. ``first``: the first
    layer that counts; -1 is the paper's, scaled by depth.
    """

    weights: Literal["sequence", "image"] = "sequence"
    text: Text = "after_image"
    first: int = -1

    magnified: ClassVar[float] = 2.0  # by the scores' own error and that of the sum they are divided by

    def taps(self, layer: int, depth: int, since: int) -> tuple[Tap, ...]:
        """What modules take and give in the layers since the last cut; queries and keys of the layer itself."""
        if layer == 0:
            raise PlanError("transprune reads what the layers before the cut do: there are none before layer 0")
        kinds = ("attention_in", "attention_out", "mlp_in", "mlp_out")
        read = tuple((kind, number) for number in self._layers(layer, depth, since) for kind in kinds)
        return (*read, ("q_rotary", layer), ("k_rotary", layer))

    def score(self, inputs: TokenInputs) -> Array:
        """Transition and instruction, each as a share of its sum."""
        transition = self._transition(inputs)[inputs.visual]
        guided = attention(inputs, inputs.layer, inputs.text_rows(self.text))[:, inputs.visual].mean(axis=0)
        scores: Array = transition / (transition.sum() + _LEAST) + guided / (guided.sum() + _LEAST)
        return scores

    def carry(self, inputs: TokenInputs) -> Mapping[str, Array]:
        """The transition so far, of every row."""
        return {TRANSITION: self._transition(inputs)}

    def _layers(self, layer: int, depth: int, since: int) -> range:
        """The layers whose transition is read at a cut before ``layer``: from the first that counts, or from the last cut."""
        first = self.first if self.first >= 0 else math.floor(6 / 32 * depth + 0.5)
        return range(max(min(first, layer - 1), since), layer)

    def _transition(self, inputs: TokenInputs) -> Array:
        """``A[S]``."""
        rows = len(inputs.embeds)
        total = inputs.carried.get(TRANSITION, np.zeros(rows)).copy()
        for layer in self._layers(inputs.layer, inputs.depth, inputs.since):
            for module in ("attention", "mlp"):
                given, made = inputs.tap(f"{module}_in", layer), inputs.tap(f"{module}_out", layer)
                size, likeness = length(made) / length(given), cosine(given, made)
                if self.weights == "sequence":
                    total += size * softmax(1 - likeness)
                else:
                    total[inputs.visual] += size[inputs.visual] * softmax(1 - np.abs(likeness[inputs.visual]))
        return total
