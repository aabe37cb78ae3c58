"""Number formats that weights and activations are narrowed to, and the scales that lose least.

The arithmetic is numpy's, on one tensor at a time. ``onnxruntime.quantization`` was looked at for all of it (1.31): it takes whole models,
with their weights in memory, and writes each graph's quantised weights anew, so that prefill and decode would not share them; its 8-bit
floats have one scale per tensor, fitted to the standard deviation of a normal distribution; its four-bit blocks are rounded to the largest
value without a search. What it says of a single tensor is what the tests compare these functions with.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from sievert.bundle.errors import CalibrationError
from sievert.calibration.formats import FORMATS as SIXTEEN
from sievert.engines.run.dtypes import Array

Float = npt.NDArray[np.float32]

BLOCKS: Final = (32, 128)
"""Weights along K that may share a scale in four bits: what engines have kernels for."""
_SMALLEST: Final = {"float32": 2.0**-126} | {name: each.smallest_normal for name, each in SIXTEEN.items()}
_TRIED: Final = np.linspace(0.5, 1.05, 45, dtype=np.float32)


@dataclass(frozen=True)
class NumberFormat:
    """``largest`` is what a scale maps to; ``activations``: these are narrowed too, and need calibration data. ``blocks``: weights share
    a scale in blocks along K, otherwise each output channel has one. ``least`` is the compute capability (SM) that has the format.
    """

    name: str
    dtype: ir.DataType
    largest: float
    activations: bool
    blocks: bool = False
    least: int = 0


FORMATS: Final[Mapping[str, NumberFormat]] = MappingProxyType(
    {
        each.name: each
        for each in (
            NumberFormat("int8", ir.DataType.INT8, 127.0, activations=True),
            NumberFormat("fp8", ir.DataType.FLOAT8E4M3FN, 448.0, activations=True, least=89),
            NumberFormat("int4", ir.DataType.INT4, 7.0, activations=False, blocks=True),
            NumberFormat("int8-weights", ir.DataType.INT8, 127.0, activations=False),
        )
    }
)


def find_number_format(name: str) -> NumberFormat:
    """The format of that name.

    Raises:
        CalibrationError: there is none.
    """
    if name not in FORMATS:
        raise CalibrationError(f"format {name!r} has no codes and scales: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]


@dataclass(frozen=True)
class Quantised:
    """A weight matrix in codes: ``codes`` of its shape in the format's own type, ``scale`` of the graph's float type: ``[channels]``, or
    ``[K / block, N]`` (blocks along ``axis``).
    """

    codes: Array
    scale: Array
    axis: int
    block: int = 0

    def restore(self) -> Float:
        """The weight as the graph computes with it."""
        codes: Float = self.codes.astype(np.float32)
        scale: Float = self.scale.astype(np.float32)
        spread: Float = np.repeat(scale, self.block, axis=self.axis) if self.block else _along(scale, self.axis, self.codes.ndim)
        restored: Float = codes * spread
        return restored


def encode(values: Float, scale: Float, form: NumberFormat) -> Array:
    """``values / scale`` as codes: ties to even, what is beyond the format saturates (QuantizeLinear of ONNX)."""
    scaled = values / scale
    if form.dtype is ir.DataType.FLOAT8E4M3FN:
        codes: Array = np.clip(scaled, -form.largest, form.largest).astype(ml_dtypes.float8_e4m3fn)
        return codes
    lowest = -128 if form.dtype is ir.DataType.INT8 else -8
    whole: Array = np.clip(np.rint(scaled), lowest, form.largest)
    return whole.astype(np.int8 if form.dtype is ir.DataType.INT8 else ml_dtypes.int4)


def scale_of(magnitude: npt.ArrayLike, form: NumberFormat, dtype: npt.DTypeLike = np.float32) -> Float:
    """The scale at which ``magnitude`` is the largest code, as it reads back from ``dtype``; 1 where there is nothing but zeros."""
    size = np.asarray(magnitude, np.float32)
    scale = np.where(size > 0, size / np.float32(form.largest), np.float32(1)).astype(dtype).astype(np.float32)
    return np.maximum(scale, np.float32(_SMALLEST[np.dtype(dtype).name]))  # below it a scale loses precision bit by bit


def quantise_weight(
    weight: Float, form: NumberFormat, *, channel_axis: int, block: int = 0, dtype: npt.DTypeLike = np.float32
) -> Quantised:
    """A matrix in ``form``: a scale per output channel from its largest value, or per block of ``block`` along the other axis.

    ``dtype`` is the float type of the scales, which is that of the graph.

    Raises:
        CalibrationError: it holds NaN or infinity.
    """
    if not np.isfinite(weight).all():
        raise CalibrationError("a weight holds NaN or infinity: export a checkpoint without them")
    if block:
        return _quantise_blocks(weight, form, 1 - channel_axis, block, dtype)
    scale = scale_of(np.abs(weight).max(axis=1 - channel_axis), form, dtype)
    return Quantised(encode(weight, _along(scale, channel_axis, 2), form), scale.astype(dtype), channel_axis)


def _quantise_blocks(weight: Float, form: NumberFormat, axis: int, block: int, dtype: npt.DTypeLike) -> Quantised:
    """Round to nearest, with the scale of each block that has the least squared error of those tried between half and all of its range."""
    blocks = (weight if axis == 0 else weight.T).reshape(-1, block, weight.shape[1 - axis])  # [K / block, block, N]
    largest = np.abs(blocks).max(axis=1, keepdims=True)
    best, least = scale_of(largest, form, dtype), np.full(largest.shape, np.inf, np.float32)
    for share in _TRIED:
        scale = scale_of(largest * share, form, dtype)
        error = np.square(encode(blocks, scale, form).astype(np.float32) * scale - blocks).sum(axis=1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    codes, scale = encode(blocks, best, form).reshape(-1, blocks.shape[2]), best[:, 0].astype(dtype)
    return (
        Quantised(codes, scale, 0, block)
        if axis == 0
        else Quantised(np.ascontiguousarray(codes.T), np.ascontiguousarray(scale.T), 1, block)
    )


def _along(scale: Float, axis: int, rank: int) -> Float:
    """``scale[n]`` so that it broadcasts along ``axis``."""
    return scale.reshape([-1 if place == axis else 1 for place in range(rank)])
