"""``collection.json``: everything a folder of calibration data says about itself."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Final

from pydantic import ValidationError

from sievert.bundle.errors import CalibrationError, IntegrityError
from sievert.bundle.files import open_plain, sha256_bytes
from sievert.bundle.manifest import FileEntry, Manifest
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Record, TensorSpec

NAME: Final = "collection.json"
FORMAT: Final = 1
LEAST: Final = 2
"""Samples that calibrate anything: of one alone, nothing says whether its ranges are typical."""


class ModelInfo(Record):
    """The model the data went through; ``sha256`` is of its weights, see :func:`hash_model`."""

    sha256: str
    source: str
    architecture: str
    dtype: str


class DataInfo(Record):
    """The file the samples were read from (empty for random ones), and a hash of all prompts and images that were used."""

    file: str
    sha256: str


class SampleInfo(Record):
    """One prompt about its images, in the order of the prompt. ``line`` is its line in the data, counted from 1, or 0 for a random one;
    ``tokens`` were answered greedily, as far as they were followed.
    """

    line: int
    images: tuple[str, ...]
    images_sha256: tuple[str, ...]
    prompt: str
    tokens: tuple[int, ...] = ()


class Feed(Record):
    """The inputs of one run of a graph. ``samples`` are the numbers of the samples in its rows, None for a row that held none.

    ``step`` is which token of the answer a decode run was fed, counted from 1; 0 for other graphs.
    """

    file: str
    samples: tuple[int | None, ...]
    step: int = 0


class GraphData(Record):
    """All runs of one graph. ``sha256`` is of the ONNX or engine file that ran; ``zeros`` are inputs that are all zero and not stored."""

    sha256: str
    inputs: tuple[TensorSpec, ...]
    zeros: tuple[str, ...]
    feeds: tuple[Feed, ...]


class CollectionInfo(Record):
    """The whole of ``collection.json``. ``seed`` is that of random samples; ``seal`` the hash of all the rest, see :func:`seal`."""

    format: int = FORMAT
    random: bool
    seed: int
    model: ModelInfo
    variant: str
    plan: Plan
    profile: Profile
    engine: str
    template: bool
    decode_steps: tuple[int, ...]
    data: DataInfo
    samples: tuple[SampleInfo, ...]
    graphs: dict[str, GraphData]
    files: dict[str, FileEntry]
    versions: dict[str, str]
    seal: str = ""

    @property
    def stored_bytes(self) -> int:
        """Size of all tensors on the disk."""
        return sum(entry.bytes for entry in self.files.values())

    def feeds_bytes(self, graph: str) -> int:
        """Size of one graph's files."""
        return sum(self.files[name].bytes for name in {feed.file for feed in self.graphs[graph].feeds})


def hash_model(manifest: Manifest) -> str:
    """SHA-256 over the names, types, shapes and contents of a model's weights, in the order of their names."""
    lines = sorted(f"{weight.name} {weight.dtype} {list(weight.shape)} {weight.sha256}\n" for weight in manifest.weights)
    return sha256_bytes("".join(lines).encode())


def hash_samples(samples: tuple[SampleInfo, ...]) -> str:
    """SHA-256 over the prompts and images of samples, in order."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.images_sha256, sample.prompt]).encode())
    return digest.hexdigest()


def seal(info: CollectionInfo) -> CollectionInfo:
    """The same with its seal: a hash of everything else, so that an edit by hand does not pass unseen."""
    return info.model_copy(update={"seal": sha256_bytes(render(info.model_copy(update={"seal": ""})))})


def render(info: CollectionInfo) -> bytes:
    """``collection.json`` as it stands on disk: the same bytes for the same content."""
    text = json.dumps(info.model_dump(mode="json"), sort_keys=True, indent=1, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def read_info(folder: Path) -> CollectionInfo:
    """What ``collection.json`` in a folder says; no other file is looked at.

    Raises:
        CalibrationError: missing, malformed, edited, or from a newer version.
    """
    path = folder / NAME
    if not path.is_file():
        raise CalibrationError(f"{folder} holds no calibration data: it has no {NAME}. Make some: sievert collect BUNDLE --data FILE")
    try:
        with open_plain(path) as file:
            data = file.read()
        raw = json.loads(data)
        found = raw.get("format") if isinstance(raw, dict) else None
        if isinstance(found, int) and found > FORMAT:
            raise CalibrationError(f"{path} has format {found}, this version of Sievert reads up to {FORMAT}: upgrade it, or collect again")
        info = CollectionInfo.model_validate_json(data)
    except (ValidationError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} is malformed ({str(error).splitlines()[0]}): {COLLECT_AGAIN}") from error
    except (IntegrityError, OSError) as error:
        raise CalibrationError(f"{path} cannot be read ({error}): {COLLECT_AGAIN}") from error
    if seal(info).seal != info.seal:
        raise CalibrationError(f"{path} was changed since it was collected: {COLLECT_AGAIN}")
    return info


COLLECT_AGAIN: Final = "collect again with `sievert collect`"
