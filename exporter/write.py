"""An exported model to a bundle on disk: weights once, graphs that refer to them, the checkpoint's small files, the manifest."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from sievert.bundle.errors import CheckpointError
from sievert.bundle.manifest import GraphEntry, Manifest, WeightEntry
from sievert.bundle.processor import FILES, KEY
from sievert.bundle.specs import describe_values
from sievert.bundle.store import Bundle, NewBundle
from sievert.exporter.export import Exported
from sievert.exporter.share import SharedWeights, open_shared
from sievert.exporter.weights import Weight, static_shape, tensor_bytes

logger = logging.getLogger(__name__)

ALIGNMENT = 4096
"""Offsets in the weights file, in bytes: runtimes map pages."""


def write_bundle(
    exported: Exported, path: str | Path, *, force: bool = False, command: str = "export", share: Bundle | None = None
) -> Bundle:
    """Write a new bundle at ``path``, without variants yet, and open it. ``force`` replaces a bundle that is there.

    The weights file of ``share`` becomes the new one's as a hard link, once every tensor was compared with it; what it has not (constants
    that depend on the size of an image) goes into a data file beside it.

    Raises:
        BundleError: the place is taken or cannot be written, or ``share`` is of other weights; nothing is left behind.
        CheckpointError: a small file of the checkpoint can no longer be read.
    """
    with Bundle.create(path, force=force, command=command) as new:
        for name in exported.files:
            _copy(exported.folder / name, new.path / name, processor=exported.processor)
        with contextlib.nullcontext() if share is None else open_shared(share) as shared:
            weights_file, entries = _write_weights(new, exported.weights, shared)
        graphs = {
            name: GraphEntry(
                file=new.add_bytes(name, ".onnx", serialize(model, entries, weights_file)),
                inputs=describe_values(model.graph.inputs),
                outputs=describe_values(model.graph.outputs),
            )
            for name, model in exported.graphs.items()
        }
        manifest = Manifest(
            source=exported.source,
            geometry=exported.geometry,
            weights_file=weights_file,
            weights=tuple(entries.values()),
            files={},
            graphs=graphs,
        )
        new.finish(manifest)
    return Bundle.open(path)


def serialize(model: ir.Model, weights: Mapping[str, WeightEntry], weights_file: str) -> bytes:
    """The graph as bytes of an ONNX file that reads the initializers named in ``weights`` from ``weights_file`` beside it."""
    model = model.clone()
    for value in model.graph.initializers.values():
        entry = weights.get(str(value.name))
        if entry is not None and value.const_value is not None:
            value.const_value = ir.ExternalTensor(
                entry.file or weights_file,
                entry.offset,
                entry.nbytes,
                value.const_value.dtype,
                shape=ir.Shape(entry.shape),
                name=entry.name,
            )
    data: bytes = ir.to_proto(model).SerializeToString()
    return data


def _write_weights(new: NewBundle, weights: tuple[Weight, ...], shared: SharedWeights | None) -> tuple[str, dict[str, WeightEntry]]:
    """One tensor in memory at a time, hashed on its way; equal bytes, whatever their shape, stand once.

    What is found in ``shared`` is not written: its file becomes the weights file, and the rest stands in one of its own, if there is any.
    """
    entries: dict[str, WeightEntry] = {}
    offsets: dict[str, int] = {}
    elsewhere: set[str] = set()
    path, whole, end = new.temporary(".data"), hashlib.sha256(), 0
    with path.open("xb") as file:
        for weight in weights:
            data = tensor_bytes(weight.tensor)
            sha256 = hashlib.sha256(data).hexdigest()
            found = shared.find(weight.name, sha256, data) if shared is not None else None
            if found is not None:
                offsets[sha256] = found.offset
                elsewhere.add(weight.name)
            elif sha256 not in offsets:
                for part in (bytes(-end % ALIGNMENT), data):
                    file.write(part)
                    whole.update(part)
                    end += len(part)
                offsets[sha256] = end - len(data)
            entries[weight.name] = WeightEntry(
                name=weight.name,
                dtype=np.dtype(weight.tensor.dtype.numpy()).name,
                shape=static_shape(weight.tensor),
                offset=offsets[sha256],
                nbytes=data.nbytes,
                sha256=sha256,
            )
            del data  # before the next is made
    logger.info("%d tensors, %d bytes of weights written", len(offsets), end)
    if shared is None:
        return new.add_file(path, "weights", ".data", sha256=whole.hexdigest()), entries
    own = new.add_file(path, "constants", ".data", sha256=whole.hexdigest()) if end else ""
    placed = {name: entry if name in elsewhere else entry.model_copy(update={"file": own}) for name, entry in entries.items()}
    return shared.link(new), placed


def _copy(source: Path, target: Path, *, processor: str) -> None:
    """Content, not links: a hub cache is symbolic links. Where a file names the processor's class, it is to name ``processor``."""
    try:
        data = source.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{source} can no longer be read ({error.strerror or error}): export again") from error
    if processor and source.name in FILES and KEY in (content := json.loads(data)):
        data = json.dumps(content | {KEY: processor}, indent=2).encode()
    target.write_bytes(data)
