"""Which processor a checkpoint has, told from its files, and how to load it for pictures alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

FILES: Final = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")
"""Those that may name the processor's class, under :data:`KEY`."""
KEY: Final = "processor_class"


def load_pictures(folder: Path, library: Any, *, name: str = "") -> Any:
    """The processor in ``folder``, without the network, without remote code, with images processed by Pillow; ``name`` as below.

    ``library`` (transformers) prefers torchvision where that is installed, which resizes differently: one bundle must not give two answers.

    Raises:
        OSError, ValueError, KeyError, TypeError, AttributeError, ImportError: its files are missing or damaged, or it is no such processor.
    """
    options = {"trust_remote_code": False, "local_files_only": True}
    processor = choose_processor(folder, library, name).from_pretrained(folder, **options)
    if hasattr(processor, "image_processor"):
        processor.image_processor = library.AutoImageProcessor.from_pretrained(folder, backend="pil", **options)
    return processor


def choose_processor(folder: Path, library: Any, name: str = "") -> Any:
    """The class of ``library`` (transformers) whose ``from_pretrained`` loads the processor in ``folder``, for pictures and text only.

    A processor that also takes videos loads without its video part, which transformers has for torchvision only. ``name`` is the
    class to take in place of the one that the files name.

    Raises:
        ImportError: the class needs a package that is not installed.
    """
    for file in FILES if not name else ():
        try:
            name = name or json.loads((folder / file).read_text(encoding="utf-8")).get(KEY, "")
        except (OSError, ValueError, AttributeError):
            continue
    kind = getattr(library, name, None) if isinstance(name, str) and name else None
    return _without_videos(kind) if hasattr(kind, "get_attributes") else library.AutoProcessor


def _without_videos(kind: Any) -> Any:
    """Transformers loads and checks the parts that ``get_attributes`` names."""
    parts = [part for part in kind.get_attributes() if "video" not in part]
    return type(kind.__name__, (kind,), {"get_attributes": classmethod(lambda _: list(parts))})
