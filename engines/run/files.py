"""Which file of a bundle a runtime loads for a graph."""

from __future__ import annotations

from sievert.bundle.errors import EngineError
from sievert.bundle.manifest import Variant
from sievert.bundle.store import Bundle
from sievert.engines.run.base import ModelFile, Runtime


def find_model(bundle: Bundle, variant: str, graph: str, runtime: Runtime, lowered_for: str) -> ModelFile:
    """The file of ``graph``: an engine of that name for runtimes that read engines, else an ONNX file.

    ``lowered_for`` names the engine whose lowered ONNX file is wanted; empty means this runtime's own, or the variant's graph
    where nothing was lowered for it.

    Raises:
        VariantError: no such variant, graph or engine.
        IntegrityError: a file that is not what the manifest says.
        EngineError: a lowered ONNX file for a runtime that reads engines.
    """
    if not runtime.reads_onnx:
        if lowered_for:
            raise EngineError(f"{runtime.name} runs engine files: the ONNX files lowered for {lowered_for} run with the engine onnxruntime")
        entry = bundle.engine_entry(variant, runtime.name, graph)
        if entry.file is None:
            raise EngineError(f"variant {variant!r} has no engine file of {graph} for {runtime.name}: build it with `sievert build`")
        name = entry.file
    elif lowered_for or runtime.name in bundle.variant(variant).engines:
        name = bundle.engine_entry(variant, lowered_for or runtime.name, graph).lowered
    else:
        name = bundle.graph(graph, variant=variant).file
    return ModelFile(bundle.file(name), bundle.manifest.files[name].sha256, float8=has_float8(bundle.variant(variant)))


def has_float8(variant: Variant) -> bool:
    """Whether weights of the variant are 8-bit floats."""
    return variant.precision is not None and any(weight.dtype.startswith("float8") for weight in variant.precision.weights)
