"""ONNX Runtime, on the CPU or on CUDA.

Caches are bound by address as input and as output, which makes TensorScatter write in place: it copies the whole cache only
where the two addresses differ (seen in 1.31 on the CPU: 0.005 ms against 1.4 ms for 33 MB).
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np

from sievert.bundle.errors import EngineError, EngineUnavailableError, IntegrityError
from sievert.bundle.specs import TensorSpec
from sievert.engines.run.base import Cache, ModelFile, check_caches, check_feeds, check_outputs
from sievert.engines.run.cuda import cuda_memory
from sievert.engines.run.dtypes import ONNX_CODE, Array, numpy_dtype
from sievert.engines.run.memory import HostMemory, Memory, find_sequence, shape_at

logger = logging.getLogger(__name__)

Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider"]
WHEELS: Final = ("onnxruntime", "onnxruntime-gpu")
_TYPES: Final = {"tensor(float)": "float32", "tensor(double)": "float64"}  # the others are named as we name them
_ERRORS_ONLY: Final = 3
_NO_KERNEL: Final = "Could not find an implementation"


@dataclass(frozen=True)
class OnnxRuntime:
    """ONNX Runtime with one execution provider. ``threads``: 0 lets it take one per physical core.

    ``prepack``: on the CPU every session keeps its own copy of the weights in the order its kernels like. Without it all sessions read the
    one mapped file, which is slower and takes the memory of one model (docs/memory.md).
    ``profile``: the beginning of the files that its sessions write what every operator takes to; empty: none is written.
    """

    provider: Provider = "CPUExecutionProvider"
    threads: int = 0
    prepack: bool = True
    profile: str = ""

    @property
    def name(self) -> str:
        """``onnxruntime`` or ``onnxruntime-cuda``."""
        return "onnxruntime" if self.provider == "CPUExecutionProvider" else "onnxruntime-cuda"

    @property
    def reads_onnx(self) -> bool:
        """It does."""
        return True

    @property
    def tested(self) -> bool:
        """Only the CPU provider has been executed so far."""
        return self.provider == "CPUExecutionProvider"

    def version(self) -> str | None:
        """The version of the wheel that is installed."""
        return next((metadata.version(wheel) for wheel in installed_wheels()), None)

    def unavailable(self) -> str | None:
        """Why it cannot run here and what to install; None where it can."""
        if reason := wheel_fault(installed_wheels(), importlib.util.find_spec("onnxruntime") is not None):
            return reason
        import onnxruntime

        if self.provider in onnxruntime.get_available_providers():
            return None
        return (
            "this ONNX Runtime has no CUDA provider: run `pip uninstall onnxruntime`, then "
            '`pip install "sievert[gpu]"`, or use the engine onnxruntime'
        )

    def load(self, model: ModelFile) -> OrtSession:
        """Load an ONNX graph; see :class:`~sievert.engines.run.base.Runtime`."""
        if reason := self.unavailable():
            raise EngineUnavailableError(reason)
        import onnxruntime

        providers: list[str] = [self.provider]
        if self.provider == "CUDAExecutionProvider":
            onnxruntime.preload_dlls()  # finds CUDA and cuDNN where pip put them
            providers.append("CPUExecutionProvider")  # for shape arithmetic, which belongs there
        # Without enable_fallback=0 it prints, retries on the CPU and goes on.
        try:
            session = onnxruntime.InferenceSession(
                model.content or model.path, self._options(model), providers=providers, enable_fallback=0
            )
        except failures() as error:
            raise _load_error(model, error) from error
        if session.get_providers()[0] != self.provider:
            raise EngineUnavailableError(
                f"ONNX Runtime could not start {self.provider} and offers {session.get_providers()}: check the driver and CUDA "
                "libraries with `sievert doctor`, or use the engine onnxruntime"
            )
        logger.debug("%s: loaded %s", self.name, model.path.name)
        memory: Memory = HostMemory() if self.provider == "CPUExecutionProvider" else cuda_memory()
        return OrtSession(model.path.name, session, memory, "cpu" if self.provider == "CPUExecutionProvider" else "cuda")

    def _options(self, model: ModelFile) -> Any:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.log_severity_level = _ERRORS_ONLY
        if not self.prepack:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if self.profile:
            options.enable_profiling = True
            options.profile_file_prefix = self.profile
        if model.float8:
            # 1.31 fuses quantised operands into integer products whatever their type, and then refuses the graph. Without that it computes
            # in float32 with exactly the values the quantisers round to.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        if model.content is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(model.path.parent))
        return options


class OrtSession:
    """A graph loaded by ONNX Runtime. Bindings are by address: bfloat16 has no numpy type that the library knows."""

    def __init__(self, graph: str, session: Any, memory: Memory, device: str) -> None:
        self._graph = graph
        self._session = session
        self._device = device
        self._caches: tuple[Cache, ...] = ()
        self._binding = session.io_binding()
        self.memory = memory
        self.inputs = tuple(_spec(value) for value in session.get_inputs())
        self.outputs = tuple(_spec(value) for value in session.get_outputs())

    def bind(self, caches: Sequence[Cache]) -> None:
        """Read and write these buffers in every later run."""
        check_caches(self._graph, self.inputs, self.outputs, caches)
        self._caches = tuple(caches)

    def run(self, feeds: Mapping[str, Array], outputs: Sequence[str] | None = None) -> dict[str, Array]:
        """Compute ``outputs`` from host arrays; see :class:`~sievert.engines.run.base.Session`."""
        arrays = check_feeds(self._graph, self.inputs, {cache.past for cache in self._caches}, feeds)
        specs = check_outputs(self._graph, self.outputs, {cache.present for cache in self._caches}, outputs)
        sequence = find_sequence(self.inputs, arrays)
        results = {spec.name: np.empty(shape_at(spec, sequence), numpy_dtype(spec.dtype)) for spec in specs}
        types = {spec.name: ONNX_CODE[spec.dtype] for spec in (*self.inputs, *self.outputs)}
        binding = self._binding
        binding.clear_binding_inputs()
        binding.clear_binding_outputs()
        for name, array in arrays.items():
            binding.bind_input(name, "cpu", 0, types[name], array.shape, array.ctypes.data)
        for name, array in results.items():
            binding.bind_output(name, "cpu", 0, types[name], array.shape, array.ctypes.data)
        for cache in self._caches:
            place = (self._device, 0, types[cache.past], cache.buffer.shape, cache.buffer.address)
            binding.bind_input(cache.past, *place)
            binding.bind_output(cache.present, *place)
        try:
            self._session.run_with_iobinding(binding)
        except failures() as error:
            raise EngineError(f"{self._graph}: ONNX Runtime failed: {error}") from error
        return results

    def end_profile(self) -> Path:
        """Stop profiling and say where the profile is; for a runtime that was given ``profile``, once."""
        return Path(self._session.end_profiling())


def installed_wheels() -> list[str]:
    """Which of the two wheels that exclude each other are installed."""
    found = []
    for wheel in WHEELS:
        try:
            metadata.distribution(wheel)
        except metadata.PackageNotFoundError:
            continue
        found.append(wheel)
    return found


def wheel_fault(wheels: Sequence[str], importable: bool) -> str | None:
    """What is wrong with the installed wheels, with the commands that repair it; None where nothing is.

    An importable package from neither wheel (a nightly, a vendor's or an own build) is taken as it is.
    """
    if len(wheels) > 1:
        return (
            f"{' and '.join(wheels)} are both installed and overwrite each other's files: run `pip uninstall {' '.join(wheels)}`, "
            'then `pip install "sievert[cpu]"` or `pip install "sievert[gpu]"`'
        )
    if not importable:
        return 'ONNX Runtime is not installed: run `pip install "sievert[cpu]"`, or `pip install "sievert[gpu]"` for CUDA'
    return None


def failures() -> tuple[type[Exception], ...]:
    """Every exception the library raises; its own have no common base but Exception."""
    from onnxruntime.capi import onnxruntime_pybind11_state as state

    own = (value for value in vars(state).values() if isinstance(value, type) and issubclass(value, Exception))
    return (RuntimeError, ValueError, *own)


def _load_error(model: ModelFile, error: Exception) -> Exception:
    if model.content is None and not model.path.is_file():
        return IntegrityError(f"{model.path.name} is missing from {model.path.parent}")
    advice = ""
    if _NO_KERNEL in str(error):
        advice = ". In bfloat16 the CPU has few kernels: `sievert build --engine onnxruntime` on this variant writes graphs that emulate it"
    return EngineError(f"{model.path.name}: ONNX Runtime refused the graph: {error}{advice}")


def _spec(value: Any) -> TensorSpec:
    dtype = _TYPES.get(value.type) or value.type.removeprefix("tensor(").removesuffix(")")
    return TensorSpec(name=value.name, dtype=dtype, shape=tuple("?" if axis is None else axis for axis in value.shape))
