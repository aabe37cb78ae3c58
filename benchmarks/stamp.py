"""A hash of the code a table measured, so that a reader can tell whether the table is still about this code."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def hash_code(paths: Iterable[str]) -> str:
    """SHA-256 over the names and contents of the files under ``paths`` (relative to the repository), first 12 digits."""
    digest = hashlib.sha256()
    for path in sorted(paths):
        place = ROOT / path
        files = (
            [place] if place.is_file() else sorted(file for file in place.rglob("*") if file.is_file() and "__pycache__" not in file.parts)
        )
        for file in files:
            digest.update(str(file.relative_to(ROOT)).encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def describe_machine() -> str:
    """Processor, cores in use and library versions, in one line."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = f"{len(names)} x {names[0]}" if names else model
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "onnx", "onnxruntime"))
    return f"{model}; Python {platform.python_version()}, {libraries}"
