"""A foreign decoder's weights into one file: each distinct tensor once, wherever the source had it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
import onnx_ir as ir

from sievert.bundle.manifest import WeightEntry

SMALL: Final = 1024
"""Tensors below this many bytes stay inside the graphs."""
_ALIGNMENT: Final = 4096


def write_weights(models: Iterable[ir.Model], path: Path, *, progress: Callable[[str], None] = lambda _: None) -> tuple[WeightEntry, ...]:
    """Write the large initializers of ``models`` into the new file ``path`` and let them refer to it.

    Equal bytes stand once, whatever their names; one tensor is in memory at a time. Names are the source's.
    """
    models = list(models)
    _take_in_small(models)
    offsets: dict[str, int] = {}
    entries: dict[str, WeightEntry] = {}
    written: dict[int, WeightEntry] = {}
    kept: list[ir.TensorProtocol] = []  # so that no identity is used twice
    with path.open("xb") as file:
        for value in _large(models):
            tensor = value.const_value
            assert tensor is not None  # noqa: S101 - _large has looked
            if id(tensor) not in written:
                progress(str(value.name))
                data = tensor.tobytes()
                digest = hashlib.sha256(data).hexdigest()
                if digest not in offsets:
                    file.write(bytes(-file.tell() % _ALIGNMENT))
                    offsets[digest] = file.tell()
                    file.write(data)
                written[id(tensor)] = WeightEntry(
                    name=str(value.name),
                    dtype=np.dtype(tensor.dtype.numpy()).name,
                    shape=tuple(size for size in tensor.shape if isinstance(size, int)),
                    offset=offsets[digest],
                    nbytes=len(data),
                    sha256=digest,
                )
                kept.append(tensor)
            entry = written[id(tensor)]
            entries[str(value.name)] = entry.model_copy(update={"name": str(value.name)})
            value.const_value = ir.ExternalTensor(
                path.name, entry.offset, entry.nbytes, tensor.dtype, shape=ir.Shape(entry.shape), name=str(value.name), base_dir=path.parent
            )
    return tuple(entries.values())


def _take_in_small(models: Iterable[ir.Model]) -> None:
    """What stays inside the graphs may not refer to the source's files."""
    for model in models:
        for value in model.graph.initializers.values():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor) and tensor.nbytes < SMALL:
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=str(value.name))


def digests(models: Iterable[ir.Model]) -> frozenset[str]:
    """SHA-256 of every large initializer."""
    return frozenset(hashlib.sha256(value.const_value.tobytes()).hexdigest() for value in _large(models) if value.const_value is not None)


def _large(models: Iterable[ir.Model]) -> Iterator[ir.Value]:
    for model in models:
        for value in model.graph.initializers.values():
            if value.const_value is not None and value.const_value.nbytes >= SMALL:
                yield value
