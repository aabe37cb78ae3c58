"""The repository's own files, its packages, and what they import."""

from __future__ import annotations

import ast
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = {
    "api": "sievert",
    "bundle": "sievert.bundle",
    "calibration": "sievert.calibration",
    "engines": "sievert.engines",
    "exporter": "sievert.exporter",
    "graph_passes": "sievert.graph_passes",
    "parity": "sievert.parity",
}
_SKIPPED = {
    ".git",
    ".venv",
    "build",
    "dist",
    "__pycache__",
    ".mypy_cache",
    ".pytest_cache",
    ".ruff_cache",
    ".hypothesis",
    "sievert.egg-info",
}


@cache
def repository_files() -> tuple[Path, ...]:
    """Files that are, or would be, in the repository; links to folders are not entered."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):  # an unpacked archive
        paths = [path for path in ROOT.rglob("*") if not _SKIPPED & set(path.relative_to(ROOT).parts)]
    return tuple(sorted(path for path in paths if path.is_file() and ".typing" not in path.parts))


def python_files(*folders: str) -> tuple[Path, ...]:
    """Python files under the named folders; all of the repository's if none is named."""
    chosen = [path for path in repository_files() if path.suffix == ".py"]
    return tuple(path for path in chosen if not folders or path.relative_to(ROOT).parts[0] in folders)


@cache
def modules() -> dict[str, Path]:
    """Every module that is installed, by import name."""
    found = {}
    for path in python_files(*FOLDERS):
        folder, *rest = path.relative_to(ROOT).with_suffix("").parts
        found[".".join([FOLDERS[folder], *rest]).removesuffix(".__init__")] = path
    return found


@cache
def parse(path: Path) -> ast.Module:
    """A file's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module) of every import in a file, those inside functions and under TYPE_CHECKING too. ``from a import b`` gives a.b."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{alias.name}") for alias in node.names)


@cache
def needs(name: str) -> frozenset[str]:
    """What a module of ours imports directly: modules of ours by full name, others by their top-level name."""
    found = set()
    for _, target in imported(modules()[name]):
        if target.split(".")[0] != "sievert":
            found.add(target.split(".")[0])
            continue
        while target not in modules() and "." in target:
            target = target.rpartition(".")[0]
        found.add(target)
    return frozenset(found - {name})


def reaches(name: str) -> dict[str, tuple[str, ...]]:
    """Everything a module leads to by any chain of imports, each with one such chain."""
    chains: dict[str, tuple[str, ...]] = {name: (name,)}
    queue = [name]
    while queue:
        current = queue.pop()
        if current in modules():
            for target in sorted(needs(current) - chains.keys()):
                chains[target] = (*chains[current], target)
                queue.append(target)
    return chains
