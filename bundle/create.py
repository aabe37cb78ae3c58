"""A new bundle: written in a folder beside its place, then moved there in one rename."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from sievert.bundle.errors import BundleError
from sievert.bundle.files import locked, plain_status, sha256_file, sync, write_new
from sievert.bundle.integrity import check_bundle, parse_manifest, read_manifest
from sievert.bundle.manifest import FileEntry, Manifest
from sievert.bundle.names import LOCK, MANIFEST, check_name, is_ours
from sievert.bundle.place import Kind, check_place, folder_beside, move_into
from sievert.bundle.writer import FolderWriter, history_line, render, writing


class NewBundle(FolderWriter):
    """What the body of ``with Bundle.create(path) as new`` works with.

    ``new.path`` is the temporary folder. Files may be written there under plain names of their own (config, tokenizer, processor);
    :meth:`finish` lists them. Weights and graphs go through :meth:`add_bytes` and :meth:`add_file`.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path, {})
        self.manifest: Manifest | None = None

    def finish(self, manifest: Manifest) -> None:
        """Set the manifest; its ``files`` and ``history`` are filled in when the bundle is closed."""
        self.manifest = manifest

    def listed(self) -> dict[str, FileEntry]:
        """Every file of the folder with its hash, on the disk.

        Raises:
            BundleError: a folder inside, which a bundle cannot hold.
            IntegrityError: a link, or a name a manifest may not hold.
        """
        self.discard_temporary()
        files = dict(self.added)
        for path in sorted(self.path.iterdir()):
            if path.name in files or path.name == LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                raise BundleError(f"the checkpoint's files include a folder {path.name!r}, but a bundle is one flat folder")
            check_name(path.name, where="the checkpoint")
            size = plain_status(path).st_size
            sync(path)
            files[path.name] = FileEntry(bytes=size, sha256=sha256_file(path))
        return files


@contextlib.contextmanager
def create_bundle(path: Path, *, force: bool, command: str) -> Iterator[NewBundle]:
    """Give the body a temporary folder beside ``path``; move it to ``path`` when the body has ended well.

    Raises:
        BundleError: something stands at ``path`` that may not be replaced, or the folder cannot be written.
    """
    target = path.resolve()
    check_place(target, BUNDLE, force=force)
    start = time.monotonic()
    with folder_beside(target, command) as folder:
        new = NewBundle(folder)
        yield new
        if new.manifest is None:
            raise BundleError(f"{command!r} ended without a manifest: call finish")
        manifest = new.manifest.model_copy(
            update={"files": new.listed(), "history": (*new.manifest.history, history_line(command, time.monotonic() - start))}
        )
        data = render(manifest)
        check_bundle(folder, parse_manifest(data, folder / MANIFEST), full=False)
        write_new(folder / MANIFEST, data)
        with writing(target, everywhere=True):
            _move(folder, target, force=force)


def _move(folder: Path, target: Path, *, force: bool) -> None:
    check_place(target, BUNDLE, force=force)  # again: the export took its time
    held = (target / MANIFEST).exists()
    with locked(target, "replaced by an export") if held else contextlib.nullcontext():
        move_into(folder, target)


def _find_foreign(folder: Path, names: set[str]) -> set[str]:
    return {name for name in names - {MANIFEST, LOCK, *read_manifest(folder).files} if not is_ours(name)}


BUNDLE: Final = Kind("bundle", MANIFEST, _find_foreign)
