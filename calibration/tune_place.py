"""Where a tuning stands: worked on in a folder beside its place, which keeps what was answered and takes the name when all is done."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

from sievert.bundle.errors import InputError
from sievert.bundle.files import locked
from sievert.bundle.names import LOCK
from sievert.bundle.place import move_into
from sievert.bundle.store import Bundle
from sievert.calibration.answers import NAME as ANSWERS
from sievert.calibration.json_lines import writing
from sievert.calibration.tune import DECISIONS
from sievert.calibration.tune_ask import PLANS

REPORT: Final = "tune.json"
JOURNALS: Final = (ANSWERS, PLANS, DECISIONS)
RESULTS: Final = ("front.csv", "front.png", "plan.yaml", REPORT, "times.csv")


def choose_place(bundle: Bundle, out: str | Path, *, force: bool) -> Path:
    """The folder of the results: ``out``, or ``BUNDLE-tune`` beside the bundle.

    Raises:
        InputError: it lies inside the bundle, is a file, holds something else, or results that ``force`` does not replace; or the folder
            that is worked in holds something else.
    """
    place = Path(out).expanduser().resolve() if str(out) else bundle.path.with_name(f"{bundle.path.name}-tune")
    if place.is_relative_to(bundle.path):
        raise InputError(f"--out {place} lies inside the bundle, which holds nothing but the bundle: choose another folder")
    for folder in (place, working_folder(place)):
        if folder.exists() and not folder.is_dir():
            raise InputError(f"{folder} is a file: choose another folder with --out")
        if foreign := sorted(_held(folder) - {*JOURNALS, *RESULTS}):
            raise InputError(
                f"{folder} holds files that are not of `sievert tune` ({', '.join(foreign[:5])}): choose another folder with --out"
            )
    if _held(place) and not force:
        raise InputError(
            f"{place} already holds results: choose another folder with --out, or use --force to replace them and go on from their answers"
        )
    return place


def working_folder(place: Path) -> Path:
    """Where the work stands until it is done."""
    return place.with_name(f"{place.name}.partial")


@contextlib.contextmanager
def working_beside(place: Path) -> Iterator[Callable[[], None]]:
    """Hold the folder beside ``place``, in which earlier work is found again, and give the body what ends the work: it gives the folder the
    name ``place``. Results that stand there are replaced then; their answers are gone on from.

    Raises:
        InputError: it cannot be written.
        BundleError: another process works there.
    """
    folder = working_folder(place)
    done = False

    def finish() -> None:
        nonlocal done
        with writing(folder):
            (folder / LOCK).unlink()
            move_into(folder, place)
        done = True

    with contextlib.ExitStack() as held:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(folder, "tune"))
            for name in JOURNALS:
                if not (folder / name).exists() and (place / name).exists():
                    shutil.copyfile(place / name, folder / name)
            for name in RESULTS:
                (folder / name).unlink(missing_ok=True)
        yield finish
    if done:
        shutil.rmtree(folder, ignore_errors=True)  # what was replaced


def _held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {LOCK} if folder.is_dir() else set()
