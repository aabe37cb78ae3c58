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
from sievert.inspecting import measure_caches
from sievert.progress import Progress, silent

Calibration = Literal["max", "percentile"]


@dataclass(frozen=True)
class QuantisedVariant:
    """A variant that was added. ``path`` is the bundle; ``bytes`` of its own weights on the disk, and ``bytes_before`` of the same ones;
    ``cache_bytes`` of one decode batch, and ``cache_bytes_before`` in the variant it was made from.
    """

    path: Path
    name: str
    variant: Variant
    bytes: int
    bytes_before: int
    cache_bytes: int
    cache_bytes_before: int


def quantise(
    bundle: str | Path,
    *,
    variant: str = "full",
    format: str = "auto",  # noqa: A002
    kv: str = "",
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

    ``kv`` keeps the key and value caches of a float32 bundle in ``float16`` or ``bfloat16``, beside any format that does not itself make
    them so. ``format`` "auto" is ``int8``, or with ``kv`` none: the caches alone are narrowed.

    In 16 bit, graphs or caches, what the data shows to overflow ``float16`` stays float32. Of the other options each is for some formats
    and refused with the rest:

    Weights have a scale per output channel, in ``int4`` one per ``block`` (32 or 128) inputs. Activations have one per tensor: of their
    largest value in the data, or with ``calibration="percentile"`` of that ``percentile`` of their magnitudes, except where that would cut
    a value by more than a fifth. ``collection`` is what
    :func:`sievert.collect` stored of this very variant, by default ``BUNDLE-calibration`` beside the bundle; formats of weights alone read
    none. The projections that a selector reads stay as they are unless ``quantise_selector``, the product that makes the logits unless
    ``quantise_head``, every weight whose name holds one of ``keep_high``, and the ``keep_worst`` layers that lose most in the report
    ``sensitivity`` (``sievert sensitivity --json``). ``name`` is by default ``VARIANT-FORMAT``, ``VARIANT-kv-TYPE`` or
    ``VARIANT-FORMAT-kv-TYPE``. Scales from random data need ``random``, and every command that uses the variant says so.

    Raises:
        CalibrationError: an unknown format or option, no data, data of another model or variant, changed data, or nothing to quantise.
        VariantError: no such variant, one that is quantised already, or a name that is taken (``force`` replaces it).
        EngineUnavailableError, EngineError: ONNX Runtime cannot run here, or not these graphs.
        BundleError: the bundle is not what its manifest says, or cannot be written. Nothing was changed.
    """
    from sievert.calibration.caches import MEASURED, plan_caches
    from sievert.calibration.collection import load_collection
    from sievert.calibration.narrow import KINDS, narrow_caches, narrow_variant
    from sievert.calibration.options import PLAIN, refuse_unread
    from sievert.calibration.place import default_place
    from sievert.calibration.quantise import make_recipe, quantise_variant, require_plain
    from sievert.calibration.sensitivity import read_worst

    form = format if format != "auto" else PLAIN if kv else "int8"
    given = {"calibration": calibration, "percentile": percentile, "block": block, "quantise_selector": quantise_selector}
    refuse_unread(form, kv, given | {"quantise_head": quantise_head, "keep_high": tuple(keep_high), "keep_worst": keep_worst})
    keep = dict.fromkeys(keep_high, "asked for")
    if bool(keep_worst) != bool(str(sensitivity)):
        raise CalibrationError("keep_worst and sensitivity belong together: give both, or neither")
    if keep_worst:
        keep |= read_worst(Path(sensitivity), keep_worst, form)
    recipe = None
    if form not in (*KINDS, PLAIN):
        recipe = make_recipe(
            form, calibration=calibration, percentile=percentile, block=block, selector=quantise_selector, head=quantise_head, keep=keep
        )
    chosen = name or "-".join([variant, *([form] if form != PLAIN else []), *(["kv", kv] if kv else [])])
    check_variant_name(chosen)
    progress("checking the bundle")
    opened = Bundle.open(bundle, verify="full")
    opened.require_new_variant(chosen, force=force)
    require_plain(opened, variant)
    data = None
    if form in KINDS or kv in MEASURED or (recipe is not None and recipe.format.activations):
        folder = collection if str(collection) else default_place(opened)
        data = load_collection(folder, opened, progress=progress)
    caches = plan_caches(opened, variant, kv, data, random=random, progress=progress) if kv else None
    command = f"quantise {chosen} from {variant} ({form}{f', caches in {kv}' if kv else ''})"
    if recipe is not None:
        made = quantise_variant(
            opened, variant, chosen, recipe, data, caches=caches, random=random, force=force, command=command, progress=progress
        )
    elif caches is not None:
        made = narrow_caches(opened, variant, chosen, caches, data, force=force, command=command)
    else:
        made = narrow_variant(opened, variant, chosen, form, data, random=random, force=force, command=command, progress=progress)
    caches_now, caches_before = (measure_caches(opened.manifest, each).decode_bytes for each in (chosen, variant))
    return QuantisedVariant(opened.path, chosen, made, *measure_weights(opened.manifest, made), caches_now, caches_before)


def measure_weights(manifest: Manifest, variant: Variant) -> tuple[int, int]:
    """Bytes of a quantised variant's own weights, and of the same weights in the model's dtype; two zeros of any other variant."""
    if variant.precision is None:
        return 0, 0
    ends = (".q", ".float16", ".bfloat16")
    narrowed = {weight.name.rpartition(".")[0] for weight in variant.precision.weights if weight.name.endswith(ends)}
    before = sum(weight.nbytes for weight in manifest.weights if weight.name in narrowed)
    return sum(weight.nbytes for weight in variant.precision.weights), before
