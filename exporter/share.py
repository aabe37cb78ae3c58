"""The weights of one bundle as those of another: compared byte by byte, then linked."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, Final

from sievert.bundle.errors import BundleError
from sievert.bundle.files import open_plain
from sievert.bundle.integrity import check_file
from sievert.bundle.manifest import WeightEntry
from sievert.bundle.store import Bundle, NewBundle

_CHUNK: Final = 1 << 20


class SharedWeights:
    """The weights file of ``bundle``, open. :meth:`find` looks tensors up in it, then :meth:`link` puts it into a new bundle."""

    def __init__(self, bundle: Bundle, file: BinaryIO) -> None:
        self._bundle = bundle
        self._file = file
        inside = [weight for weight in bundle.manifest.weights if not weight.file]
        self._by_name = {weight.name: weight for weight in inside}
        self._by_content = {weight.sha256: weight for weight in inside}
        self._found = self._lacking = 0

    def find(self, name: str, sha256: str, data: memoryview) -> WeightEntry | None:
        """Where the bytes ``data`` stand in the file; None where nothing of this name or content is there.

        Raises:
            BundleError: the bundle has other bytes under this name, or not those that its manifest says.
        """
        entry = self._by_content.get(sha256)
        if entry is None and name in self._by_name:
            raise BundleError(
                f"{self._bundle.path} has another {name} than this export: bundles share weights where checkpoint, dtype and version of "
                "the exporter are the same; leave --share-weights out"
            )
        if entry is None:
            self._lacking += data.nbytes
            return None
        self._file.seek(entry.offset)
        if entry.nbytes != data.nbytes or any(self._file.read(len(part)) != part for part in _parts(data)):
            raise BundleError(f"{self._bundle.weights_path} does not hold the {entry.name} that its manifest lists: export it again")
        self._found += data.nbytes
        return entry

    def link(self, new: NewBundle) -> str:
        """Mark the file as shared in its bundle, and have it in the new one; returns its name.

        Raises:
            BundleError: it holds less than half of what was looked for, cannot be linked, or its bundle cannot be written.
        """
        if self._found <= self._lacking:
            raise BundleError(
                f"{self._bundle.path} has {self._found} bytes of this export's weights and lacks {self._lacking}: it is of another model; "
                "leave --share-weights out"
            )
        name, path = self._bundle.manifest.weights_file, self._bundle.weights_path
        if not self._bundle.manifest.files[name].shared:
            with self._bundle.step("share the weights") as step:
                entry = step.manifest.files[name].model_copy(update={"shared": True})
                step.replace(step.manifest.model_copy(update={"files": {**step.manifest.files, name: entry}}))
        return new.add_link(path, self._bundle.manifest.files[name])


@contextmanager
def open_shared(bundle: Bundle) -> Iterator[SharedWeights]:
    """Open a bundle's weights file, found to be the one its manifest lists.

    Raises:
        IntegrityError: it is not.
    """
    manifest = bundle.manifest
    check_file(bundle.path, manifest, manifest.weights_file, full=True)
    with open_plain(bundle.weights_path, shared=manifest.files[manifest.weights_file].shared) as file:
        yield SharedWeights(bundle, file)


def _parts(data: memoryview) -> Iterator[bytes]:
    flat = data.cast("B")
    return (bytes(flat[start : start + _CHUNK]) for start in range(0, len(flat), _CHUNK))
