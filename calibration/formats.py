"""Floating point formats that a model may be narrowed to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sievert.bundle.errors import CalibrationError


@dataclass(frozen=True)
class Format:
    """``largest`` finite value, and ``smallest_normal``: below it precision is lost bit by bit."""

    name: str
    largest: float
    smallest_normal: float


FORMATS: Final[Mapping[str, Format]] = MappingProxyType(
    {
        "float16": Format("float16", 65504.0, 2.0**-14),
        "bfloat16": Format("bfloat16", (2 - 2.0**-7) * 2.0**127, 2.0**-126),
    }
)


def find_format(name: str) -> Format:
    """The format of that name.

    Raises:
        CalibrationError: there is none.
    """
    if name not in FORMATS:
        raise CalibrationError(f"dtype {name!r} cannot be judged by its range: choose one of {', '.join(FORMATS)}")
    return FORMATS[name]
