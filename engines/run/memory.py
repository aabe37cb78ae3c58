"""Where tensors live between calls: the host's or a CUDA device's memory behind one small interface."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterable, Mapping
from typing import Protocol

import numpy as np

from sievert.bundle.errors import EngineError
from sievert.bundle.specs import SEQUENCE, TensorSpec, size_axis
from sievert.engines.run.dtypes import Array, numpy_dtype

_ALIGNMENT = 256  # bytes: what TensorRT asks of an address; more than any CPU kernel does


class Memory(Protocol):
    """Raw bytes by address. Every call has finished when it returns."""

    def allocate(self, nbytes: int) -> int:
        """The address of ``nbytes`` zero bytes, aligned to 256."""

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` returned."""

    def clear(self, address: int, nbytes: int) -> None:
        """Write zeros."""

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous host array to ``address``."""

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous host array from ``address``."""

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between two places of this memory that do not overlap."""


class HostMemory:
    """Memory of this process."""

    def __init__(self) -> None:
        self._owned: dict[int, Array] = {}

    def allocate(self, nbytes: int) -> int:
        """The address of ``nbytes`` zero bytes, aligned to 256."""
        block = np.zeros(nbytes + _ALIGNMENT, np.uint8)
        address = -(-block.ctypes.data // _ALIGNMENT) * _ALIGNMENT
        self._owned[address] = block
        return address

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` returned."""
        del self._owned[address]

    def clear(self, address: int, nbytes: int) -> None:
        """Write zeros."""
        ctypes.memset(address, 0, nbytes)

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous host array to ``address``."""
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous host array from ``address``."""
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between two places of this memory that do not overlap."""
        ctypes.memmove(target, source, nbytes)


class Buffer:
    """A tensor of fixed shape that stays where it is between calls: one layer's keys or values, batch-major.

    An engine that writes in place reads and writes ``address``. One that cannot writes to :meth:`spare`, then the two are
    exchanged by :meth:`flip`; sessions that share the buffer both see the exchange.
    """

    def __init__(self, memory: Memory, spec: TensorSpec) -> None:
        self.memory = memory
        self.dtype = numpy_dtype(spec.dtype)
        self.shape = fixed_shape(spec)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self._addresses = [memory.allocate(self.nbytes)]
        self._finalizer = weakref.finalize(self, _free_all, memory, self._addresses)
        self._finalizer.atexit = False  # a driver may be gone by then, and the process's memory goes with it

    @property
    def address(self) -> int:
        """Where the current content stands."""
        return self._addresses[0]

    def spare(self) -> int:
        """A second place of the same size, made when first asked for."""
        if len(self._addresses) == 1:
            self._addresses.append(self.memory.allocate(self.nbytes))
        return self._addresses[1]

    def flip(self) -> None:
        """Make the spare place the current one."""
        self._addresses.reverse()

    def numpy(self) -> Array:
        """A host copy of the content."""
        array = np.empty(self.shape, self.dtype)
        self.memory.download(array, self.address)
        return array

    def clear(self) -> None:
        """Write zeros."""
        self.memory.clear(self.address, self.nbytes)

    def copy_row(self, row: int, source: Buffer, source_row: int) -> None:
        """Copy one batch row of ``source`` over one of this buffer.

        Raises:
            EngineError: the rows have different shapes, or a row does not exist.
        """
        if (self.shape[1:], self.dtype) != (source.shape[1:], source.dtype):
            raise EngineError(f"a cache row {source.shape[1:]} {source.dtype} does not fit a row {self.shape[1:]} {self.dtype}")
        for name, index, count in (("slot", row, self.shape[0]), ("row", source_row, source.shape[0])):
            if not 0 <= index < count:
                raise EngineError(f"{name} {index} does not exist: choose 0..{count - 1}")
        size = self.nbytes // self.shape[0]
        self.memory.copy(self.address + row * size, source.address + source_row * size, size)

    def free(self) -> None:
        """Give the memory back; the buffer cannot be used afterwards. Happens by itself when nobody holds the buffer."""
        self._finalizer()


def _free_all(memory: Memory, addresses: list[int]) -> None:
    while addresses:
        memory.free(addresses.pop())


def shape_at(spec: TensorSpec, sequence: int) -> tuple[int, ...]:
    """The shape of a spec for prompts of ``sequence`` tokens: the axis that varies with them gets its size.

    Raises:
        EngineError: another axis without a fixed size.
    """
    return fixed_shape(spec.model_copy(update={"shape": tuple(size_axis(axis, sequence) if sequence else axis for axis in spec.shape)}))


def find_sequence(specs: Iterable[TensorSpec], arrays: Mapping[str, Array]) -> int:
    """How many tokens the prompts among ``arrays`` have, by the first that varies with it; 0 where none does."""
    for spec in specs:
        array = arrays.get(spec.name)
        if SEQUENCE in spec.shape and array is not None and array.ndim == len(spec.shape):
            return int(array.shape[spec.shape.index(SEQUENCE)])
    return 0


def fixed_shape(spec: TensorSpec) -> tuple[int, ...]:
    """The shape of a spec without named axes.

    Raises:
        EngineError: an axis has no fixed size.
    """
    if any(isinstance(axis, str) or axis < 0 for axis in spec.shape):
        raise EngineError(f"{spec.name} has shape {spec.shape}: an engine takes only fixed sizes, make a variant first")
    return tuple(int(axis) for axis in spec.shape)
