"""A folder that appears whole or not at all: written beside its place under a lock, then moved there in one step."""

from __future__ import annotations

import contextlib
import logging
import re
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from sievert.bundle.errors import BundleError
from sievert.bundle.files import exchange, locked, sync
from sievert.bundle.names import LOCK, temporary_name
from sievert.bundle.writer import writing

logger = logging.getLogger(__name__)


@contextlib.contextmanager
def writing_beside(place: Path, purpose: str, *, check: Callable[[], None]) -> Iterator[Path]:
    """Give the body an empty folder beside ``place`` that takes its name when the body has ended well; else nothing is left of it.

    ``check`` refuses a place that is taken: it is called first, and again in the end, as the body takes its time.

    Raises:
        BundleError: the folder cannot be written.
    """
    check()
    folder = beside(place)
    try:
        with contextlib.ExitStack() as held, writing(folder):
            with writing(folder, everywhere=True):
                place.parent.mkdir(parents=True, exist_ok=True)
                sweep_siblings(place)
                folder.mkdir()
                held.enter_context(locked(folder, purpose))
            yield folder
            check()
            with writing(place, everywhere=True):
                (folder / LOCK).unlink()
                sync(folder)
                move_into(folder, place)
                sync(place.parent)
    finally:
        # Before the move these are the unfinished files, after it those that were replaced.
        shutil.rmtree(folder, ignore_errors=True)


def beside(place: Path) -> Path:
    """A fresh name beside ``place`` that :func:`sweep_siblings` recognises."""
    return place.parent / f".{place.name}{temporary_name()}"


def move_into(folder: Path, place: Path) -> None:
    """Give ``folder`` the name ``place`` in one step; what stood there may be left under the old name, for the caller to remove."""
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
