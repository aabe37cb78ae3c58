"""Does a bundle hold what its manifest says? Every check of names, sizes, hashes and references, in one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from pydantic import ValidationError

from sievert.bundle.errors import IntegrityError, ManifestError, SievertError
from sievert.bundle.external_data import check_external_data
from sievert.bundle.files import open_plain, plain_status, sha256_file
from sievert.bundle.manifest import FORMAT, Manifest
from sievert.bundle.names import MANIFEST, check_name, check_variant_name

QUICK_BYTES = 8 << 20
"""Files up to this size are hashed even by a quick check: graphs, configs, tokenizer, the shipped model's engines."""


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle's folder, complete and consistent in itself; no other file is looked at.

    Raises:
        ManifestError: missing, malformed, from a newer version, or naming files it does not list.
        IntegrityError: a link, or an unsafe file name.
    """
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        raise ManifestError(
            f"{folder} is no bundle: it has no {MANIFEST}. Give a folder `sievert export` wrote, or make one: sievert export MODEL OUT"
        )
    with open_plain(path) as file:
        return parse_manifest(file.read(), path)


def parse_manifest(data: bytes, path: Path) -> Manifest:
    """The manifest in ``data``; ``path`` is for messages. Raises as :func:`read_manifest`."""
    try:
        raw = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ManifestError(f"{path} is no JSON ({error}): restore it or export the model again") from error
    found = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise ManifestError(f"{path} has no format number: it is not a manifest Sievert wrote; restore it or export the model again")
    if found > FORMAT:
        raise ManifestError(f"{path} has format {found}, this version of Sievert reads up to {FORMAT}: upgrade it (pip install -U sievert)")
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(map(str, first["loc"])) or "the whole"
        raise ManifestError(
            f"{path} is malformed at {field}: {first['msg']} ({error.error_count()} problems): restore it or export the model again"
        ) from error
    except SievertError as error:
        raise ManifestError(f"{path} is malformed: {error}: restore it or export the model again") from error
    check_references(manifest)
    return manifest


def referenced(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Every file a part of the manifest points at, as (who, file name)."""
    for file in dict.fromkeys([manifest.weights_file, *map(manifest.place, manifest.weights)]):
        yield "the weights", file
    for graph, entry in manifest.graphs.items():
        yield f"graph {graph}", entry.file
    for name, variant in manifest.variants.items():
        for graph, entry in variant.graphs.items():
            yield f"graph {graph} of variant {name}", entry.file
        for file in dict.fromkeys(weight.file for weight in variant.precision.weights) if variant.precision else ():
            yield f"the weights of variant {name}", file
        for engine, built in variant.engines.items():
            for graph, made in built.graphs.items():
                yield f"graph {graph} of variant {name} for {engine}", made.lowered
                if made.file is not None:
                    yield f"engine {engine} of {graph} of variant {name}", made.file


def check_references(manifest: Manifest) -> None:
    """Safe names throughout, and nothing pointed at that ``files`` does not list.

    Raises:
        IntegrityError: an unsafe name.
        ManifestError: a file that is not listed.
        VariantError: an unusable variant name.
    """
    for name in manifest.files:
        check_name(name, where="the manifest")
    for name in manifest.variants:
        check_variant_name(name)
    for who, name in referenced(manifest):
        check_name(name, where=f"the manifest, {who},")
        if name not in manifest.files:
            raise ManifestError(f"the manifest names {name} for {who} but does not list it with its hash: make the step again")
    # The tables of the model's weights, and of those that variants have of their own, must lie within their files.
    own = [weight for variant in manifest.variants.values() if variant.precision for weight in variant.precision.weights]
    for weight in (*manifest.weights, *own):
        size = manifest.files[manifest.place(weight)].bytes
        if weight.offset < 0 or weight.nbytes < 0 or weight.offset + weight.nbytes > size:
            raise ManifestError(f"weight {weight.name} ends at byte {weight.offset + weight.nbytes} of a weights file of {size} bytes")


def check_file(folder: Path, manifest: Manifest, name: str, *, full: bool) -> None:
    """One listed file against its entry: plain, of the right size, and of the right hash if small or ``full``.

    Raises:
        IntegrityError: any of that fails.
    """
    entry, path = manifest.files[name], folder / name
    size = plain_status(path, shared=entry.shared).st_size
    if size != entry.bytes:
        raise IntegrityError(f"{path} has {size} bytes, the manifest says {entry.bytes}: {_CHANGED}")
    if full or size <= QUICK_BYTES:
        compare_hash(path, sha256_file(path, shared=entry.shared), entry.sha256)


def compare_hash(path: Path, found: str, expected: str) -> None:
    """Raise IntegrityError unless the two hashes are the same."""
    if found != expected:
        raise IntegrityError(f"{path} has SHA-256 {found[:16]}..., the manifest says {expected[:16]}...: {_CHANGED}")


def check_bundle(folder: Path, manifest: Manifest, *, full: bool) -> None:
    """All files against the manifest. ``full`` hashes everything; else large files are judged by size, and the weights by a sample.

    Raises:
        IntegrityError: the first file that is missing, linked, changed, or an ONNX graph whose external data is not safe.
    """
    for name in manifest.files:
        check_file(folder, manifest, name, full=full)
    if not full:
        _check_smallest_weights(folder, manifest)
    for name in manifest.files:
        if name.endswith(".onnx"):
            check_graph(folder, manifest, name)


def check_graph(folder: Path, manifest: Manifest, name: str) -> None:
    """A graph's external data is safe and stands in files the manifest lists.

    Raises:
        IntegrityError: it does not.
    """
    for location in sorted(check_external_data(folder / name, manifest.shared) - manifest.files.keys()):
        raise IntegrityError(f"{folder / name} reads weights from {location}, which the manifest does not list: {_CHANGED}")


def _check_smallest_weights(folder: Path, manifest: Manifest, count: int = 16) -> None:
    """The header check of a file that has no header: a few small tensors spread over it, by their own hashes."""
    path = folder / manifest.weights_file
    inside = (weight for weight in manifest.weights if not weight.file)
    with open_plain(path, shared=path.name in manifest.shared) as file:
        for weight in sorted(inside, key=lambda weight: (weight.nbytes, weight.offset))[:count]:
            file.seek(weight.offset)
            if hashlib.sha256(file.read(weight.nbytes)).hexdigest() != weight.sha256:
                raise IntegrityError(f"{path}: the bytes of {weight.name} are not those the manifest lists: {_CHANGED}")


_CHANGED = "the file changed after the bundle was made; restore it from where the bundle came from, or make it again"
