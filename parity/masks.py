"""What the layers of the reference see: the masks that the model itself makes of a prompt, cut down to the rows that are left."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sievert.bundle.errors import UnsupportedModelError
from sievert.parity.selectors.base import Index

Seen = NDArray[np.bool_]


@dataclass(frozen=True)
class Masks:
    """``of_layer[i]``: which rows of the whole prompt each row sees in layer i, ``[S, S]``; None where that is plainly causal.

    ``given``: the model made masks. Where it leaves that to its decoder, they are taken for causal, and a window that bites is refused.
    """

    of_layer: tuple[Seen | None, ...]
    given: bool

    def among(self, layer: int, rows: Index) -> Seen | None:
        """``[n, n]``: the same among ``rows`` of the prompt."""
        whole = self.of_layer[layer]
        return None if whole is None else whole[np.ix_(rows, rows)]


def read_masks(given: Any, kinds: list[str] | None, depth: int) -> Masks:
    """The masks of a decoder called with ``attention_mask=given``, by layer; ``kinds`` are the layers' types in the configuration."""
    if isinstance(given, dict):
        if kinds is None:
            raise UnsupportedModelError(f"the model makes masks for {', '.join(given)} layers, but does not say which is which")
        made = {kind: _as_seen(mask) for kind, mask in given.items()}
        return Masks(tuple(made[kind] for kind in kinds[:depth]), given=True)
    whole = given is not None and given.ndim > 2
    return Masks((_as_seen(given) if whole else None,) * depth, given=whole)


def _as_seen(mask: torch.Tensor | None) -> Seen | None:
    """``[S, S]`` of one sample: true where a boolean mask is, or where nothing is added to a score."""
    if mask is None:
        return None
    seen = mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
    array: Seen = seen.numpy().copy()
    return array


def as_argument(seen: Seen, implementation: str, dtype: torch.dtype) -> torch.Tensor:
    """``seen[n, m]`` as the attention of this implementation takes it: ``[1, 1, n, m]``, boolean or added to the scores."""
    allowed = torch.from_numpy(seen)[None, None]
    if implementation == "sdpa":
        return allowed
    return torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min)
