"""Files read and written with care: no links followed, content hashed, bytes on the disk before anything relies on them."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from sievert.bundle.errors import BundleError, IntegrityError
from sievert.bundle.names import LOCK

_CHUNK = 1 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def sha256_bytes(data: bytes) -> str:
    """SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path, *, shared: bool = False) -> str:
    """SHA-256 of a regular file's content in hexadecimal; ``shared`` as for :func:`check_plain`.

    Raises:
        IntegrityError: missing, or not a plain file.
    """
    with open_plain(path, shared=shared) as file:
        digest = hashlib.sha256()
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
        return digest.hexdigest()


def check_plain(path: Path, status: os.stat_result, *, shared: bool = False) -> None:
    """Refuse everything but a regular file with one name; ``shared``: its manifest says that other bundles hold it too, as a hard link.

    Raises:
        IntegrityError: a symbolic or hard link (as content-addressed stores make them), a folder, a device.
    """
    if stat.S_ISLNK(status.st_mode) or (stat.S_ISREG(status.st_mode) and status.st_nlink > 1 and not shared):
        kind = "a symbolic link" if stat.S_ISLNK(status.st_mode) else f"one of {status.st_nlink} hard links to the same data"
        raise IntegrityError(
            f"{path} is {kind}: ONNX and its runtimes refuse weights behind links, and a change elsewhere would change this bundle "
            "(bundles share weights only by `sievert export --share-weights`). "
            f"A store or deduplicating tool probably replaced the file. Make a plain copy: cp -rL {path.parent} NEW_FOLDER"
        )
    if not stat.S_ISREG(status.st_mode):
        raise IntegrityError(f"{path} is no regular file: restore it from where the bundle came from, or export the model again")


def plain_status(path: Path, *, shared: bool = False) -> os.stat_result:
    """Status of a plain file; nothing is opened. ``shared`` as for :func:`check_plain`.

    Raises:
        IntegrityError: missing, or not a plain file.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise IntegrityError(
            f"{path} is missing though the manifest names it: restore it from where the bundle came from, or export the model again"
        ) from None
    check_plain(path, status, shared=shared)
    return status


@contextlib.contextmanager
def open_plain(path: Path, *, shared: bool = False) -> Iterator[BinaryIO]:
    """Open a plain file for reading. The check is made on the open file, so nobody can swap a link in after it. ``shared`` as for
    :func:`check_plain`.

    Raises:
        IntegrityError: missing, or not a plain file.
    """
    plain_status(path, shared=shared)
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK), "rb") as file:
        check_plain(path, os.fstat(file.fileno()), shared=shared)
        yield file


def write_new(path: Path, data: bytes) -> None:
    """Write a file that must not exist yet, and wait until it is on the disk."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def copy_new(source: Path, target: Path) -> None:
    """Copy the content of a plain file into one that must not exist yet, and wait until it is on the disk."""
    with open_plain(source) as reader, target.open("xb") as writer:
        while chunk := reader.read(_CHUNK):
            writer.write(chunk)
        writer.flush()
        os.fsync(writer.fileno())


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, purpose: str) -> Iterator[None]:
    """Hold the folder's lock file, so that two steps cannot write at once. The kernel releases it when the process dies.

    Raises:
        BundleError: another process holds it.
        OSError: the folder cannot be written.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    with os.fdopen(descriptor, "r+") as file:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = file.read(200).strip() or "unknown"
            raise BundleError(f"another step is writing to {folder} ({holder}): wait until it has ended, then try again") from None
        file.truncate(0)
        file.write(f"process {os.getpid()}: {purpose[:120]}\n")
        file.flush()
        yield


def exchange(first: Path, second: Path) -> bool:
    """Let two folders trade names in one atomic step (Linux ``renameat2``); False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), ctypes.c_uint(_RENAME_EXCHANGE)) == 0:
        return True
    code = ctypes.get_errno()
    if code in {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP}:
        return False
    raise OSError(code, os.strerror(code), str(first))
