"""How steps that take long say what they are doing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

Progress = Callable[[str], None]
"""Called with the name of each part of the work as it begins."""

Size = int | Literal["auto"]
"""A length or count; ``auto`` takes the one that the function's documentation names."""


def silent(_: str) -> None:
    """Progress that nobody looks at."""
