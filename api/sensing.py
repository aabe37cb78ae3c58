"""Which layers lose most when they are quantised."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sievert.bundle.errors import CalibrationError
from sievert.bundle.store import Bundle
from sievert.progress import Progress, silent
from sievert.quantising import Calibration

if TYPE_CHECKING:
    from sievert.calibration.sensitivity import Sensitivity

DEFAULT_SAMPLES = 32


def sensitivity(
    bundle: str | Path,
    collection: str | Path = "",
    *,
    variant: str = "",
    format: str = "int8",  # noqa: A002
    calibration: Calibration = "max",
    percentile: float = 99.99,
    block: int = 32,
    samples: int = DEFAULT_SAMPLES,
    random: bool = False,
    progress: Progress = silent,
) -> Sensitivity:
    """Quantise one layer of a variant at a time, in memory, and measure what its first answers lose on calibration data.

    ``collection`` is by default ``BUNDLE-calibration`` beside the bundle, ``variant`` the one it was collected from; ``format``,
    ``calibration``, ``percentile`` and ``block`` are as :func:`sievert.quantise` takes them. ``samples`` are how many of the data are run
    for each layer. The bundle is not changed.

    Raises:
        CalibrationError: an unknown format or option, data of another model or variant, changed data, random data without ``random``.
        VariantError: no such variant, or one that is quantised.
        EngineUnavailableError, EngineError: ONNX Runtime cannot run here, or not these graphs.
        BundleError: the bundle is not what its manifest says.
    """
    from sievert.calibration.collection import load_collection
    from sievert.calibration.options import refuse_unread
    from sievert.calibration.place import default_place
    from sievert.calibration.quantise import make_recipe
    from sievert.calibration.sensitivity import measure_sensitivity

    if samples < 1:
        raise CalibrationError(f"samples={samples}: give at least 1")
    refuse_unread(format, "", {"calibration": calibration, "percentile": percentile, "block": block})
    recipe = make_recipe(format, calibration=calibration, percentile=percentile, block=block)
    progress("checking the bundle")
    opened = Bundle.open(bundle)
    folder = collection if str(collection) else default_place(opened)
    loaded = load_collection(folder, opened, progress=progress)
    return measure_sensitivity(loaded, variant or loaded.info.variant, recipe, samples=samples, random=random, progress=progress)
