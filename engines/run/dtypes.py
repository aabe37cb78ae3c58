"""Names of element types as the manifest writes them, for numpy and for ONNX."""

from __future__ import annotations

from typing import Any, Final

import ml_dtypes
import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

_NUMPY: Final[dict[str, np.dtype[Any]]] = {
    name: np.dtype(name)
    for name in ("float16", "float32", "float64", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "bool")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float8e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn)}

ONNX_CODE: Final[dict[str, int]] = {
    "float32": 1,
    "uint8": 2,
    "int8": 3,
    "uint16": 4,
    "int16": 5,
    "int32": 6,
    "int64": 7,
    "bool": 9,
    "float16": 10,
    "float64": 11,
    "uint32": 12,
    "uint64": 13,
    "bfloat16": 16,
    "float8e4m3fn": 17,
}
"""Values of ``onnx.TensorProto.DataType``."""

_FLOATS: Final = frozenset({"float16", "float32", "float64", "bfloat16", "float8e4m3fn"})


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy type of an ONNX element type.

    Raises:
        KeyError: a type no graph of ours may have at its border.
    """
    return _NUMPY[name]


def is_float(dtype: np.dtype[Any]) -> bool:
    """Whether this is a floating type, numpy's own or one of ml_dtypes'."""
    return dtype.name in _FLOATS or dtype.name == "float8_e4m3fn"
