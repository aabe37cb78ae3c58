"""What a narrower floating point format would do to a model, judged from calibration data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sievert.bundle.errors import CalibrationError
from sievert.bundle.store import Bundle
from sievert.progress import Progress, silent

if TYPE_CHECKING:
    from sievert.calibration.ranges import Ranges


def ranges(
    bundle: str | Path,
    collection: str | Path = "",
    *,
    variant: str = "",
    dtype: str = "float16",
    lowered_for: str = "",
    chunk_mib: int = 256,
    progress: Progress = silent,
) -> Ranges:
    """Measure every float tensor of a variant's graphs on calibration data, and judge it for ``dtype`` (``float16``, ``bfloat16``).

    ``collection`` is by default ``BUNDLE-calibration`` beside the bundle, ``variant`` the one it was collected from. ``lowered_for`` names
    an engine: the graphs are then measured in the form that it is built from. ``chunk_mib`` bounds the memory for exposed tensors.

    Raises:
        CalibrationError: data that is not of this bundle and variant, or was changed; a ``dtype`` or engine that is not known.
        VariantError: there is no such variant.
        EngineUnavailableError, EngineError: ONNX Runtime cannot run here, or not these graphs.
        BundleError: the bundle is not what its manifest says.
    """
    from sievert.calibration.collection import load_collection
    from sievert.calibration.formats import find_format
    from sievert.calibration.place import default_place
    from sievert.calibration.ranges import measure_ranges
    from sievert.graph_passes.lowering.targets import TARGETS

    find_format(dtype)
    target = next((each for each in TARGETS if each == lowered_for), None)
    if lowered_for and target is None:
        raise CalibrationError(f"engine {lowered_for!r} has no form of its own: choose one of {', '.join(TARGETS)}")
    if chunk_mib < 1:
        raise CalibrationError(f"chunk_mib={chunk_mib}: give at least 1")
    progress("checking the bundle")
    opened = Bundle.open(bundle)
    folder = collection if str(collection) else default_place(opened)
    loaded = load_collection(folder, opened, progress=progress)
    name = variant or loaded.info.variant
    return measure_ranges(loaded, name, dtype=dtype, lowered_for=target or "", chunk_bytes=chunk_mib << 20, progress=progress)
