"""Named arrays in safetensors files, the same bytes for the same arrays."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from sievert.bundle.errors import CalibrationError
from sievert.bundle.specs import TensorSpec
from sievert.engines.run.dtypes import Array, numpy_dtype
from sievert.engines.run.memory import fixed_shape


def read_values(tensor: ir.TensorProtocol) -> Array:
    """The numbers of a graph's tensor, of a bundle that was opened.

    Two bundles may share a weights file by a hard link, as their manifests say and :class:`~sievert.bundle.store.Bundle` has checked;
    below a base folder onnx_ir reads no such file.
    """
    if isinstance(tensor, ir.ExternalTensor):
        tensor = ir.ExternalTensor(tensor.path, tensor.offset, tensor.length, tensor.dtype, shape=tensor.shape, name=str(tensor.name))
    return np.asarray(tensor.numpy())


def pack(arrays: Mapping[str, Array]) -> bytes:
    """The file that holds ``arrays``, in their own types (bfloat16 too). No metadata: the library does not keep its order."""
    return bytes(save({name: np.ascontiguousarray(array) for name, array in arrays.items()}))


def unpack(path: Path, specs: Sequence[TensorSpec]) -> dict[str, Array]:
    """The arrays of a file, which are exactly those that ``specs`` name.

    Raises:
        CalibrationError: no such file, no safetensors file, or other tensors than these.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            names = list(file.keys())
            arrays: dict[str, Array] = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}): collect again with `sievert collect`") from error
    found = {name: (array.dtype, array.shape) for name, array in arrays.items()}
    expected = {spec.name: (numpy_dtype(spec.dtype), fixed_shape(spec)) for spec in specs}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        raise CalibrationError(f"{path} does not hold what was collected ({', '.join(wrong)}): collect again with `sievert collect`")
    return {spec.name: arrays[spec.name] for spec in specs}


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor of fixed shape."""
    return int(np.prod(fixed_shape(spec), dtype=np.int64)) * numpy_dtype(spec.dtype).itemsize
