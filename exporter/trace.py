"""Modules to ONNX graphs, by transformers' exporter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch

from sievert.bundle.errors import GraphError
from sievert.exporter.brisk import brisk
from sievert.exporter.quiet import quiet

TRACED_OPSET = 23
"""The exporter's translations of RMSNormalization and RotaryEmbedding exist for this version; at 24 it takes both apart."""


def trace(module: torch.nn.Module, inputs: Mapping[str, torch.Tensor], axes: Mapping[str, Sequence[str | None]], *, what: str) -> ir.Model:
    """Trace ``module(**inputs)`` with the leading axes of each input symbolic, under the names that ``axes`` gives them; one without a name
    (None) is fixed.

    Axes of the same name are of the same size. Sizes of ``inputs`` must be at least 2: the tracer specialises on 0 and 1.

    Raises:
        GraphError: the module cannot be traced with these axes symbolic.
    """
    # Here: importing them takes seconds, and a refusal must not wait for it.
    with quiet(f"importing the exporter for {what}"):
        from torch.onnx import OnnxExporterError
        from transformers import exporters

    library: Any = exporters  # untyped, and its names are made on demand
    dims = {name: torch.export.Dim(name) for name in sorted({axis for names in axes.values() for axis in names if axis is not None})}
    shapes = {name: {place: dims[axis] for place, axis in enumerate(names) if axis is not None} for name, names in axes.items()}
    config = library.OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=TRACED_OPSET)
    with quiet(f"tracing {what}"), brisk():
        try:
            exported = library.OnnxExporter().export(module, dict(inputs), config=config)
        except (OnnxExporterError, torch._dynamo.exc.UserError) as error:
            raise GraphError(f"{what} could not be traced with symbolic {', '.join(dims)}: {error}") from error
    model: ir.Model = exported.program
    return model
