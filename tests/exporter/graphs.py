"""Graphs of tests in ONNX Runtime, and how they are compared."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime


def run(model: ir.Model | Path, **feeds: Any) -> dict[str, np.ndarray]:
    """All outputs by name, of a graph in memory (its weights go along; it is not changed) or of a file."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    source = str(model) if isinstance(model, Path) else ir.to_proto(model).SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def assert_equal(got: np.ndarray, expected: np.ndarray, *, tolerance: float = 1e-5) -> None:
    """Same shape, finite, and nowhere further apart than ``tolerance * max(1, max |expected|)``."""
    assert got.shape == expected.shape
    assert np.isfinite(got).all()
    assert np.abs(got.astype(np.float64) - expected.astype(np.float64)).max() <= tolerance * max(1.0, float(np.abs(expected).max()))
