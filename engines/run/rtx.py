"""TensorRT for RTX and TensorRT: the same Python API under two module names.

Neither has been executed by this project yet: engines for RTX are built on machines without a GPU, and running them needs one.
Engines are deserialised here and nowhere else, from the very bytes whose SHA-256 the manifest lists, and with
``engine_host_code_allowed`` left off, so that an engine carries no code for the host.
Source: TensorRT Python API, ``Runtime``, ``ICudaEngine``, ``IExecutionContext``.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Any, Final, Literal, Protocol

import numpy as np

from sievert.bundle.errors import EngineError, EngineUnavailableError, IntegrityError
from sievert.bundle.files import open_plain
from sievert.bundle.specs import SEQUENCE, TensorSpec
from sievert.engines.run.base import Cache, ModelFile, check_caches, check_feeds, check_outputs
from sievert.engines.run.cuda import cuda_memory
from sievert.engines.run.dtypes import Array, numpy_dtype
from sievert.engines.run.memory import Buffer, Memory, find_sequence, shape_at

logger = logging.getLogger(__name__)

_DTYPES: Final = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT8": "int8",
    "INT32": "int32",
    "INT64": "int64",
    "UINT8": "uint8",
    "BOOL": "bool",
    "FP8": "float8e4m3fn",
}


class DeviceMemory(Memory, Protocol):
    """Device memory with the stream on which engines run."""

    @property
    def stream(self) -> int:
        """The stream's handle."""

    def synchronize(self) -> None:
        """Wait until the stream is empty."""


@dataclass(frozen=True)
class TensorRT:
    """Engines of TensorRT for RTX (``tensorrt-rtx``) or of full TensorRT (``tensorrt``, untested)."""

    name: Literal["tensorrt-rtx", "tensorrt"] = "tensorrt-rtx"

    @property
    def reads_onnx(self) -> bool:
        """It reads engine files that were built beforehand."""
        return False

    @property
    def tested(self) -> bool:
        """Not yet: no engine of either kind has been executed by this project."""
        return False

    @property
    def module(self) -> str:
        """The Python module: ``tensorrt_rtx`` or ``tensorrt``."""
        return self.name.replace("-", "_")

    @property
    def title(self) -> str:
        """The product's name."""
        return "TensorRT for RTX" if self.name == "tensorrt-rtx" else "TensorRT"

    def version(self) -> str | None:
        """The version of the installed library."""
        if importlib.util.find_spec(self.module) is None:
            return None
        try:
            return metadata.version(self.name)
        except metadata.PackageNotFoundError:  # a vendor's image without the wheel's metadata
            return str(importlib.import_module(self.module).__version__)

    def unavailable(self) -> str | None:
        """Why it cannot run here; None where it can."""
        version = self.version()
        if version is None:
            return f'{self.title} is not installed: run `pip install "sievert[{self.name}]"`'
        try:
            cuda_memory()
        except EngineUnavailableError as error:
            able = "engines can be built here, not run" if self.name == "tensorrt-rtx" else "engines can be neither built nor run here"
            return f"{self.title} {version} is installed but {error}: {able}"
        return None

    def load(self, model: ModelFile) -> TensorRTSession:
        """Deserialise an engine; see :class:`~sievert.engines.run.base.Runtime`."""
        if model.content is not None:
            raise EngineError(f"{self.title} runs engine files: an ONNX model in memory needs the engine onnxruntime")
        if reason := self.unavailable():
            raise EngineUnavailableError(reason)
        return deserialise(importlib.import_module(self.module), self.title, model, cuda_memory())


def deserialise(trt: Any, title: str, model: ModelFile, memory: DeviceMemory) -> TensorRTSession:
    """The session of an engine file, after its bytes were found to be the ones the manifest lists.

    Raises:
        IntegrityError: the file is missing, a link, or another one.
        EngineError: the library refused it.
    """
    with open_plain(model.path) as file:
        content = file.read()
    if (found := hashlib.sha256(content).hexdigest()) != model.sha256:
        raise IntegrityError(
            f"{model.path.name} has SHA-256 {found[:12]}... but the manifest lists {model.sha256[:12]}...: it is not loaded, "
            "build the engine again"
        )
    log = _make_logger(trt)
    runtime = trt.Runtime(log)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise EngineError(
            f"{model.path.name}: {title} {trt.__version__} refused the engine ({log.last_error or 'no reason given'}): build it again "
            "with this version and for this GPU"
        )
    context = engine.create_execution_context()
    if context is None:
        raise EngineError(f"{model.path.name}: {title} could not prepare the engine: {log.last_error or 'out of device memory?'}")
    return TensorRTSession(trt, model.path.name, (runtime, engine, context, log), memory)


class TensorRTSession:
    """A deserialised engine with its device buffers. All sizes are fixed, but for the prompts' length where its profile has a range."""

    def __init__(self, trt: Any, graph: str, parts: tuple[Any, Any, Any, Any], memory: DeviceMemory) -> None:
        self._graph = graph
        self._parts = parts  # runtime and logger have to outlive the engine, the engine its context
        _, self._engine, self._context, self._log = parts
        self._caches: tuple[Cache, ...] = ()
        self._buffers: dict[str, Buffer] = {}
        self.memory = memory
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        if hosted := [name for name in names if self._engine.get_tensor_location(name) != trt.TensorLocation.DEVICE]:
            raise EngineError(f"{graph}: {', '.join(hosted)} would have to lie in host memory: no graph of a variant needs that")
        taken = {name: self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
        self.inputs = tuple(self._spec(name) for name in names if taken[name])
        self.outputs = tuple(self._spec(name) for name in names if not taken[name])
        # A cache update inside the engine is in place only where it says so (newer versions do); elsewhere input and output differ.
        alias = getattr(self._engine, "get_aliased_input_tensor", None)
        aliases = {spec.name: alias(spec.name) for spec in self.outputs} if alias else {}
        self._aliases = {name: source for name, source in aliases.items() if source}

    def bind(self, caches: Sequence[Cache]) -> None:
        """Read and write these buffers in every later run."""
        check_caches(self._graph, self.inputs, self.outputs, caches)
        for cache in caches:
            if self._aliases.get(cache.present, cache.past) != cache.past:
                raise EngineError(f"{self._graph}: {cache.present} shares memory with {self._aliases[cache.present]}, not {cache.past}")
        self._caches = tuple(caches)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Compute ``outputs`` from host arrays; see :class:`~sievert.engines.run.base.Session`."""
        pasts, presents = {cache.past for cache in self._caches}, {cache.present for cache in self._caches}
        arrays = check_feeds(self._graph, self.inputs, pasts, feeds)
        wanted = check_outputs(self._graph, self.outputs, presents, outputs)
        sequence = find_sequence(self.inputs, arrays)
        for spec in self.inputs:
            if spec.name in arrays:
                self.memory.upload(self._place(spec, sequence), arrays[spec.name])
                if SEQUENCE in spec.shape:
                    self._set_shape(spec.name, arrays[spec.name].shape)
        for spec in self.outputs:  # all of them need an address, asked for or not
            if spec.name not in presents:
                self._place(spec, sequence)
        for cache in self._caches:
            in_place = cache.present in self._aliases
            self._set_address(cache.past, cache.buffer.address)
            self._set_address(cache.present, cache.buffer.address if in_place else cache.buffer.spare())
        if not self._context.execute_async_v3(self.memory.stream):
            raise EngineError(f"{self._graph}: TensorRT failed: {self._log.last_error or 'no reason given'}")
        self.memory.synchronize()
        for cache in self._caches:
            if cache.present not in self._aliases:
                cache.buffer.flip()
        results = {spec.name: np.empty(shape_at(spec, sequence), numpy_dtype(spec.dtype)) for spec in wanted}
        for name, array in results.items():
            self.memory.download(array, self._buffers[self._aliases.get(name, name)].address)
        return results

    def _place(self, spec: TensorSpec, sequence: int) -> int:
        """The device address of an input or output that is no cache, told to the engine; with room for ``sequence`` tokens or more."""
        owner = self._aliases.get(spec.name, spec.name)
        shape = shape_at(spec, sequence)
        if owner not in self._buffers or math.prod(self._buffers[owner].shape) < math.prod(shape):
            self._buffers[owner] = Buffer(self.memory, spec.model_copy(update={"shape": shape}))
        address = self._buffers[owner].address
        self._set_address(spec.name, address)
        return address

    def _set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if not self._context.set_input_shape(name, shape):
            raise EngineError(
                f"{self._graph}: TensorRT refused {name} of shape {shape}: {self._log.last_error or 'outside the range it was built for'}"
            )

    def _set_address(self, name: str, address: int) -> None:
        if not self._context.set_tensor_address(name, address):
            raise EngineError(f"{self._graph}: TensorRT refused the address of {name}: {self._log.last_error or 'no reason given'}")

    def _spec(self, name: str) -> TensorSpec:
        dtype = self._engine.get_tensor_dtype(name).name
        if dtype not in _DTYPES:
            raise EngineError(f"{self._graph}: {name} has type {dtype}, which no graph of a variant has at its border")
        # The engine keeps no names of axes; one alone can vary.
        shape = tuple(SEQUENCE if size < 0 else size for size in self._engine.get_tensor_shape(name))
        return TensorSpec(name=name, dtype=_DTYPES[dtype], shape=shape)


def _make_logger(trt: Any) -> Any:
    """A TensorRT logger that writes to ours: the library's own prints."""
    levels = {"INTERNAL_ERROR": logging.ERROR, "ERROR": logging.ERROR, "WARNING": logging.DEBUG, "INFO": logging.DEBUG}

    class Log(trt.ILogger):  # type: ignore[misc]  # the base class comes from a module chosen at run time
        last_error = ""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            level = levels.get(severity.name, logging.NOTSET)
            if level == logging.ERROR:
                self.last_error = message
            if level:
                logger.log(level, "%s", message)

    return Log()
