"""A folder that appears whole or not at all: written beside its place under a lock, then moved there in one step."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from sievert.bundle.errors import BundleError, SievertError
from sievert.bundle.files import exchange, locked, sync
from sievert.bundle.names import LOCK, temporary_name
from sievert.bundle.writer import writing

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kind:
    """What may stand at a place: its ``noun``, the file it is known by, and which of the names in its folder are not its own."""

    noun: str
    record: str
    find_foreign: Callable[[Path, set[str]], set[str]]


def check_place(target: Path, kind: Kind, *, force: bool) -> None:
    """Refuse a place that is taken.

    Raises:
        BundleError: a file, a folder of something else, one of this kind without ``force``, or one with files that are not its own.
    """
    if not target.exists():
        return
    if not target.is_dir():
        raise BundleError(f"{target} is a file: choose a path that does not exist yet")
    names = {entry.name for entry in target.iterdir()}
    if not names:
        return
    if kind.record not in names:
        raise BundleError(f"{target} is a folder that holds other files and no {kind.noun}: choose a path that does not exist yet")
    if not force:
        raise BundleError(f"{target} already holds a {kind.noun}: choose another path, or replace it with --force")
    try:
        foreign = sorted(kind.find_foreign(target, names))
    except SievertError as error:
        raise BundleError(
            f"{target} holds an unreadable {kind.noun}, which is not replaced: remove the folder yourself ({error})"
        ) from error
    if foreign:
        raise BundleError(f"{target} holds files that are not the {kind.noun}'s ({', '.join(foreign[:5])}): move them away and repeat")


@contextlib.contextmanager
def folder_beside(place: Path, purpose: str) -> Iterator[Path]:
    """Give the body an empty, locked folder beside ``place``, for it to move there; what then has the folder's name is removed.

    Raises:
        BundleError: the folder cannot be written.
    """
    folder = beside(place)
    try:
        with contextlib.ExitStack() as held, writing(folder):
            with writing(folder, everywhere=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                sweep_siblings(place)
                folder.mkdir()
                held.enter_context(locked(folder, purpose))
            yield folder
    finally:
        # Before the move these are the unfinished files, after it those that were replaced.
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def writing_beside(place: Path, purpose: str, *, check: Callable[[], None]) -> Iterator[Path]:
    """Give the body an empty folder beside ``place`` that takes its name when the body has ended well; else nothing is left of it.

    ``check`` refuses a place that is taken: it is called first, and again in the end, as the body takes its time.

    Raises:
        BundleError: the folder cannot be written.
    """
    check()
    with folder_beside(place, purpose) as folder:
        yield folder
        check()
        with writing(place, everywhere=True):
            (folder / LOCK).unlink()
            move_into(folder, place)


def beside(place: Path) -> Path:
    """A fresh name beside ``place`` that :func:`sweep_siblings` recognises."""
    return place.parent / f".{place.name}{temporary_name()}"


def move_into(folder: Path, place: Path) -> None:
    """Give ``folder`` the name ``place`` in one step, on the disk too when it returns.

    What stood there may be left under the old name, for the caller to remove.
    """
    sync(folder)
    _rename_into(folder, place)
    sync(place.parent)


def _rename_into(folder: Path, place: Path) -> None:
    if not place.exists() or not any(path.name != LOCK for path in place.iterdir()):
        if place.exists():
            shutil.rmtree(place)
        folder.rename(place)
        return
    if exchange(folder, place):
        return
    # Without the system call there is an instant with nothing at the place; what stood there then stands beside it.
    # No name of a temporary folder: after a kill in that instant it is the only copy, and must not be swept.
    old = place.with_name(f"{place.name}.replaced-{secrets.token_hex(4)}")
    place.rename(old)
    try:
        folder.rename(place)
    except BaseException:
        old.rename(place)
        raise
    shutil.rmtree(old, ignore_errors=True)


def sweep_siblings(place: Path) -> None:
    """Remove what killed steps to the same place left beside it; one that still runs holds its lock and is left alone."""
    pattern = re.compile(re.escape(f".{place.name}") + r"\.sievert-tmp-[0-9a-f]{16}")
    for path in sorted(place.parent.iterdir()):
        if pattern.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            try:
                with locked(path, "sweep"):
                    shutil.rmtree(path)
            except (BundleError, OSError) as error:
                logger.info("left %s: %s", path, error)
