"""Which options of ``quantise`` say something to which format. What a format would not read is refused, not ignored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from sievert.bundle.errors import CalibrationError
from sievert.calibration.formats import FORMATS as SIXTEEN
from sievert.calibration.numbers import FORMATS

PLAIN: Final = "float32"
"""The format of a variant whose caches alone are narrowed."""
_ACTIVATIONS: Final = tuple(name for name, each in FORMATS.items() if each.activations)
_BLOCKS: Final = tuple(name for name, each in FORMATS.items() if each.blocks)
_CODES: Final = tuple(FORMATS)
# Of each option: the value that says nothing, and the formats that read it.
_OPTIONS: Final[Mapping[str, tuple[Any, tuple[str, ...]]]] = {
    "calibration": ("max", _ACTIVATIONS),
    "percentile": (99.99, _ACTIVATIONS),
    "block": (32, _BLOCKS),
    "quantise_selector": (False, _CODES),
    "quantise_head": (False, _CODES),
    "keep_high": ((), _CODES),
    "keep_worst": (0, _CODES),
}


def refuse_unread(format: str, kv: str, given: Mapping[str, Any]) -> None:  # noqa: A002
    """Refuse options that ``format`` does not read, and a ``format`` that leaves nothing to do. ``given`` are the other options by name.

    Raises:
        CalibrationError: one has another value than the one that says nothing.
    """
    known = (*FORMATS, *SIXTEEN)
    if format not in (*known, PLAIN):
        raise CalibrationError(f"format {format!r} is not known: choose one of {', '.join(known)}")
    if format == PLAIN and not kv:
        raise CalibrationError(f"format {PLAIN!r} changes nothing by itself: choose one of {', '.join(known)}, or give kv")
    if format in SIXTEEN and kv:
        raise CalibrationError(f"kv={kv!r}, but caches of {format} graphs are {format}: leave kv out, or choose format {PLAIN} or int8")
    for name, value in given.items():
        silent, readers = _OPTIONS[name]
        if value != silent and format not in readers:
            raise CalibrationError(f"{name}={value!r} says nothing to format {format}: leave it out, or choose {' or '.join(readers)}")
    if given.get("percentile", 99.99) != 99.99 and given.get("calibration") == "max":
        raise CalibrationError(
            f"percentile={given['percentile']:g}, but calibration is 'max', which does not read it: give calibration 'percentile' too"
        )
