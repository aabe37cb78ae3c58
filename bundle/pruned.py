"""A pruned decoder on its own: one folder of static graphs over one weights file, and ``pruned.json``, which names every tensor.

It is no bundle: there is no checkpoint, no processor and no vision encoder behind it, only the graph of another tool.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from sievert.bundle.errors import BundleError, ManifestError
from sievert.bundle.files import open_plain, plain_status, sha256_file, sync, write_new
from sievert.bundle.manifest import FileEntry, GraphEntry, WeightEntry
from sievert.bundle.names import LOCK, check_name
from sievert.bundle.place import Kind, check_place, writing_beside
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Record

PRUNED: Final = "pruned.json"
FORMAT: Final = 1


class PrunedSource(Record):
    """The graph it was made from: its file's name and SHA-256, the names of its inputs, and what was matched in it."""

    file: str
    sha256: str
    inputs: tuple[str, ...]
    matched: tuple[str, ...]


class PrunedSizes(Record):
    """The decoder's numbers: layers, elements, heads and tokens. ``max_positions`` None: the tables are computed, for any position."""

    depth: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    dtype: str
    max_positions: int | None
    grid: tuple[int, int] | None


class PrunedDecoder(Record):
    """The whole of ``pruned.json``. ``capacities`` are the cache rows of each layer; ``target`` is what the graphs were lowered for."""

    format: int = FORMAT
    source: PrunedSource
    sizes: PrunedSizes
    plan: Plan
    profile: Profile
    capacities: tuple[int, ...]
    reads_question: bool
    target: str
    graphs: dict[str, GraphEntry]
    weights_file: str
    weights: tuple[WeightEntry, ...]
    files: dict[str, FileEntry] = {}


def read_pruned(folder: Path) -> PrunedDecoder:
    """The record of a folder.

    Raises:
        ManifestError: there is none, or it is malformed.
        IntegrityError: it is a link.
    """
    path = folder / PRUNED
    if not path.exists():
        raise ManifestError(f"{folder} holds no {PRUNED}: it was not made by `sievert prune-onnx`")
    with open_plain(path) as file:
        data = file.read()
    try:
        return PrunedDecoder.model_validate_json(data)
    except ValidationError as error:
        raise ManifestError(f"{path} is malformed or of another version: make the folder again ({error.errors()[0]['msg']})") from error


PRUNED_DECODER: Final = Kind("pruned decoder", PRUNED, lambda folder, names: names - {PRUNED, *read_pruned(folder).files})


@contextlib.contextmanager
def create_pruned(path: Path, *, force: bool) -> Iterator[NewPruned]:
    """Give the body a temporary folder beside ``path``; move it to ``path`` when the body has ended well.

    Raises:
        BundleError: something stands at ``path`` that may not be replaced, or the folder cannot be written.
    """
    target = path.resolve()
    with writing_beside(target, "prune-onnx", check=partial(check_place, target, PRUNED_DECODER, force=force)) as folder:
        new = NewPruned(folder)
        yield new
        if new.record is None:
            raise BundleError("the pruned decoder was left without a record: call finish")
        new.write_record()


class NewPruned:
    """What the body of ``with create_pruned(path) as new`` works with: files are written to ``new.path``, then :meth:`finish` is called."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.record: PrunedDecoder | None = None

    def add(self, name: str, data: bytes) -> str:
        """Write a file; returns its name."""
        write_new(self.path / check_name(name, where="the pruned decoder"), data)
        return name

    def finish(self, record: PrunedDecoder) -> None:
        """Set the record; its ``files`` are filled in when the folder is closed."""
        self.record = record

    def write_record(self) -> None:
        """Hash every file and write the record."""
        assert self.record is not None  # noqa: S101 - create_pruned has looked
        files = {}
        for path in sorted(path for path in self.path.iterdir() if path.name != LOCK):
            sync(path)
            files[path.name] = FileEntry(bytes=plain_status(path).st_size, sha256=sha256_file(path))
        content = self.record.model_copy(update={"files": files}).model_dump(mode="json", warnings=False)
        text = json.dumps(content, sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
        write_new(self.path / PRUNED, (text + "\n").encode())
