"""What is costly to make and only read, made by the first of the processes that run the tests, and read by all of them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock  # a dependency of torch


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder ``name`` of this run of the tests, after ``make`` filled it; nobody may change it.

    Where pytest-xdist runs several processes, it lies beside their own folders, and the others wait for the one that makes it.
    """
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / f"shared-{name}"
    complete = folder.with_name(f"{folder.name}.complete")
    with FileLock(folder.with_name(f"{folder.name}.lock")):
        if not complete.exists():
            folder.mkdir()  # fails where an earlier attempt did, so that the first error is the one to read
            make(folder)
            complete.touch()
    return folder
