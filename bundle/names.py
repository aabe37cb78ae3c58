"""Names of files in a bundle: plain, relative, and recognisably ours where they are ours."""

from __future__ import annotations

import re
import secrets
from pathlib import Path

from sievert.bundle.errors import IntegrityError, VariantError

MANIFEST = "sievert.json"
LOCK = ".sievert.lock"
FULL = "full"
"""The unpruned variant that every bundle has."""

DOWNLOADS = Path("~/.cache/sievert/checkpoints")
"""Where hub ids are downloaded to, each into a folder of its own."""

SUFFIXES = frozenset({".onnx", ".data", ".engine", ".json", ".npz"})
"""Suffixes of the files that steps write under content-hashed names."""

_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]{0,199}")
_VARIANT = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_TEMPORARY = re.compile(r"\.sievert-tmp-[0-9a-f]{16}(\.[a-z0-9]+)*")
_HASHED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._+-]*\.[0-9a-f]{8,64}(\.[a-z]+)")


def check_name(name: str, *, where: str) -> str:
    """``name`` again, if it is a plain file name that cannot leave the bundle; ``where`` says who gave it.

    Raises:
        IntegrityError: an absolute path, a separator, ``..``, a hidden or reserved name, or odd characters.
    """
    if name.startswith(("/", "\\")) or re.match(r"[A-Za-z]:", name):
        reason = "is an absolute path"
    elif ".." in name:
        reason = "contains '..'"
    elif "/" in name or "\\" in name:
        reason = "contains a path separator"
    elif name == MANIFEST or not _PLAIN.fullmatch(name):
        reason = "is not a plain file name of letters, digits and ._+-"
    else:
        return name
    raise IntegrityError(f"{where} names the file {name!r}, which {reason}: only plain names inside the bundle's own folder are read")


def check_variant_name(name: str) -> str:
    """``name`` again, if it can name a variant: it becomes part of file names.

    Raises:
        VariantError: anything but 1 to 64 letters, digits, ``_`` and ``-``.
    """
    if not _VARIANT.fullmatch(name):
        raise VariantError(f"{name!r} cannot name a variant: use 1 to 64 letters, digits, '_' and '-', for example iwp-22")
    return name


def temporary_name(suffix: str = "") -> str:
    """A fresh hidden name that :func:`is_ours` recognises."""
    return f".sievert-tmp-{secrets.token_hex(8)}{suffix}"


def hashed_name(stem: str, suffix: str, digest: str, *, digits: int = 8) -> str:
    """``stem.<first digits of the hash><suffix>``, the form under which steps keep what they write.

    Raises:
        ValueError: a suffix that is not one of :data:`SUFFIXES`, so that a leftover could not be told from a user's file.
    """
    if suffix not in SUFFIXES:
        raise ValueError(f"suffix {suffix!r}: steps write only {', '.join(sorted(SUFFIXES))}")
    return check_name(f"{stem}.{digest[:digits]}{suffix}", where="a step")


def is_ours(name: str) -> bool:
    """Whether a file that no manifest names is a leftover of ours by its name: a temporary one, or ``stem.<hash><suffix>``."""
    hashed = _HASHED.fullmatch(name)
    return bool(_TEMPORARY.fullmatch(name)) or (hashed is not None and hashed[1] in SUFFIXES)
