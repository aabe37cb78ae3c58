"""16-bit variants of float32 ones, whole or of their caches alone: what data shows to overflow stays float32, with the reason."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Final, Literal

import numpy as np
import onnx_ir as ir

from sievert.bundle.errors import CalibrationError, VariantError
from sievert.bundle.manifest import Precision, Variant
from sievert.bundle.store import Bundle
from sievert.calibration.caches import CacheFormat
from sievert.calibration.collection import Collection
from sievert.calibration.judging import TensorRange
from sievert.calibration.quantise import put_graphs, require_plain
from sievert.calibration.ranges import measure_ranges
from sievert.calibration.storing import WeightsFile
from sievert.calibration.tensors import read_values
from sievert.graph_passes.narrow import Narrow, fit

SixteenBit = Literal["float16", "bfloat16"]

KINDS: Final[Mapping[str, ir.DataType]] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
_CACHE: Final = re.compile(r"(?:past_key_values|present)\.(\d+)\.(key|value)")


def narrow_variant(
    bundle: Bundle,
    base: str,
    name: str,
    dtype: str,
    collection: Collection | None,
    *,
    random: bool = False,
    force: bool = False,
    command: str = "quantise",
    progress: Callable[[str], None] = lambda _: None,
) -> Variant:
    """Add the variant ``name``: the graphs of ``base`` in ``dtype``, with float32 islands, and weights of that type in a file of their own.

    Every float tensor is measured on the data first. A tensor that the format cannot hold stays float32 in the nodes that make and read it;
    the manifest keeps it as ``GRAPH/TENSOR`` with the reason. A cache that overflows in one graph is float32 in all.

    Raises:
        VariantError: no such base, one that is not float32, or a name that is taken.
        CalibrationError: no data, data of another variant, random data without ``random``, or NaN in it.
        EngineUnavailableError, EngineError: ONNX Runtime cannot measure the tensors here.
        BundleError: the bundle cannot be written. Nothing is recorded and no file stays in all these cases.
    """
    bundle.require_new_variant(name, force=force)
    variant = require_plain(bundle, base)
    if bundle.manifest.source.dtype != "float32":
        raise VariantError(f"the bundle is {bundle.manifest.source.dtype} already: 16-bit variants are made in a float32 one")
    if name == base:
        raise VariantError(f"{name!r} is the variant to narrow: give the new one another name")
    if collection is None:
        raise CalibrationError(f"{dtype}: what it cannot hold is found in data: run `sievert collect` first")
    collection.require_use(base, random=random)
    found = measure_ranges(collection, base, dtype=dtype, progress=progress)
    if broken := [each for each in found.tensors if each.verdict == "nan"]:
        raise CalibrationError(f"{broken[0].name} of {broken[0].graph} holds NaN on {broken[0].at}: {broken[0].reason}")
    kind = KINDS[dtype]
    high = keep_high(found.keep_float32, variant.graphs)
    originals: dict[str, ir.TensorProtocol] = {}
    models: dict[str, ir.Model] = {}
    for graph in variant.graphs:
        model = ir.load(bundle.graph_file(graph, variant=base))
        originals |= {str(value.name): value.const_value for value in model.graph.initializers.values() if value.const_value is not None}
        models[graph] = Narrow(kind, partial(_placeholder, originals, kind), high[graph])(model).model
    with bundle.step(command) as step:
        own = WeightsFile(step.manifest)
        progress("narrowing the weights")
        path = step.temporary(".data")
        suffix = f".{dtype}"
        with path.open("xb") as file:
            for weight in dict.fromkeys(name for model in models.values() for name in _placeholders(model)):
                own.add(file, weight, fit(read_values(originals[weight.removesuffix(suffix)]), kind))
        if own.written:
            own.settle(step.add_file(path, f"weights.{dtype}", ".data"))
        for model in models.values():
            for weight in _placeholders(model):
                model.graph.initializers[weight].const_value = own.tensor(weight)
        precision = Precision(
            base=base,
            format=dtype,
            data=collection.info.seal,
            samples=len(collection.info.samples),
            random=collection.random,
            kept={f"{each.graph}/{each.name}": each.reason for each in found.keep_float32},
            weights=own.stored,
        )
        new = put_graphs(step, name, variant, models, precision)
        step.put_variant(name, new, force=force)
    return new


def narrow_caches(
    bundle: Bundle,
    base: str,
    name: str,
    caches: CacheFormat,
    collection: Collection | None,
    *,
    force: bool = False,
    command: str = "quantise",
) -> Variant:
    """Add the variant ``name``: the graphs of ``base`` over the same weights, with key and value caches as ``caches`` says.

    ``collection`` is what the caches were measured on, None where they were not.

    Raises:
        VariantError: no such base, one that is quantised, or a name that is taken.
        GraphError: caches that are not updated as the graphs' contract says.
        BundleError: the bundle cannot be written. Nothing is recorded and no file stays in all these cases.
    """
    bundle.require_new_variant(name, force=force)
    variant = require_plain(bundle, base)
    if name == base:
        raise VariantError(f"{name!r} is the variant to narrow: give the new one another name")
    models = {graph: ir.load(bundle.graph_file(graph, variant=base)) for graph in variant.graphs}
    changed = {graph: model for graph, model in models.items() if caches.narrow(model)}
    used = collection if caches.measured else None
    precision = Precision(
        base=base,
        format=bundle.manifest.source.dtype,
        caches=caches.dtype,
        data="" if used is None else used.info.seal,
        samples=0 if used is None else len(used.info.samples),
        random=used is not None and used.random,
        kept=dict(caches.kept),
    )
    with bundle.step(command) as step:
        new = put_graphs(step, name, variant, changed, precision)
        step.put_variant(name, new, force=force)
    return new


def keep_high(overflowing: Iterable[TensorRange], graphs: Iterable[str]) -> dict[str, frozenset[str]]:
    """By graph the names of what stays float32. Caches are one thing in all graphs, under two names."""
    names: dict[str, set[str]] = defaultdict(set)
    caches: set[str] = set()
    weights: set[str] = set()
    for each in overflowing:
        names[each.graph].add(each.name)
        if match := _CACHE.fullmatch(each.name):
            caches |= {f"{word}.{match[1]}.{match[2]}" for word in ("past_key_values", "present")}
        if each.kind == "weight":
            weights.add(each.name)  # judged with the first graph that has it
    return {graph: frozenset(names[graph] | caches | weights) for graph in graphs}


def _placeholder(originals: Mapping[str, ir.TensorProtocol], kind: ir.DataType, name: str) -> ir.TensorProtocol:
    """Where a narrow weight will be once it is written."""
    shape = [int(axis) for axis in originals[name].shape.numpy()]
    return ir.ExternalTensor("", 0, 2 * int(np.prod(shape)), kind, shape=ir.Shape(shape), name=name)


def _placeholders(model: ir.Model) -> list[str]:
    tensors = ((name, value.const_value) for name, value in model.graph.initializers.items())
    return [name for name, tensor in tensors if isinstance(tensor, ir.ExternalTensor) and not tensor.location]
