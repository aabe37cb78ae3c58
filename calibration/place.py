"""Where a collection stands."""

from __future__ import annotations

from pathlib import Path

from sievert.bundle.errors import CalibrationError
from sievert.bundle.names import LOCK
from sievert.bundle.store import Bundle
from sievert.calibration.record import NAME


def default_place(bundle: Bundle) -> Path:
    """``BUNDLE-calibration`` beside the bundle: where a collection is written, and looked for, if nothing else is said."""
    return bundle.path.with_name(f"{bundle.path.name}-calibration")


def choose_place(bundle: Bundle, out: str | Path, *, force: bool) -> Path:
    """The folder for a collection: ``out``, or :func:`default_place`.

    Raises:
        CalibrationError: it lies inside the bundle, is a file, holds something else, or a collection that ``force`` does not replace.
    """
    place = Path(out).expanduser().resolve() if str(out) else default_place(bundle)
    if place.is_relative_to(bundle.path):
        raise CalibrationError(f"{place} lies inside the bundle, which holds nothing but the bundle: choose another folder with --out")
    require_free(place, force=force)
    return place


def require_free(place: Path, *, force: bool) -> None:
    """Nothing stands there, or a collection and nothing else, which ``force`` replaces. Raises as :func:`choose_place`."""
    if place.exists() and not place.is_dir():
        raise CalibrationError(f"{place} is a file: choose a folder with --out")
    held = {path.name for path in place.iterdir()} - {LOCK} if place.exists() else set()
    if held and NAME not in held:
        raise CalibrationError(f"{place} holds other files and no calibration data: choose a folder that does not exist yet with --out")
    if held and not force:
        raise CalibrationError(f"{place} already holds calibration data: choose another folder with --out, or replace it with --force")
    if foreign := sorted(name for name in held if name != NAME and not name.endswith(".safetensors")):
        raise CalibrationError(f"{place} holds files that are not the collection's ({', '.join(foreign[:5])}): move them away and repeat")
