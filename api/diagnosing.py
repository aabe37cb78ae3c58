"""What this machine can do: which engines it builds and runs, in which dtypes, on which devices."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata

_PACKAGES = (
    "sievert",
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt-rtx",
    "tensorrt",
)
_DTYPES = {
    "onnxruntime": ("float32: full speed", "float16, bfloat16: emulated (cast around missing kernels), for checks only"),
    "onnxruntime-cuda": ("float32", "float16", "bfloat16: few kernels"),
    "tensorrt-rtx": ("float32: attention is written out, slower", "float16", "bfloat16: not on Turing (SM75)"),
    "tensorrt": ("float32: attention is written out, slower", "float16", "bfloat16"),
}


@dataclass(frozen=True)
class EngineInfo:
    """One engine on this machine. ``build_fault`` and ``run_fault`` say why it cannot be built or run here; empty: it can.

    ``tested``: this project has executed it on the hardware it is for. ``dtypes``: what models of each dtype may expect of it.
    """

    name: str
    version: str
    build_fault: str
    run_fault: str
    tested: bool
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Diagnosis:
    """What was found. ``memory_gib`` is 0 where it cannot be told; ``gpu`` is empty without one."""

    system: str
    python: str
    cores: int
    memory_gib: float
    gpu: str
    packages: Mapping[str, str]
    engines: tuple[EngineInfo, ...]


def doctor() -> Diagnosis:
    """Look at this machine."""
    from sievert.engines.run.registry import find_gpu

    gpu = find_gpu()
    return Diagnosis(
        system=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_gib=find_memory_gib(),
        gpu="" if gpu is None else f"{gpu.name}, compute capability {gpu.capability}, {gpu.memory_mib} MiB",
        packages={name: version for name in _PACKAGES if (version := _version(name))},
        engines=inspect_engines(),
    )


def inspect_engines() -> tuple[EngineInfo, ...]:
    """Every engine as this machine sees it."""
    from sievert.engines.build.builders import BUILDERS, unavailable_to_build
    from sievert.engines.run.registry import report_runtimes

    return tuple(
        EngineInfo(
            name=report.name,
            version=report.version or "",
            build_fault=(unavailable_to_build(report.name) or "") if report.name in BUILDERS else "no builder",
            run_fault=report.unavailable or "",
            tested=report.tested,
            dtypes=_DTYPES.get(report.name, ()),
        )
        for report in report_runtimes()
    )


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def find_memory_gib() -> float:
    """The machine's memory, 0 where that cannot be told."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):  # not on every system
        return 0.0
