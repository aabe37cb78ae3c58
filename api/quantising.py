"""Variants of a bundle in narrower number formats."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sievert.bundle.errors import CalibrationError
from sievert.bundle.manifest import Manifest, Variant
from sievert.bundle.names import check_variant_name
from sievert.bundle.store import Bundle
from sievert.progress import Progress, silent

Calibration = Literal["max", "percentile"]


@dataclass(frozen=True)
class QuantisedVariant:
    """A variant that was added. ``path`` is the bundle; ``bytes`` of its own weights on the disk, and ``bytes_before`` of the same ones."""

    path: Path
    name: str
    variant: Variant
    bytes: int
    bytes_before: int


def quantise(
    bundle: str | Path,
    *,
    variant: str = "full",
    format: str = "int8",  # noqa: A002
    name: str = "",
    calibration: Calibration = "max",
    percentile: float = 99.99,
    block: int = 32,
    collection: str | Path = "",
    quantise_selector: bool = False,
    quantise_head: bool = False,
    keep_high: Sequence[str] = (),
    keep_worst: int = 0,
    sensitivity: str | Path = "",
    random: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> QuantisedVariant:
    """Add a variant with the graphs of ``variant``, quantised: ``int8`` and ``fp8`` (E4M3) of weights and activations, ``int4`` and
    ``int8-weights`` of weights alone; or in 16 bit, ``float16`` and ``bfloat16``, from a float32 bundle.

    In 16 bit, what the data shows to overflow stays float32, and none of the other options apply. Else:

    Weights have a scale per output channel, in ``int4`` one per ``block`` (32 or 128) inputs. Activations have one per tensor: of their
    largest value in the data, or with ``calibration="percentile"`` of that ``percentile`` of their magnitudes. ``collection`` is what
    :func:`sievert.collect` stored of this very variant, by default ``BUNDLE-calibration`` beside the bundle; formats of weights alone read
    none. The projections that a selector reads stay as they are unless ``quantise_selector``, the product that makes the logits unless
    ``quantise_head``, every weight whose name holds one of ``keep_high``, and the ``keep_worst`` layers that lose most in the report
    ``sensitivity`` (``sievert sensitivity --json``). ``name`` is by default ``VARIANT-FORMAT``. Scales from random
    data need ``random``, and every command that uses the variant says so.

    Raises:
        CalibrationError: an unknown format or option, no data, data of another model or variant, changed data, or nothing to quantise.
        VariantError: no such variant, one that is quantised already, or a name that is taken (``force`` replaces it).
        EngineUnavailableError, EngineError: ONNX Runtime cannot run here, or not these graphs.
        BundleError: the bundle is not what its manifest says, or cannot be written. Nothing was changed.
    """
    from sievert.calibration.collection import load_collection
    from sievert.calibration.narrow import KINDS, narrow_variant
    from sievert.calibration.place import default_place
    from sievert.calibration.quantise import make_recipe, quantise_variant, require_plain
    from sievert.calibration.sensitivity import read_worst

    keep = dict.fromkeys(keep_high, "asked for")
    if bool(keep_worst) != bool(str(sensitivity)):
        raise CalibrationError("keep_worst and sensitivity belong together: give both, or neither")
    if keep_worst:
        keep |= read_worst(Path(sensitivity), keep_worst, format)
    sixteen = format in KINDS
    recipe = make_recipe(
        "int8" if sixteen else format,
        calibration=calibration,
        percentile=percentile,
        block=block,
        selector=quantise_selector,
        head=quantise_head,
        keep=keep,
    )
    chosen = name or f"{variant}-{format}"
    check_variant_name(chosen)
    progress("checking the bundle")
    opened = Bundle.open(bundle, verify="full")
    opened.require_new_variant(chosen, force=force)
    require_plain(opened, variant)
    data = None
    if recipe.format.activations:
        folder = collection if str(collection) else default_place(opened)
        data = load_collection(folder, opened, progress=progress)
    command = f"quantise {chosen} from {variant} ({format})"
    if sixteen and data is not None:
        made = narrow_variant(opened, variant, chosen, format, data, random=random, force=force, command=command, progress=progress)
    else:
        made = quantise_variant(opened, variant, chosen, recipe, data, random=random, force=force, command=command, progress=progress)
    return QuantisedVariant(opened.path, chosen, made, *measure_weights(opened.manifest, made))


def measure_weights(manifest: Manifest, variant: Variant) -> tuple[int, int]:
    """Bytes of a quantised variant's own weights, and of the same weights in the model's dtype; two zeros of any other variant."""
    if variant.precision is None:
        return 0, 0
    ends = (".q", ".float16", ".bfloat16")
    narrowed = {weight.name.rpartition(".")[0] for weight in variant.precision.weights if weight.name.endswith(ends)}
    before = sum(weight.nbytes for weight in manifest.weights if weight.name in narrowed)
    return sum(weight.nbytes for weight in variant.precision.weights), before
