"""A variant with quantised weights and activations, from a variant without: the same graphs, with explicit quantisers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import onnx_ir as ir

from sievert.bundle.errors import CalibrationError, VariantError
from sievert.bundle.manifest import GraphEntry, Precision, Variant
from sievert.bundle.specs import describe_values
from sievert.bundle.step import OpenStep
from sievert.bundle.store import Bundle
from sievert.calibration.caches import CacheFormat
from sievert.calibration.collection import Collection
from sievert.calibration.numbers import BLOCKS, NumberFormat, Quantised, find_number_format, quantise_weight, scale_of
from sievert.calibration.peaks import measure_peaks
from sievert.calibration.storing import WeightsFile
from sievert.calibration.tensors import read_values
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.quantise import Codes, InsertQuantisers, Linear, find_linears, selector_weights

Progress = Callable[[str], None]

_NOTHING: Final = np.zeros(0, np.float32)


@dataclass(frozen=True)
class Recipe:
    """What is quantised, and how. ``percentile`` of the activations' magnitudes stay within their scale, 100 is the largest one; an
    activation with outliers keeps the largest one (:meth:`sievert.calibration.peaks.Peak.outliers`).

    ``selector`` quantises the projections that selectors read too, ``head`` the one that makes the logits. ``keep`` are parts of names of
    weights that stay as they are, each with the reason.
    """

    format: NumberFormat
    percentile: float = 100.0
    block: int = 0
    selector: bool = False
    head: bool = False
    keep: Mapping[str, str] | None = None

    @property
    def calibration(self) -> str:
        """How scales of activations are chosen, in words; empty where they have none."""
        if not self.format.activations:
            return ""
        return "max" if self.percentile == 100 else f"percentile {self.percentile:g}"


def make_recipe(
    format: str,  # noqa: A002
    *,
    calibration: str = "max",
    percentile: float = 99.99,
    block: int = 32,
    selector: bool = False,
    head: bool = False,
    keep: Mapping[str, str] | None = None,
) -> Recipe:
    """A recipe from what a user says.

    Raises:
        CalibrationError: an unknown format or calibration, a percentile outside 50 to 100, a block no engine has.
    """
    form = find_number_format(format)
    if calibration not in ("max", "percentile"):
        raise CalibrationError(f"calibration {calibration!r} is not known: choose max or percentile")
    if not 50 <= percentile <= 100:
        raise CalibrationError(f"percentile={percentile:g}: choose one from 50 to 100, usually above 99")
    if form.blocks and block not in BLOCKS:
        raise CalibrationError(f"block={block}: engines have four-bit kernels for blocks of {' and '.join(map(str, BLOCKS))}")
    return Recipe(form, 100.0 if calibration == "max" else percentile, block if form.blocks else 0, selector, head, keep)


def quantise_variant(
    bundle: Bundle,
    base: str,
    name: str,
    recipe: Recipe,
    collection: Collection | None,
    *,
    caches: CacheFormat | None = None,
    random: bool = False,
    force: bool = False,
    command: str = "quantise",
    progress: Progress = lambda _: None,
) -> Variant:
    """Add the variant ``name`` to the bundle: the graphs of ``base`` with quantised operands, and their weights in a file of their own.

    Quantised weights stand on the disk once, whichever graph and variant reads them. ``collection`` gives the scales of activations; it
    must be of ``base``, and formats that quantise weights alone need none. ``caches``: key and value caches are narrowed too.

    Raises:
        VariantError: no such base, one that is quantised itself, or a name that is taken.
        CalibrationError: no data where it is needed, data of another variant, random data without ``random``, or nothing to quantise.
        EngineUnavailableError, EngineError: ONNX Runtime cannot measure the activations here.
        BundleError: the bundle cannot be written. Nothing is recorded and no file stays in all these cases.
    """
    bundle.require_new_variant(name, force=force)
    variant = require_plain(bundle, base)
    if name == base:
        raise VariantError(f"{name!r} is the variant to quantise: give the new one another name")
    data = _require_data(recipe, collection, base, random=random)
    models = {graph: ir.load(bundle.graph_file(graph, variant=base)) for graph in variant.graphs}
    chosen, kept = choose_weights(models, recipe)
    scales, unclipped = measure_scales(models, chosen, recipe, data, progress=progress)
    with bundle.step(command) as step:
        own, made = WeightsFile(step.manifest), dict[str, Quantised]()
        progress("quantising the weights")
        path = step.temporary(".data")
        with path.open("xb") as file:
            for weight, linear in chosen.items():
                codes = quantise_linear(linear, recipe)
                own.add(file, f"{weight}.q", codes.codes)
                own.add(file, f"{weight}.scale", codes.scale)
                made[weight] = replace(codes, codes=_NOTHING, scale=_NOTHING)  # one weight at a time is in memory
        if own.written:
            own.settle(step.add_file(path, f"weights.{recipe.format.name}", ".data"))
        placed = {
            weight: Codes(own.tensor(f"{weight}.q"), own.tensor(f"{weight}.scale"), each.axis, each.block, scales.get(weight))
            for weight, each in made.items()
        }
        changed = {graph for graph, model in models.items() if InsertQuantisers(placed)(model).modified}
        changed |= {graph for graph, model in models.items() if caches is not None and caches.narrow(model)}
        used = collection if data is not None or (caches is not None and caches.measured) else None
        precision = Precision(
            base=base,
            format=recipe.format.name,
            caches="" if caches is None else caches.dtype,
            block=recipe.block,
            calibration=recipe.calibration,
            unclipped=unclipped,
            data="" if used is None else used.info.seal,
            samples=0 if used is None else len(used.info.samples),
            random=used is not None and used.random,
            kept=kept if caches is None else {**kept, **caches.kept},
            weights=own.stored,
        )
        new = put_graphs(step, name, variant, {graph: models[graph] for graph in changed}, precision)
        step.put_variant(name, new, force=force)
    return new


def put_graphs(step: OpenStep, name: str, variant: Variant, models: Mapping[str, ir.Model], precision: Precision) -> Variant:
    """``variant`` with ``models`` in the place of its graphs, written as those of ``name``; graphs that stay are its own files."""
    entries = dict(variant.graphs)
    for graph, model in models.items():
        file = step.add_bytes(f"{name}.{graph}", ".onnx", to_bytes(model))
        inputs, outputs = describe_values(model.graph.inputs), describe_values(model.graph.outputs)
        entries[graph] = GraphEntry(file=file, inputs=inputs, outputs=outputs)
    return variant.model_copy(update={"graphs": entries, "engines": {}, "precision": precision})


def require_plain(bundle: Bundle, base: str) -> Variant:
    """The variant ``base``, which is of the model's own dtype.

    Raises:
        VariantError: there is none, or it is quantised.
    """
    variant = bundle.variant(base)
    if variant.precision is not None:
        made = variant.precision
        raise VariantError(f"variant {base!r} is quantised already ({made.label}): quantise the one it was made from, {made.base!r}")
    return variant


def _require_data(recipe: Recipe, collection: Collection | None, base: str, *, random: bool) -> Collection | None:
    if not recipe.format.activations:
        return None
    if collection is None:
        raise CalibrationError(f"{recipe.format.name} quantises activations, whose scales come from data: run `sievert collect` first")
    collection.require_use(base, random=random)
    return collection


def choose_weights(models: Mapping[str, ir.Model], recipe: Recipe) -> tuple[dict[str, Linear], dict[str, str]]:
    """The weights to quantise, by name, each with one of its products; and those that stay, each with the reason.

    Raises:
        CalibrationError: none is left to quantise.
    """
    read = frozenset[str]() if recipe.selector else frozenset().union(*map(selector_weights, models.values()))
    chosen: dict[str, Linear] = {}
    kept: dict[str, str] = {}
    for model in models.values():
        for linear in find_linears(model):
            reason = _keep(linear, recipe, read)
            if reason:
                kept.setdefault(linear.name, reason)
                chosen.pop(linear.name, None)
            elif linear.name not in kept:
                chosen.setdefault(linear.name, linear)
    if not chosen:
        reasons = ", ".join(sorted(set(kept.values()))) or "its graphs have no products with weights"
        raise CalibrationError(f"nothing is left to quantise: {reasons}")
    return chosen, kept


def _keep(linear: Linear, recipe: Recipe, read: frozenset[str]) -> str:
    """Why a weight stays as it is; empty where it does not."""
    if linear.name in read:
        return "a selector reads what it makes"
    if linear.head and not recipe.head:
        return "it makes the logits"
    size = _shape(linear)[1 - linear.channel_axis]
    if recipe.block and size % recipe.block:
        return f"its {size} inputs are no multiple of the block of {recipe.block}"
    return next((reason for part, reason in (recipe.keep or {}).items() if part in linear.name), "")


def measure_scales(
    models: Mapping[str, ir.Model], chosen: Mapping[str, Linear], recipe: Recipe, data: Collection | None, *, progress: Progress
) -> tuple[dict[str, float], tuple[str, ...]]:
    """The scale of what each chosen weight is multiplied with, none where the format leaves activations alone; and the weights whose
    activation has its largest value for a scale though a percentile was asked for.
    """
    if data is None:
        return {}, ()
    peaks = measure_peaks(data, models, chosen.keys(), percentile=recipe.percentile, progress=progress)
    dtype = next(iter(chosen.values())).activation.dtype or ir.DataType.FLOAT
    reach = {name: peak.most if peak.outliers else peak.percentile for name, peak in peaks.items()}
    # As the graph will hold it, so that equal peaks stay equal.
    scales = {name: float(scale_of(each, recipe.format, dtype.numpy())) for name, each in reach.items()}
    return scales, tuple(sorted(name for name, peak in peaks.items() if peak.outliers))


def quantise_linear(linear: Linear, recipe: Recipe) -> Quantised:
    """One weight, read from the disk, in codes."""
    tensor = linear.weight.const_value
    if tensor is None:
        raise CalibrationError(f"{linear.name} has no content")
    weight = read_values(tensor).astype(np.float32)
    return quantise_weight(weight, recipe.format, channel_axis=linear.channel_axis, block=recipe.block, dtype=tensor.dtype.numpy())


def quantise_models(
    models: Mapping[str, ir.Model], chosen: Mapping[str, Linear], scales: Mapping[str, float], recipe: Recipe
) -> Mapping[str, ir.Model]:
    """Copies of graphs with the chosen weights quantised, codes inside: to be run from memory."""
    codes: dict[str, Codes] = {}
    for name, linear in chosen.items():
        made = quantise_linear(linear, recipe)
        kind = recipe.format.dtype
        codes[name] = Codes(ir.Tensor(made.codes, dtype=kind), ir.Tensor(made.scale), made.axis, made.block, scales.get(name))
    return {graph: InsertQuantisers(codes)(model.clone()).model for graph, model in models.items()}


def _shape(linear: Linear) -> tuple[int, int]:
    shape = linear.weight.const_value.shape if linear.weight.const_value is not None else linear.weight.shape
    rows, columns = (int(axis) for axis in shape.numpy()) if shape is not None else (0, 0)
    return rows, columns
