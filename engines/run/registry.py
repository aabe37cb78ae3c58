"""The runtimes by name. A new one is a file like ``ort.py`` and a line here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sievert.bundle.errors import EngineUnavailableError, InputError
from sievert.engines.run.base import Runtime
from sievert.engines.run.cuda import Device, cuda_memory
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.rtx import TensorRT

RUNTIMES: Final[dict[str, Runtime]] = {
    runtime.name: runtime
    for runtime in (
        OnnxRuntime(),
        OnnxRuntime("CUDAExecutionProvider"),
        TensorRT("tensorrt-rtx"),
        TensorRT("tensorrt"),
    )
}


@dataclass(frozen=True)
class RuntimeReport:
    """What this machine can do with a runtime. ``tested``: this project has executed it on the hardware it is for."""

    name: str
    version: str | None
    tested: bool
    unavailable: str | None


def find_runtime(name: str, *, low_memory: bool = False) -> Runtime:
    """The runtime of this name. ``low_memory``: all its sessions read the one mapped weights file, which costs time (docs/bench.md).

    Raises:
        InputError: there is none, or not with low memory.
    """
    if name not in RUNTIMES:
        raise InputError(f"engine {name!r} does not exist: choose one of {', '.join(RUNTIMES)}")
    if not low_memory:
        return RUNTIMES[name]
    if name != OnnxRuntime().name:
        raise InputError(
            f"low memory was asked of {name}, but only onnxruntime can leave out its copies of the weights: leave out --low-memory"
        )
    return OnnxRuntime(prepack=False)


def report_runtimes() -> tuple[RuntimeReport, ...]:
    """Every runtime as this machine sees it."""
    return tuple(RuntimeReport(name, run.version(), run.tested, run.unavailable()) for name, run in RUNTIMES.items())


def find_gpu() -> Device | None:
    """The first CUDA device, if there is a driver and one."""
    try:
        return cuda_memory().device()
    except EngineUnavailableError:
        return None
