"""Which processor a checkpoint has, told from its files, and how to load it for pictures alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from sievert.bundle.errors import BundleError
from sievert.bundle.remote_code import find_remote_code, is_trusted

FILES: Final = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Those that may name the processor's class, under :data:`KEY`."""
KEY: Final = "processor_class"


def load_pictures(folder: Path, library: Any, *, name: str = "") -> Any:
    """The processor in ``folder``, without the network, with images processed by Pillow; ``name`` as below. Code that the folder brings
    along is run inside :func:`~sievert.bundle.remote_code.trust_remote_code` only.

    ``library`` (transformers) prefers torchvision where that is installed, which resizes differently: one bundle must not give two answers.

    Raises:
        BundleError: it would run code of its own.
        OSError, ValueError, KeyError, TypeError, AttributeError, ImportError: its files are missing or damaged, or it is no such processor.
    """
    if (code := find_remote_code(folder)) and not is_trusted():
        file, classes = next(iter(code.items()))
        raise BundleError(
            f"{folder} would run code of its own ({', '.join(classes)} in auto_map of {file}): read the .py files in it, and give "
            "--trust-remote-code if you trust them"
        )
    options = {"trust_remote_code": is_trusted(), "local_files_only": True}
    processor = choose_processor(folder, library, name).from_pretrained(folder, **options)
    if hasattr(processor, "image_processor"):
        processor.image_processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    return processor


def choose_processor(folder: Path, library: Any, name: str = "") -> Any:
    """The class of ``library`` (transformers) whose ``from_pretrained`` loads the processor in ``folder``, for pictures and text only.

    Where the files name trusted code for the whole processor, transformers finds it. A processor that also takes videos loads without its
    video part, which transformers has for torchvision only. ``name`` is the class to take in place of the one that the files name.

    Raises:
        ImportError: the class needs a package that is not installed.
    """
    for file in FILES:
        try:
            content = json.loads((folder / file).read_text(encoding="utf-8"))
            if is_trusted() and "AutoProcessor" in (content.get("auto_map") or ()):
                return library.AutoProcessor
            name = name or content.get(KEY, "")
        except (OSError, ValueError, AttributeError):
            continue
    kind = getattr(library, name, None) if isinstance(name, str) and name else None
    return _without_videos(kind) if hasattr(kind, "get_attributes") else library.AutoProcessor


def _without_videos(kind: Any) -> Any:
    """Transformers loads and checks the parts that ``get_attributes`` names."""
    parts = [part for part in kind.get_attributes() if "video" not in part]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: list(parts))})
