"""The libraries that build engines: which are installed, and what this machine can build with them.

TensorRT for RTX and full TensorRT share one Python API under two module names, so all code here serves both. Full TensorRT has not been
tried yet.
"""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from dataclasses import dataclass
from importlib import metadata
from types import MappingProxyType
from typing import Final

from sievert.bundle.errors import EngineError
from sievert.graph_passes.lowering.targets import Target

_DRIVER: Final = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"


@dataclass(frozen=True)
class Builder:
    """How engines of one name come about. ``module`` is None where the runtime reads the lowered ONNX file itself.

    ``capabilities`` are the compute capabilities an engine can be built for by name; ``needs_gpu``: only for the one in this machine.
    """

    engine: str
    target: Target
    module: str | None = None
    needs_gpu: bool = False
    capabilities: tuple[str, ...] = ()


# Without a capability TensorRT for RTX makes an engine for 8.0, 8.6, 8.9, 12.0 and later; Turing (SM75) must be asked for and has no
# bfloat16. Hopper (9.0) is not among the names it knows: whether the default engine runs there is not known.
BUILDERS: Final = MappingProxyType(
    {
        builder.engine: builder
        for builder in (
            Builder("onnxruntime", "onnxruntime"),
            Builder("onnxruntime-cuda", "onnxruntime-cuda"),
            Builder(
                "tensorrt-rtx", "tensorrt-rtx", "tensorrt_rtx", capabilities=("SM75", "SM80", "SM86", "SM89", "SM120", "SM121", "CURRENT")
            ),
            Builder("tensorrt", "tensorrt", "tensorrt", needs_gpu=True),
        )
    }
)


def find_builder(engine: str) -> Builder:
    """The builder of that engine.

    Raises:
        EngineError: there is none; the message lists those there are.
    """
    if engine not in BUILDERS:
        raise EngineError(f"unknown engine {engine!r}: choose one of {', '.join(BUILDERS)}")
    return BUILDERS[engine]


def unavailable_to_build(engine: str) -> str | None:
    """Why engines of that name cannot be built on this machine and what to do, in one sentence; None where they can.

    Raises:
        EngineError: an unknown engine.
    """
    builder = find_builder(engine)
    if builder.module is None:
        return None
    if importlib.util.find_spec(builder.module) is None:
        return f'the Python package {builder.module} is not installed: run `pip install "sievert[{engine}]"`'
    if builder.needs_gpu and not has_gpu():
        return f"{engine} builds engines on the GPU they are for, and no NVIDIA GPU with its driver was found: build on the target machine"
    return None


def has_gpu() -> bool:
    """Whether the NVIDIA driver is there and shows a device."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def describe_builder(builder: Builder, capabilities: tuple[str, ...]) -> str:
    """What the manifest records: library, version, and for which compute capabilities."""
    if builder.module is None:
        return f"{builder.engine} reads the graph itself"
    versions = (builder.module.replace("_", "-"), builder.module)
    for name in versions:
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return f"{builder.module} {version}, {'+'.join(capabilities) or 'default capabilities'}"
    return builder.module
