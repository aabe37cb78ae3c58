"""A step: new files and a new manifest for a bundle that exists, all of it or nothing."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from pathlib import Path

from sievert.bundle.errors import BundleError, VariantError
from sievert.bundle.external_data import check_external_data
from sievert.bundle.files import locked, sync
from sievert.bundle.integrity import check_file, check_graph, parse_manifest, read_manifest, referenced
from sievert.bundle.manifest import EngineEntry, FileEntry, Manifest, Variant
from sievert.bundle.names import MANIFEST, check_variant_name, is_ours
from sievert.bundle.writer import FolderWriter, history_line, put_manifest, render, writing

logger = logging.getLogger(__name__)


class OpenStep(FolderWriter):
    """What the body of ``with bundle.step(command) as step`` works with.

    ``manifest`` is the newest one from disk, then whatever :meth:`replace` made of it. It need not list the added files in its
    ``files``: the commit does.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        super().__init__(path, manifest.files)
        self._before = manifest
        self.manifest = manifest
        self.replaced = False

    def replace(self, manifest: Manifest) -> None:
        """Make ``manifest`` the one to commit. Derive it from ``step.manifest``.

        Raises:
            BundleError: it was made from an older manifest than the one on disk.
        """
        if manifest.history != self._before.history:
            raise BundleError(f"{self.path} was changed by another step in the meantime: open the bundle again and repeat this step")
        self.manifest, self.replaced = manifest, True

    def put_variant(self, name: str, variant: Variant, *, force: bool = False) -> None:
        """Add a variant to the manifest to commit, or replace it with ``force``.

        Raises:
            VariantError: the name is taken, or cannot name a variant.
        """
        require_new_variant(self.manifest, name, force=force)
        self.replace(self.manifest.model_copy(update={"variants": {**self.manifest.variants, name: variant}}))

    def put_engine(self, variant: str, engine: str, entry: EngineEntry) -> None:
        """Record an engine of a variant in the manifest to commit; an older one of that name is replaced.

        Raises:
            VariantError: no such variant.
        """
        old = find_variant(self.manifest, variant)
        new = old.model_copy(update={"engines": {**old.engines, engine: entry}})
        self.replace(self.manifest.model_copy(update={"variants": {**self.manifest.variants, variant: new}}))

    def finished(self, command: str, seconds: float) -> Manifest:
        """The manifest to commit: files listed, history written, checked as a reader will check it.

        Raises:
            BundleError: it is not consistent with itself or with the new files.
        """
        new = self.manifest
        pointed_at = {name for _, name in referenced(new)}
        dropped = {name for _, name in referenced(self._before)} - pointed_at - self.added.keys()
        files = {name: entry for name, entry in {**new.files, **self.added}.items() if name not in dropped}
        files = self._without_unused_data(files, pointed_at)
        history = (*self._before.history, history_line(command, seconds))
        # model_copy does not validate, so what is about to be written is read back first.
        manifest = parse_manifest(render(new.model_copy(update={"files": files, "history": history})), self.path / MANIFEST)
        for name in sorted(self.added):
            check_file(self.path, manifest, name, full=False)
            if name.endswith(".onnx"):
                check_graph(self.path, manifest, name)
        return manifest

    def _without_unused_data(self, files: dict[str, FileEntry], pointed_at: set[str]) -> dict[str, FileEntry]:
        """``files`` less the weight files of dropped graphs: the manifest points at graphs, and only they know what they read."""
        idle = {name for name in files if name.endswith(".data")} - pointed_at - self.added.keys()
        if idle:
            shared = self._before.shared
            idle = idle.difference(*(check_external_data(self.path / name, shared) for name in files if name.endswith(".onnx")))
        return {name: entry for name, entry in files.items() if name not in idle}


@contextlib.contextmanager
def open_step(folder: Path, command: str) -> Iterator[OpenStep]:
    """Hold the bundle, give the body a step, commit what it made.

    Leftovers of interrupted steps are swept before and after. At the end ``step.manifest`` is the one on disk.

    Raises:
        BundleError: another step is writing, the folder cannot be written, or the body never called ``replace``.
    """
    with contextlib.ExitStack() as held:
        with writing(folder):
            held.enter_context(locked(folder, command))
        before = read_manifest(folder)
        sweep(folder, before)
        step, start = OpenStep(folder, before), time.monotonic()
        try:
            with writing(folder):
                yield step
                if not step.replaced:
                    raise BundleError(f"the step {command!r} ended without a new manifest: call step.replace, put_variant or put_engine")
                manifest = step.finished(command, time.monotonic() - start)
                put_manifest(folder, render(manifest))
        except BaseException:
            step.discard()
            raise
        step.manifest = manifest
        step.discard_temporary()
        with writing(folder):
            sync(folder)
        for name in before.files.keys() - manifest.files.keys():
            _remove(folder / name)
        sweep(folder, manifest)


def sweep(folder: Path, manifest: Manifest) -> None:
    """Remove leftovers of interrupted steps.

    A leftover is a file that the manifest does not name *and* that carries a name only steps give: a temporary one, or
    ``stem.<hash>`` with one of our suffixes. Anything else - notes, pictures, a user's own graph - stays.
    """
    for path in sorted(folder.iterdir()):
        if is_ours(path.name) and path.name not in manifest.files:
            _remove(path)


def find_variant(manifest: Manifest, name: str) -> Variant:
    """The variant of that name.

    Raises:
        VariantError: there is none; the message lists those there are.
    """
    if name not in manifest.variants:
        there = ", ".join(sorted(manifest.variants)) or "none yet: make one with `sievert prune`"
        raise VariantError(f"the bundle has no variant {name!r}; it has: {there}")
    return manifest.variants[name]


def require_new_variant(manifest: Manifest, name: str, *, force: bool) -> None:
    """Refuse a name that cannot be used for a new variant, before any work is done.

    Raises:
        VariantError: malformed, or taken and not ``force``.
    """
    check_variant_name(name)
    if name in manifest.variants and not force:
        raise VariantError(f"the bundle already has a variant {name!r}: choose another name, or replace it with --force")


def _remove(path: Path) -> None:
    # The commit is done: a file that cannot be removed costs space, not correctness.
    try:
        path.unlink(missing_ok=True)
        logger.debug("removed %s", path)
    except OSError as error:
        logger.warning("could not remove %s, which nothing needs any more: %s", path, error)
