"""A checkpoint folder, found or downloaded, and judged by its small files before any weight is read."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import errors, snapshot_download
from huggingface_hub.errors import HFValidationError, XetDownloadError

from sievert.bundle.errors import CheckpointError, UnsupportedModelError
from sievert.bundle.remote_code import find_remote_code, is_trusted, list_classes
from sievert.exporter.architectures import ARCHITECTURES, Architecture, supported

SMALL_FILES = (
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.json",
    "chat_template.jinja",
)
"""What a bundle takes from a checkpoint besides its weights, where it is there."""

CODE = "*.py"
"""What it takes too where the checkpoint wants code of its own run, and the user trusts it."""

_WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HTTP_ERROR: type[Exception] = vars(errors)["HTTPError"]  # of whichever HTTP library the hub uses; not in its typed names
_LIMIT = 64 << 20  # a tokenizer of a quarter million words takes some 30 MB


@dataclass(frozen=True)
class Checkpoint:
    """``given`` is what the user gave, ``files`` the names of the small files that are there, ``code`` of those that are Python."""

    given: str
    folder: Path
    config: dict[str, Any]
    architecture: Architecture
    files: tuple[str, ...]
    code: tuple[str, ...] = ()


def open_checkpoint(model: str | Path, *, downloads: Path) -> Checkpoint:
    """Find a local folder, or download a hub id (``owner/name``) as a plain folder below ``downloads``; check its small files.

    A download fetches the configuration first: an unsupported model costs no gigabytes.

    Raises:
        CheckpointError: no checkpoint there, or one that cannot be read safely (remote code, pickled weights, missing files).
        UnsupportedModelError: a checkpoint of something Sievert does not export.
    """
    given = str(model)
    try:
        folder = Path(model).expanduser()
    except RuntimeError:  # ~somebody who is not there
        folder = Path(model)
    if folder.is_dir():
        return _checked(given, folder)
    if folder.exists():
        raise CheckpointError(f"{given} is a file: give the folder that holds config.json and the .safetensors files")
    if isinstance(model, Path) or not _HUB_ID.fullmatch(given):
        raise CheckpointError(f"{given} does not exist: give a checkpoint folder, or a hub id such as llava-hf/llava-1.5-7b-hf")
    folder = downloads.expanduser() / given
    _download(given, folder, (*SMALL_FILES, *([CODE] if is_trusted() else [])))
    _judge(given, folder)
    _download(given, folder, _WEIGHTS)
    return _checked(given, folder)


def _download(given: str, folder: Path, patterns: tuple[str, ...]) -> None:
    try:
        # local_dir: plain files. The hub's own cache is symbolic links, which ONNX's libraries refuse.
        snapshot_download(given, local_dir=folder, allow_patterns=list(patterns), ignore_patterns=["*/*"])
    except (_HTTP_ERROR, HFValidationError, XetDownloadError, OSError) as error:
        raise CheckpointError(
            f"{given} is no local folder and could not be downloaded from the hub ({_first_line(error)}): "
            "check the spelling, the network, and that you may read it"
        ) from error


def _checked(given: str, folder: Path) -> Checkpoint:
    config, architecture = _judge(given, folder)
    _check_weights(given, folder)
    files = tuple(name for name in SMALL_FILES if (folder / name).is_file())
    code = tuple(sorted(path.name for path in folder.glob(CODE))) if find_remote_code(folder) else ()
    if not {"preprocessor_config.json", "processor_config.json"} & set(files):
        raise CheckpointError(
            f"{given} has no image processor (preprocessor_config.json or processor_config.json): add the files of the model it came from"
        )
    if not {"tokenizer.json", "tokenizer.model", "vocab.json"} & set(files):
        raise CheckpointError(f"{given} has no tokenizer (tokenizer.json): add the tokenizer files of the model it came from")
    return Checkpoint(given, folder, config, architecture, (*files, *code), code)


def _judge(given: str, folder: Path) -> tuple[dict[str, Any], Architecture]:
    """Refuse by the configuration files alone."""
    if (folder / "sievert.json").exists():
        raise CheckpointError(f"{given} is a Sievert bundle, not a checkpoint: give the folder it was made from, or use `sievert prune`")
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"{given} holds no config.json, so it is no checkpoint: give the folder that save_pretrained wrote")
    for path in sorted(folder.glob("*.json")):
        if path.name in SMALL_FILES and (classes := list_classes(_read_json(path))):
            _check_code(given, path.name, classes)
    config = _read_json(folder / "config.json")
    architecture = _find_architecture(given, config)
    for where, part in (("config.json", config), ("text_config", config.get("text_config") or {})):
        if quantised := part.get("quantization_config"):
            method = quantised.get("quant_method", "unknown") if isinstance(quantised, dict) else quantised
            raise UnsupportedModelError(
                f"{given} is quantised already ({method}, quantization_config of {where}): export the original checkpoint in float32, "
                "float16 or bfloat16"
            )
    return config, architecture


def _check_code(given: str, name: str, classes: list[str]) -> None:
    """Refuse code that ``name`` wants imported, unless it is trusted and lies in the folder."""
    if not is_trusted():
        raise CheckpointError(
            f"{given}: {name} asks for code of its own ({', '.join(classes)} in auto_map), which is not run unasked: use a conversion for "
            f"a class of transformers, or read the code and give --trust-remote-code. Supported: {supported()}"
        )
    if other := [each for each in classes if "--" in each]:
        raise CheckpointError(
            f"{given}: {name} asks for code of another repository ({other[0]}), which a bundle cannot carry: download the checkpoint, put "
            "the .py files into its folder, and name them without what stands before --"
        )


def _find_architecture(given: str, config: dict[str, Any]) -> Architecture:
    names = config.get("architectures") or []
    of_class = [architecture for architecture in ARCHITECTURES if architecture.model_class in names]
    tower = (config.get("vision_config") or {}).get("model_type")
    if of_class:
        return next((architecture for architecture in of_class if tower in architecture.towers), of_class[0])
    kind = ", ".join(map(str, names)) or config.get("model_type") or "a model without a name"
    text_only = "" if "vision_config" in config else ", which has no vision tower"
    raise UnsupportedModelError(f"{given} is {kind}{text_only}; Sievert exports {supported()}")


def _check_weights(given: str, folder: Path) -> None:
    if not any(folder.glob("*.safetensors")):
        pickled = sorted(path.name for suffix in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(suffix))
        if pickled:
            raise CheckpointError(
                f"{given} has its weights only as {pickled[0]}, a pickle that can run code when it is read: convert it to safetensors "
                "(model.save_pretrained writes them) and export that"
            )
        raise CheckpointError(f"{given} holds no .safetensors file: download the weights too")
    for index in folder.glob("*.safetensors.index.json"):
        listed = _read_json(index).get("weight_map")
        if not isinstance(listed, dict):
            raise CheckpointError(f"{given}: {index.name} has no weight_map: download it again")
        for name in sorted(set(map(str, listed.values()))):
            if Path(name).name != name:
                raise CheckpointError(f"{given}: {index.name} names the weights file {name!r} outside the folder")
            if not (folder / name).is_file():
                raise CheckpointError(f"{given}: {index.name} names {name}, which is missing: download it again")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _LIMIT:
            raise CheckpointError(f"{path} has {path.stat().st_size >> 20} MiB, more than any such file needs ({_LIMIT >> 20} MiB)")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON ({_first_line(error)}): download it again") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a JSON {type(content).__name__}, expected an object: download it again")
    return content


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
