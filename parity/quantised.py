"""Quantised weights against the model's own: what the codes on the disk stand for, read without the code that wrote them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from sievert.bundle.errors import IntegrityError
from sievert.bundle.files import open_plain
from sievert.bundle.manifest import Precision, StoredWeight, WeightEntry
from sievert.bundle.store import Bundle
from sievert.parity.verdict import Difference, StageResult, Verdict

STAGE: Final = "quantised weights"
_CODES, _SCALE = ".q", ".scale"
_NARROW: Final = (".float16", ".bfloat16")
_TYPES: Final = {"float8_e4m3fn": ml_dtypes.float8_e4m3fn, "bfloat16": ml_dtypes.bfloat16}

Array = NDArray[Any]


def judge_weights(bundle: Bundle, precision: Precision, tolerance: float) -> Iterator[StageResult]:
    """Every quantised weight, its worst output channel: the norm of the error over the norm of the channel is at most ``tolerance``.

    Raises:
        IntegrityError: codes of a weight the model does not have.
    """
    stored = {weight.name: weight for weight in precision.weights}
    original = {weight.name: weight for weight in bundle.manifest.weights}
    for name, entry in stored.items():
        if name.endswith(_NARROW):
            parameter = name.rpartition(".")[0]
            if parameter not in original:
                raise IntegrityError(f"{name} of {entry.file} has no weight {parameter!r}: make the variant again")
            weight, narrow = (
                _flat(_read(bundle, file, each))
                for file, each in ((bundle.manifest.place(original[parameter]), original[parameter]), (entry.file, entry))
            )
            difference = _compare(narrow, weight, tolerance, 0)
            yield StageResult(STAGE, parameter, Verdict.PASS if difference.max_abs <= tolerance else Verdict.FAIL, difference)
        if not name.endswith(_CODES):
            continue
        parameter = name.removesuffix(_CODES)
        if parameter not in original or parameter + _SCALE not in stored:
            raise IntegrityError(f"{name} of {entry.file} has no weight {parameter!r} or no scale beside it: quantise the variant again")
        weight = _read(bundle, bundle.manifest.place(original[parameter]), original[parameter]).astype(np.float64)
        codes = _read(bundle, entry.file, entry).astype(np.float64)
        scale = _read(bundle, stored[parameter + _SCALE].file, stored[parameter + _SCALE]).astype(np.float64)
        found = [_compare(codes * spread, weight, tolerance, channel) for channel, spread in _spread(scale, weight.shape)]
        if not found:
            yield StageResult(STAGE, parameter, Verdict.FAIL, note=f"scale of shape {list(scale.shape)} for {list(weight.shape)}")
            continue
        best = min(found, key=lambda difference: difference.max_abs)  # of a square matrix, nothing tells rows from columns
        yield StageResult(STAGE, parameter, Verdict.PASS if best.max_abs <= best.allowed else Verdict.FAIL, best)


def _spread(scale: Array, shape: tuple[int, ...]) -> Iterator[tuple[int, Array]]:
    """The scale of each weight, for every axis that may hold the output channels."""
    for channel in range(2):
        if scale.ndim == 1 and len(scale) == shape[channel]:
            yield channel, scale[:, None] if channel == 0 else scale[None, :]
        if scale.ndim == 2 and scale.shape[channel] == shape[channel] and shape[1 - channel] % scale.shape[1 - channel] == 0:
            yield channel, np.repeat(scale, shape[1 - channel] // scale.shape[1 - channel], axis=1 - channel)


def _flat(array: Array) -> Array:
    """As a matrix of one row per entry of the first axis."""
    return array.astype(np.float64).reshape(len(array), -1)


def _compare(restored: Array, weight: Array, tolerance: float, channel: int) -> Difference:
    norms = np.linalg.norm(weight, axis=1 - channel)
    errors = np.linalg.norm(restored - weight, axis=1 - channel) / np.where(norms > 0, norms, 1.0)
    if not np.isfinite(errors).all():
        errors = np.where(np.isfinite(errors), errors, np.inf)
    size = float(np.linalg.norm(weight) * np.linalg.norm(restored))
    return Difference(
        max_abs=float(errors.max()),
        allowed=tolerance,
        relative=float(errors.max()),
        cosine=float(np.vdot(weight, restored)) / size if size else 1.0,
        worst=(int(errors.argmax()),),
        elements=int(weight.size),
    )


def _read(bundle: Bundle, file: str, entry: WeightEntry | StoredWeight) -> Array:
    with open_plain(bundle.file(file), shared=bundle.manifest.files[file].shared) as opened:
        opened.seek(entry.offset)
        data = opened.read(entry.nbytes)
    if entry.dtype == "int4":
        pairs = np.frombuffer(data, np.uint8)
        codes = np.stack([pairs & 15, pairs >> 4], axis=1).ravel()[: int(np.prod(entry.shape))].astype(np.int8)
        return np.where(codes > 7, codes - 16, codes).reshape(entry.shape)
    return np.frombuffer(data, np.dtype(_TYPES.get(entry.dtype, entry.dtype))).reshape(entry.shape)
