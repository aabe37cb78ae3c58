"""Where a collection stands: written in a folder beside its place, which takes the name in one rename."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from sievert.bundle.create import sweep_siblings
from sievert.bundle.errors import CalibrationError
from sievert.bundle.files import exchange, locked, sync
from sievert.bundle.names import LOCK, temporary_name
from sievert.bundle.store import Bundle
from sievert.bundle.writer import writing
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
    if place == bundle.path or bundle.path in place.parents:
        raise CalibrationError(f"{place} lies inside the bundle, which holds nothing but the bundle: choose another folder with --out")
    _require_free(place, force=force)
    return place


def _require_free(place: Path, *, force: bool) -> None:
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


@contextlib.contextmanager
def writing_beside(place: Path, *, force: bool) -> Iterator[Path]:
    """Give the body an empty folder beside ``place`` that takes its name when the body has ended well; else nothing is left of it.

    Raises:
        CalibrationError: ``place`` is taken, see :func:`choose_place`; it is looked at again in the end.
        BundleError: the folder cannot be written.
    """
    _require_free(place, force=force)
    folder = place.parent / f".{place.name}{temporary_name()}"
    try:
        with contextlib.ExitStack() as held, writing(folder):
            with writing(folder, everywhere=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                sweep_siblings(place)
                folder.mkdir()
                held.enter_context(locked(folder, "collect"))
            yield folder
            _require_free(place, force=force)
            with writing(place, everywhere=True):
                (folder / LOCK).unlink()
                sync(folder)
                move_into(folder, place)
                sync(place.parent)
    finally:
        # Before the move these are the unfinished files, after it those that were replaced.
        shutil.rmtree(folder, ignore_errors=True)


def move_into(folder: Path, place: Path) -> None:
    """Give ``folder`` the name ``place`` in one step; what stood there may be left under the old name, for the caller to remove."""
    if not place.exists() or not any(path.name != LOCK for path in place.iterdir()):
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)
    elif not exchange(folder, place):
        old = place.with_name(f"{place.name}.replaced-{temporary_name()[-8:]}")
        place.rename(old)
        folder.rename(place)
        shutil.rmtree(old, ignore_errors=True)
