"""A bundle on disk: opened, verified, read from, and changed step by step."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from sievert.bundle.create import NewBundle, create_bundle
from sievert.bundle.errors import BundleError, IntegrityError, VariantError
from sievert.bundle.files import open_plain, plain_status, sha256_bytes, sha256_file
from sievert.bundle.integrity import check_bundle, compare_hash, read_manifest
from sievert.bundle.manifest import EngineFile, GraphEntry, Manifest, Variant
from sievert.bundle.names import check_name
from sievert.bundle.step import OpenStep, find_variant, open_step, require_new_variant

__all__ = ["Bundle", "NewBundle", "OpenStep"]


class Bundle:
    """One folder with a manifest. Only names the manifest lists are ever read from it.

    Make one with :meth:`open` or :meth:`create`. ``path`` is absolute; ``manifest`` is the one read, or the one the last
    :meth:`step` of this object committed.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, variants={sorted(self.manifest.variants)})"

    @classmethod
    def open(cls, path: str | Path, *, verify: Literal["size", "full"] = "size") -> Bundle:
        """Open a bundle and check it against its manifest.

        ``size`` checks every file's kind and size, the hash of files up to 8 MiB and of a sample of weights, and where graphs read
        external data from: for `run`. ``full`` hashes everything: for prune, build and check.

        Raises:
            ManifestError: no manifest, a malformed one, or one from a newer version.
            IntegrityError: a file is missing, changed, a link, or named so that it leaves the bundle.
            BundleError: the folder cannot be read.
        """
        folder = Path(path).resolve()
        try:
            bundle = cls(folder, read_manifest(folder))
            bundle.verify(full=verify == "full")
        except OSError as error:
            raise BundleError(f"cannot read the bundle {folder}: {error.strerror or error}; check the path and its permissions") from error
        return bundle

    @classmethod
    @contextlib.contextmanager
    def create(cls, path: str | Path, *, force: bool = False, command: str = "export") -> Iterator[NewBundle]:
        """Make a bundle at ``path``: the body fills ``new.path`` and calls ``new.finish(manifest)``; afterwards :meth:`open` it.

        Everything is written in a folder beside ``path`` that takes its name in one rename. ``force`` replaces a bundle, and
        nothing but a bundle. ``command`` goes into the history.

        Raises:
            BundleError: ``path`` is taken, cannot be written, or the body never called ``finish``; nothing is left behind.
        """
        with create_bundle(Path(path), force=force, command=command) as new:
            yield new

    @contextlib.contextmanager
    def step(self, command: str) -> Iterator[OpenStep]:
        """Change the bundle: the body adds files and calls ``step.replace``, ``put_variant`` or ``put_engine``; see :class:`OpenStep`.

        The commit is the rename of ``sievert.json``. An error or a kill before it leaves everything as it was.

        Raises:
            BundleError: another step is writing, the folder cannot be written, or the new manifest is not consistent.
        """
        with open_step(self.path, command) as step:
            self.manifest = step.manifest
            yield step
        self.manifest = step.manifest

    def verify(self, *, full: bool) -> None:
        """Check all files against the manifest, as :meth:`open` describes.

        Raises:
            IntegrityError: the first file that is not what it should be.
        """
        check_bundle(self.path, self.manifest, full=full)

    @property
    def weights_path(self) -> Path:
        """The weights file."""
        return self.file(self.manifest.weights_file)

    def file(self, name: str) -> Path:
        """Path of a listed file, found to be a plain one of the right size.

        Raises:
            IntegrityError: an unsafe name, not listed, missing, a link, or of another size.
        """
        check_name(name, where="the caller")
        entry = self.manifest.files.get(name)
        if entry is None:
            raise IntegrityError(f"{name} is not listed in the manifest of {self.path}: only listed files are read")
        size = plain_status(self.path / name, shared=entry.shared).st_size
        if size != entry.bytes:
            raise IntegrityError(
                f"{self.path / name} has {size} bytes, the manifest says {entry.bytes}: the file changed after it was made"
            )
        return self.path / name

    def variant(self, name: str) -> Variant:
        """The variant of that name.

        Raises:
            VariantError: there is none; the message lists those there are.
        """
        return find_variant(self.manifest, name)

    def require_new_variant(self, name: str, *, force: bool = False) -> None:
        """Refuse a variant name that is malformed or taken, before any work is done.

        Raises:
            VariantError: see above.
        """
        require_new_variant(self.manifest, name, force=force)

    def graph(self, graph: str, *, variant: str | None = None) -> GraphEntry:
        """The entry of a graph: of a variant, or the dynamic one of that name.

        Raises:
            VariantError: no such variant or graph.
        """
        graphs = self.manifest.graphs if variant is None else self.variant(variant).graphs
        if graph not in graphs:
            owner = "the bundle" if variant is None else f"variant {variant!r}"
            raise VariantError(f"{owner} has no graph {graph!r}; it has: {', '.join(sorted(graphs)) or 'none'}")
        return graphs[graph]

    def graph_file(self, graph: str, *, variant: str | None = None) -> Path:
        """Path of a graph's ONNX file. Raises as :meth:`graph` and :meth:`file`."""
        return self.file(self.graph(graph, variant=variant).file)

    def engine_entry(self, variant: str, engine: str, graph: str) -> EngineFile:
        """What one graph of a variant became for an engine, made from the lowered graph that is listed now.

        Raises:
            VariantError: no such variant, engine or graph; the message lists those there are.
            IntegrityError: the engine was built from another version of its graph.
        """
        engines = self.variant(variant).engines
        if engine not in engines:
            there = ", ".join(sorted(engines)) or "none yet"
            raise VariantError(f"variant {variant!r} has no engine {engine!r}; it has: {there}. Build it: sievert build")
        graphs = engines[engine].graphs
        if graph not in graphs:
            raise VariantError(f"engine {engine!r} of variant {variant!r} has no graph {graph!r}; it has: {', '.join(sorted(graphs))}")
        made = graphs[graph]
        if made.built_from != self.manifest.files[made.lowered].sha256:
            raise IntegrityError(f"engine {engine!r} of {variant!r}, {graph}: built from another version of {made.lowered}; build it again")
        return made

    def engine_file(self, variant: str, engine: str, graph: str) -> Path:
        """Path of the file an engine loads: the built engine, or the lowered ONNX where it reads that. Hashed on every call.

        Raises:
            VariantError, IntegrityError: as :meth:`engine_entry`, or the file is not the one the manifest lists.
        """
        made = self.engine_entry(variant, engine, graph)
        path = self.file(made.file or made.lowered)
        compare_hash(path, sha256_file(path), self.manifest.files[path.name].sha256)
        return path

    def engine_bytes(self, variant: str, engine: str, graph: str) -> bytes:
        """Content of :meth:`engine_file`; the bytes returned are the very bytes that were hashed, so deserialise these.

        Raises:
            VariantError, IntegrityError: as :meth:`engine_file`.
        """
        made = self.engine_entry(variant, engine, graph)
        path = self.file(made.file or made.lowered)
        with open_plain(path) as file:
            data = file.read()
        compare_hash(path, sha256_bytes(data), self.manifest.files[path.name].sha256)
        return data
