"""What an answer depends on, as one hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from sievert.bundle.store import Bundle


def identify_graphs(bundle: Bundle, graphs: Mapping[str, str]) -> str:
    """A hash of everything a variant's answers depend on: the hashes of the ``graphs`` that are run, the weights, the processor and the
    tokenizer.
    """
    digest = hashlib.sha256()
    for graph, content in graphs.items():
        digest.update(f"{graph} {content}\n".encode())
    for name, entry in sorted(bundle.manifest.files.items()):
        if not name.endswith((".onnx", ".engine")):
            digest.update(f"{name} {entry.sha256}\n".encode())
    return digest.hexdigest()
