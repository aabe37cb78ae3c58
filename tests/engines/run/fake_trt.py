"""A module with TensorRT's Python API whose engines are ONNX files, executed on the host from raw addresses.

It holds callers to the API's rules: every address set before a run, aliased outputs at their input's address, others apart from it.
"""

from __future__ import annotations

import ctypes
from enum import Enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnxruntime

from sievert.engines.run.dtypes import numpy_dtype
from sievert.engines.run.memory import HostMemory
from sievert.engines.run.ort import failures

__version__ = "0.0"
STREAM = 4711
LONGEST = 9  # of an axis that varies


class DataType(Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"
    INT64 = "tensor(int64)"
    FP4 = "tensor(double)"  # stands for any type that no graph of ours has at its border


class TensorIOMode(Enum):
    INPUT = 1
    OUTPUT = 2


class TensorLocation(Enum):
    DEVICE = 0
    HOST = 1


class ILogger:
    pass


class Memory(HostMemory):
    """Host memory that stands for a device's."""

    stream = STREAM

    def __init__(self) -> None:
        super().__init__()
        self.pending = 0

    def synchronize(self) -> None:
        self.pending = 0


class FakeTrt:
    """The module. ``aliases``: whether engines update caches in place, as newer versions do."""

    __version__ = __version__
    DataType, TensorIOMode, TensorLocation, ILogger = DataType, TensorIOMode, TensorLocation, ILogger

    def __init__(self, memory: Memory, *, aliases: bool, host_inputs: frozenset[str] = frozenset()) -> None:
        self.memory, self.aliases, self.host_inputs, self.fail = memory, aliases, host_inputs, False

    def Runtime(self, log: Any) -> Any:  # noqa: N802 - NVIDIA's name
        return SimpleNamespace(deserialize_cuda_engine=lambda content: self._engine(content, log))

    def _engine(self, content: bytes, log: Any) -> Engine | None:
        try:
            return Engine(self, content, log)
        except failures():
            log.log(SimpleNamespace(name="ERROR"), "bad magic")
            return None


class Engine:
    def __init__(self, trt: FakeTrt, content: bytes, log: Any) -> None:
        self.trt, self.log = trt, log
        self.session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
        self.io: dict[str, Any] = {value.name: value for value in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.inputs = {value.name for value in self.session.get_inputs()}
        self.num_io_tensors = len(self.io)
        if trt.aliases:
            self.get_aliased_input_tensor = self._alias

    def get_tensor_name(self, index: int) -> str:
        return tuple(self.io)[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.HOST if name in self.trt.host_inputs else TensorLocation.DEVICE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType(self.io[name].type)

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(size if isinstance(size, int) else -1 for size in self.io[name].shape)

    def _alias(self, name: str) -> str | None:
        return name.replace("present", "past_key_values") if name.startswith("present") else None

    def create_execution_context(self) -> Context:
        return Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.addresses, self.shapes = engine, dict[str, int](), dict[str, tuple[int, ...]]()

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = shape
        return max(shape) <= LONGEST

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return name in self.engine.io and address % 256 == 0

    def execute_async_v3(self, stream: int) -> bool:
        engine = self.engine
        if engine.trt.fail:
            engine.log.log(SimpleNamespace(name="INTERNAL_ERROR"), "kernel failed")
            return False
        assert stream == STREAM
        assert self.addresses.keys() == engine.io.keys()
        for name in engine.io.keys() - engine.inputs:
            source = engine._alias(name)
            if source:
                assert (self.addresses[name] == self.addresses[source]) == engine.trt.aliases
        outputs = engine.session.run(None, {name: self._array(name) for name in engine.inputs})
        for value, array in zip(engine.session.get_outputs(), outputs, strict=True):
            ctypes.memmove(self.addresses[value.name], np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return True

    def _array(self, name: str) -> np.ndarray:
        value = self.engine.io[name]
        dtype = numpy_dtype({"tensor(float)": "float32"}.get(value.type, value.type[7:-1]))
        shape = self.shapes.get(name, value.shape)
        size = int(np.prod(shape)) * dtype.itemsize
        return np.frombuffer(ctypes.string_at(self.addresses[name], size), dtype).reshape(shape)
