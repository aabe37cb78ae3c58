"""The weights that a variant has of its own, in a data file: each distinct tensor once in a bundle, whichever variant reads it."""

from __future__ import annotations

import hashlib
from typing import BinaryIO, Final

import numpy as np
import onnx_ir as ir

from sievert.bundle.manifest import Manifest, StoredWeight
from sievert.engines.run.dtypes import Array

_PAGE: Final = 4096  # runtimes map pages; small tensors, such as scales, are not worth one each
_LINE: Final = 64


class WeightsFile:
    """Writes tensors to a file whose name is only known when it is complete (:meth:`settle`); then :meth:`tensor` refers to them.

    What an earlier variant of the bundle has on the disk is referred to and not written again.
    """

    def __init__(self, manifest: Manifest) -> None:
        variants = manifest.variants.values()
        self._known = {each.sha256: each for variant in variants if variant.precision for each in variant.precision.weights}
        self._stored: dict[str, StoredWeight] = {}
        self._kinds: dict[str, ir.DataType] = {}
        self._file = ""
        self.written = False

    def add(self, file: BinaryIO, name: str, array: Array) -> None:
        """Write ``array`` unless its bytes are there."""
        data = _pack(array)
        digest = hashlib.sha256(data).hexdigest()
        known = self._known.get(digest)
        if known is None:
            file.write(bytes(-file.tell() % (_PAGE if len(data) >= _PAGE else _LINE)))
        place, where = (file.tell(), "") if known is None else (known.offset, known.file)
        entry = StoredWeight(
            name=name, dtype=array.dtype.name, shape=tuple(array.shape), offset=place, nbytes=len(data), sha256=digest, file=where
        )
        if known is None:
            file.write(data)
            self.written = True
            self._known[digest] = entry
        self._stored[name] = entry
        self._kinds[name] = ir.DataType.from_numpy(array.dtype)

    def settle(self, file: str) -> None:
        """What was written is in ``file``."""
        self._file = file

    @property
    def stored(self) -> tuple[StoredWeight, ...]:
        """All tensors, for the manifest."""
        return tuple(map(self._settled, self._stored))

    def tensor(self, name: str) -> ir.ExternalTensor:
        """A tensor as a graph beside the file refers to it."""
        entry = self._settled(name)
        return ir.ExternalTensor(entry.file, entry.offset, entry.nbytes, self._kinds[name], shape=ir.Shape(entry.shape), name=name)

    def _settled(self, name: str) -> StoredWeight:
        entry = self._stored[name]
        return entry if entry.file else entry.model_copy(update={"file": self._file})


def _pack(array: Array) -> bytes:
    """Row-major, little-endian; two four-bit codes in a byte, the first one low (ONNX's TensorProto)."""
    if array.dtype.name != "int4":
        return np.ascontiguousarray(array).tobytes()
    flat = array.astype(np.int8).ravel().view(np.uint8) & 15
    flat = np.append(flat, np.uint8(0)) if flat.size % 2 else flat
    return bytes((flat[0::2] | flat[1::2] << 4).tobytes())
