"""A checkpoint's tensors where they lie: mapped from its files, and stood in for while a model is traced.

Tracing needs shapes and dtypes. A matrix that would have to be converted is therefore replaced by a *blank*: a tensor of its shape and of
the wanted dtype that takes the memory of one column. Blanks are made of NaN, so that nothing can be computed from one unseen, and each
has an address of its own, by which the graph's weights are told apart.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open

from sievert.bundle.errors import CheckpointError

WHOLE: Final = "model.safetensors"
INDEX: Final = "model.safetensors.index.json"
LARGE: Final = 1 << 16
"""Elements above which a matrix is stood in for. The tracer computes constants from what is far smaller."""

_CONVERTED: Final = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def open_stored(folder: Path, *, given: str) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder by its key: views of the mapped files, which cost no memory of the process.

    The files are those that transformers takes; none of that name gives an empty answer.

    Raises:
        CheckpointError: the index names a tensor that the file named for it does not hold.
        OSError, SafetensorError, ValueError: a file cannot be read.
    """
    if (folder / WHOLE).is_file():
        return _map_file(folder / WHOLE)
    if not (folder / INDEX).is_file():
        return {}
    places: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    files = {name: _map_file(folder / name) for name in sorted(set(places.values()))}
    lost = sorted(key for key, name in places.items() if key not in files[name])
    if lost:
        raise CheckpointError(
            f"{given}: {INDEX} says that {places[lost[0]]} holds {lost[0]}, which it does not ({len(lost)} such tensors): the files are of "
            "two models, or a download was mixed up: download them again"
        )
    return {key: tensor for tensors in files.values() for key, tensor in tensors.items()}


def _map_file(path: Path) -> dict[str, torch.Tensor]:
    opened: Any = safe_open  # untyped
    with opened(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no mapping


def make_blanks(stored: Mapping[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """A blank for each large matrix of plain numbers that is not of ``dtype``; equal matrices, as of a tied head, share one."""
    blanks: dict[str, torch.Tensor] = {}
    alike: dict[tuple[object, ...], list[str]] = defaultdict(list)
    for key, tensor in stored.items():
        if tensor.ndim != 2 or tensor.numel() <= LARGE or tensor.dtype == dtype or tensor.dtype not in _CONVERTED:
            continue
        # Two matrices are hardly ever of one first row: what lies behind is compared, and so read, only then.
        others = alike[tensor.shape, tensor.dtype, tensor[0].view(torch.uint8).numpy().tobytes()]
        same = next((other for other in others if torch.equal(stored[other], tensor)), None)
        others.append(key)
        blanks[key] = torch.full((tensor.shape[0], 1), torch.nan, dtype=dtype).expand(tensor.shape) if same is None else blanks[same]
    return blanks


def all_finite(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether every number is finite as ``dtype``: rounding keeps the order, so the extremes tell, and NaN is passed on."""
    return tensor.numel() == 0 or all(bool(torch.isfinite(extreme.to(dtype))) for extreme in torch.aminmax(tensor))
