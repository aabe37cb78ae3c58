"""Libraries that print while they work, silenced for the length of a block: what they say goes to our log at debug level."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging as _transformers_logging

logger = logging.getLogger(__name__)
transformers_logging: Any = _transformers_logging  # untyped

_NOISY = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def quiet(what: str) -> Iterator[None]:
    """Run the block without prints, progress bars or warnings; every setting is put back, also after an error."""
    noisy = [logging.getLogger(name) for name in (*_NOISY, *_children(_NOISY))]
    levels = [each.level for each in noisy]
    bars, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    printed = io.StringIO()
    try:
        for each in noisy:
            each.setLevel(logging.ERROR)
        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
        with warnings.catch_warnings(record=True) as caught, contextlib.redirect_stdout(printed):
            warnings.simplefilter("always")
            yield
    finally:
        for each, level in zip(noisy, levels, strict=True):
            each.setLevel(level)
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
        for line in printed.getvalue().splitlines():
            logger.debug("%s: %s", what, line)
    for warning in caught:
        logger.debug("%s: %s", what, warning.message)


def _children(names: tuple[str, ...]) -> list[str]:
    """Loggers below ``names`` that have a level of their own, which the parents' level would not reach."""
    below = tuple(f"{name}." for name in names)
    existing = logging.root.manager.loggerDict.items()
    return [name for name, each in existing if name.startswith(below) and isinstance(each, logging.Logger) and each.level]
