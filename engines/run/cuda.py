"""Device memory and streams through NVIDIA's driver library, which comes with the driver: nothing else to install or to find.

TensorRT and ONNX Runtime compute in the device's primary context, which is the one used here, so addresses are shared.
Function names with ``_v2`` are what the header's macros expand to. Source: CUDA Driver API reference.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from dataclasses import dataclass

from sievert.bundle.errors import EngineError, EngineUnavailableError
from sievert.engines.run.dtypes import Array

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING

_pointer, _int, _uint, _size = ctypes.c_uint64, ctypes.c_int, ctypes.c_uint, ctypes.c_size_t
_handle = ctypes.c_void_p
_SIGNATURES = {
    "cuInit": [_uint],
    "cuDeviceGetCount": [ctypes.POINTER(_int)],
    "cuDeviceGet": [ctypes.POINTER(_int), _int],
    "cuDeviceGetName": [ctypes.c_char_p, _int, _int],
    "cuDeviceGetAttribute": [ctypes.POINTER(_int), _int, _int],
    "cuDeviceTotalMem_v2": [ctypes.POINTER(_size), _int],
    "cuDevicePrimaryCtxRetain": [ctypes.POINTER(_handle), _int],
    "cuCtxSetCurrent": [_handle],
    "cuStreamCreate": [ctypes.POINTER(_handle), _uint],
    "cuStreamSynchronize": [_handle],
    "cuMemAlloc_v2": [ctypes.POINTER(_pointer), _size],
    "cuMemFree_v2": [_pointer],
    "cuMemsetD8Async": [_pointer, ctypes.c_ubyte, _size, _handle],
    "cuMemcpyHtoDAsync_v2": [_pointer, ctypes.c_void_p, _size, _handle],
    "cuMemcpyDtoHAsync_v2": [ctypes.c_void_p, _pointer, _size, _handle],
    "cuMemcpyDtoDAsync_v2": [_pointer, _pointer, _size, _handle],
    "cuGetErrorString": [_int, ctypes.POINTER(ctypes.c_char_p)],
}


@dataclass(frozen=True)
class Device:
    """A GPU: its name, compute capability such as ``8.9``, and memory in MiB."""

    name: str
    capability: str
    memory_mib: int


class CudaMemory:
    """Memory of the first visible CUDA device, and one stream on which everything here runs.

    Raises:
        EngineUnavailableError: no driver or no device.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise EngineUnavailableError("no NVIDIA driver was found") from error
        for name, arguments in _SIGNATURES.items():
            getattr(self._library, name).argtypes = arguments
        count = _int(0)
        if self._library.cuInit(0) or self._library.cuDeviceGetCount(ctypes.byref(count)) or count.value == 0:
            raise EngineUnavailableError("an NVIDIA driver is installed but shows no GPU")
        self._device, self._context, stream = _int(0), _handle(), _handle()
        self._call("cuDeviceGet", ctypes.byref(self._device), 0)
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), self._device)
        self._enter()
        self._call("cuStreamCreate", ctypes.byref(stream), _NON_BLOCKING)
        self.stream = int(stream.value or 0)

    def device(self) -> Device:
        """What this device is."""
        name, major, minor, memory = ctypes.create_string_buffer(256), _int(), _int(), _size()
        self._call("cuDeviceGetName", name, len(name), self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, self._device)
        self._call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, self._device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(memory), self._device)
        return Device(name.value.decode(), f"{major.value}.{minor.value}", memory.value >> 20)

    def allocate(self, nbytes: int) -> int:
        """The address of ``nbytes`` zero bytes, aligned to 256 as the driver guarantees."""
        self._enter()
        address = _pointer()
        self._call("cuMemAlloc_v2", ctypes.byref(address), max(nbytes, 1))  # zero bytes are an error to the driver
        self.clear(address.value, nbytes)
        return int(address.value)

    def free(self, address: int) -> None:
        """Give back what :meth:`allocate` returned."""
        self._enter()
        self._call("cuMemFree_v2", address)

    def clear(self, address: int, nbytes: int) -> None:
        """Write zeros."""
        self._enter()
        if nbytes:
            self._call("cuMemsetD8Async", address, 0, nbytes, self.stream)
        self.synchronize()

    def upload(self, address: int, array: Array) -> None:
        """Copy a contiguous host array to ``address``."""
        self._enter()
        self._call("cuMemcpyHtoDAsync_v2", address, array.ctypes.data, array.nbytes, self.stream)
        self.synchronize()

    def download(self, array: Array, address: int) -> None:
        """Fill a contiguous host array from ``address``."""
        self._enter()
        self._call("cuMemcpyDtoHAsync_v2", array.ctypes.data, address, array.nbytes, self.stream)
        self.synchronize()

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy between two places of the device that do not overlap."""
        self._enter()
        self._call("cuMemcpyDtoDAsync_v2", target, source, nbytes, self.stream)
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the stream is empty."""
        self._call("cuStreamSynchronize", self.stream)

    def _enter(self) -> None:
        # A context is current per thread: callers may generate in another thread than the one that loaded the engine.
        self._call("cuCtxSetCurrent", self._context)

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(status, ctypes.byref(text))
            raise EngineError(f"CUDA: {name} failed with {status} ({(text.value or b'unknown').decode()})")


@functools.cache
def cuda_memory() -> CudaMemory:
    """The process's one :class:`CudaMemory`: sessions that share caches share it.

    Raises:
        EngineUnavailableError: no driver or no device; asked anew at the next call.
    """
    return CudaMemory()
