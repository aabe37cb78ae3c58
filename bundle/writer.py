"""New files of a bundle: written beside the old ones, hashed, on the disk, and gone again if the step fails."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from sievert.bundle.errors import BundleError
from sievert.bundle.files import copy_new, plain_status, sha256_bytes, sha256_file, sync, write_new
from sievert.bundle.manifest import FileEntry, Manifest, Step
from sievert.bundle.names import MANIFEST, hashed_name, temporary_name

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
_PACKAGES = ("sievert", "onnx", "onnx_ir", "onnxscript", "torch", "transformers", "onnxruntime", "onnxruntime-gpu", "tensorrt-rtx")


class FolderWriter:
    """Adds files to a folder. ``known`` are the files the manifest listed before; they are never removed by :meth:`discard`."""

    def __init__(self, path: Path, known: Mapping[str, FileEntry]) -> None:
        self.path = path
        self.added: dict[str, FileEntry] = {}
        self._known = dict(known)
        self._temporary: list[Path] = []

    def temporary(self, suffix: str = "") -> Path:
        """A path inside the folder for a file to be written to and then given to :meth:`add_file`; removed at the end if it was not."""
        path = self.path / temporary_name(suffix)
        self._temporary.append(path)
        return path

    def add_bytes(self, stem: str, suffix: str, data: bytes) -> str:
        """Write ``data`` as ``stem.<hash><suffix>``; returns that name.

        Raises:
            BundleError: the folder cannot be written.
        """
        path = self.temporary(suffix)
        with writing(self.path):
            write_new(path, data)
            return self._place(path, stem, suffix, FileEntry(bytes=len(data), sha256=sha256_bytes(data)))

    def add_file(self, source: Path, stem: str, suffix: str, *, sha256: str = "") -> str:
        """Take ``source`` as ``stem.<hash><suffix>``; returns that name. A file from :meth:`temporary` is moved, any other copied.

        Whoever has hashed what it wrote gives ``sha256``, which spares reading a large file again.

        Raises:
            BundleError: the folder cannot be written.
            IntegrityError: ``source`` is missing or a link.
        """
        with writing(self.path):
            path = source
            if source in self._temporary:
                sync(source)
            else:
                path = self.temporary(suffix)
                copy_new(source, path)
            return self._place(path, stem, suffix, FileEntry(bytes=plain_status(path).st_size, sha256=sha256 or sha256_file(path)))

    def add_link(self, source: Path, entry: FileEntry) -> str:
        """Have the file of another bundle as a hard link of the same name, which is returned; ``entry`` is its entry there, marked shared.

        Raises:
            BundleError: the system cannot link it: another filesystem, or one without links.
        """
        self.added[source.name] = entry
        try:
            os.link(source, self.path / source.name, follow_symlinks=False)
        except OSError as error:
            del self.added[source.name]
            raise BundleError(
                f"{source} cannot be shared with {self.path.parent} by a hard link ({error.strerror or error}): make both bundles on one "
                "filesystem that has them, or leave --share-weights out"
            ) from error
        return source.name

    def discard(self) -> None:
        """Remove everything that was added and was not there before."""
        for name in self.added.keys() - self._known.keys():
            (self.path / name).unlink(missing_ok=True)
        self.added.clear()
        self.discard_temporary()

    def discard_temporary(self) -> None:
        """Remove temporary files that were not taken."""
        for path in self._temporary:
            path.unlink(missing_ok=True)
        self._temporary.clear()

    def _place(self, path: Path, stem: str, suffix: str, entry: FileEntry) -> str:
        for digits in (8, 16, 64):
            name = hashed_name(stem, suffix, entry.sha256, digits=digits)
            held = self.added.get(name) or self._known.get(name)
            if held is None or held == entry:
                break
        # Before the rename: discard must know the name even if we are interrupted right after it.
        self.added[name] = entry
        path.replace(self.path / name)
        return name


@contextlib.contextmanager
def writing(folder: Path, *, everywhere: bool = False) -> Iterator[None]:
    """Turn operating system errors about ``folder``, and a full or read-only disk, into errors that say what to do.

    ``everywhere`` takes all of them: for bodies that touch nothing else.

    Raises:
        BundleError: in place of such an OSError; any other passes.
    """
    try:
        yield
    except OSError as error:
        where = Path(str(error.filename)) if error.filename is not None else None
        inside = where is not None and where.is_relative_to(folder)
        if not (inside or everywhere or error.errno in _NO_ROOM):
            raise
        advice = "free some space" if error.errno in {errno.ENOSPC, errno.EDQUOT} else "check that this user may write there"
        raise BundleError(f"could not write to {folder}: {error.strerror or error}. Nothing was changed; {advice} and try again") from error


def render(manifest: Manifest) -> bytes:
    """The manifest as it stands on disk: the same bytes for the same content."""
    text = json.dumps(manifest.model_dump(mode="json", warnings=False), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def put_manifest(folder: Path, data: bytes) -> None:
    """Replace ``sievert.json``: old or new after a kill or power cut, never anything between. This rename is a step's commit."""
    path = folder / temporary_name(".json")
    try:
        write_new(path, data)
        sync(folder)  # the names of the files the manifest points at, before the manifest
        path.replace(folder / MANIFEST)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def history_line(command: str, seconds: float) -> Step:
    """A line of the history for a step that ends now."""
    return Step(
        command=command,
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(seconds, 3),
        versions={name: version for name in _PACKAGES if (version := _version(name)) is not None},
    )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
