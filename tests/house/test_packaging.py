"""What is installed is what the folders hold, under our name alone, and pinned as a whole."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.house.tree import FOLDERS, ROOT, modules, repository_files

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
EXTRAS = {"cpu", "tensorrt-rtx", "dev"}


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's files elsewhere, so that building leaves nothing behind here."""
    folder = tmp_path_factory.mktemp("tree")
    for path in repository_files():
        target = folder / path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    shutil.copytree(ROOT / ".typing", folder / ".typing", symlinks=True)
    return folder


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    script = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
    run = subprocess.run([sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_holds_the_folders_and_nothing_else(wheel: Path):
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    expected = set()
    for path in repository_files():
        folder, *rest = path.relative_to(ROOT).parts
        if folder in FOLDERS and (path.suffix == ".py" or path.name == "py.typed"):
            expected.add("/".join([*FOLDERS[folder].split("."), *rest]))
    assert files == expected
    assert {name.split("/")[0] for name in files} == {"sievert"}


def test_every_file_of_the_folders_is_one_the_wheel_takes():
    known = {".py", ".typed"}
    stray = [path for path in repository_files() if path.relative_to(ROOT).parts[0] in FOLDERS and path.suffix not in known]
    assert stray == [], "list it under package-data in pyproject.toml, and here"


def test_the_wheel_works_without_the_repository(wheel: Path, tmp_path: Path):
    zipfile.ZipFile(wheel).extractall(tmp_path)
    packages = [name for name, path in modules().items() if path.name == "__init__.py"]
    # -S keeps the editable install's finder out: what is found comes from the wheel.
    script = (
        f"import sys, importlib; sys.path.insert(0, {str(tmp_path)!r})\nfor n in {packages!r}: print(importlib.import_module(n).__file__)"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert all(Path(line).is_relative_to(tmp_path) for line in run.stdout.splitlines())
    assert len(run.stdout.splitlines()) == len(packages) >= 12


def test_the_wheel_says_who_it_is(wheel: Path):
    archive = zipfile.ZipFile(wheel)
    (name,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = archive.read(name).decode()
    assert {"Name: sievert", "License-Expression: Apache-2.0", "Requires-Python: >=3.11"} <= set(text.splitlines())
    (points,) = [name for name in archive.namelist() if name.endswith("entry_points.txt")]
    assert "sievert = sievert.cli:main" in archive.read(points).decode()
    assert any(name.endswith("LICENSE") for name in archive.namelist())


def test_every_package_is_declared():
    declared = set(PROJECT["tool"]["setuptools"]["packages"])
    assert declared == {name for name, path in modules().items() if path.name == "__init__.py"}
    homeless = {str(path.parent.relative_to(ROOT)) for path in modules().values() if not (path.parent / "__init__.py").exists()}
    assert homeless == set()


def test_type_checkers_see_every_module():
    seen = {path.name: path for path in (ROOT / ".typing" / "sievert").iterdir()}
    api = {path.name for path in repository_files() if path.relative_to(ROOT).parts[0] == "api"}
    assert set(seen) == {*api, *(FOLDERS.keys() - {"api"})}, "run `make links`"
    for name, link in seen.items():
        folder = "api/" if name in api else ""
        assert link.readlink() == Path(f"../../{folder}{name}")


def test_mypy_finds_a_planted_error(copy: Path, tmp_path: Path):
    planted = copy / "bundle" / "names.py"
    original = planted.read_text()
    message = 'bundle/names.py:{}: error: Incompatible types in assignment (expression has type "str", variable has type "int")'
    message = message.format(len(original.splitlines()) + 2)
    # Without following imports: the question is whether mypy looks into the links at all, and `make types` answers the rest.
    options = ["--follow-imports=skip", "--cache-dir", str(tmp_path)]
    command = [sys.executable, "-m", "mypy", *options, ".typing/sievert/bundle/names.py"]
    clean = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    planted.write_text(original + '\nPLANTED: int = check_variant_name("x")\n')
    try:
        found = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
    finally:
        planted.write_text(original)
    assert clean.returncode == 0, clean.stdout + clean.stderr
    assert message in found.stdout


def pins() -> dict[str, str]:
    found: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.]+)", line)
            assert match, f"{line!r} is not a plain NAME==VERSION"
            found[str(canonicalize_name(match[1]))] = str(match[2])
    return found


def test_neither_onnx_runtime_wheel_is_in_the_base():
    names = [Requirement(text).name for text in PROJECT["project"]["dependencies"]]
    assert not [name for name in names if name.startswith(("onnxruntime", "tensorrt"))]
    assert {"cpu", "gpu", "tensorrt-rtx", "tensorrt", "dev"} <= PROJECT["project"]["optional-dependencies"].keys()


def test_what_we_ask_for_is_pinned_to_what_we_accept():
    asked = [*PROJECT["project"]["dependencies"]]
    for extra in EXTRAS:
        asked += PROJECT["project"]["optional-dependencies"][extra]
    pinned = pins()
    for requirement in map(Requirement, asked):
        assert pinned.get(canonicalize_name(requirement.name)) is not None, f"{requirement} is not in constraints.txt"
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)]), requirement


def test_what_they_ask_for_in_turn_is_pinned():
    pinned, queue, seen = pins(), [("sievert", frozenset(EXTRAS))], set()
    unpinned = set()
    while queue:
        name, extras = queue.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        for text in metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras | {""}):
                continue
            needed = canonicalize_name(requirement.name)
            if needed not in pinned:
                unpinned.add(f"{needed} (for {name})")
            queue.append((needed, frozenset(requirement.extras)))
    assert unpinned == set()
    assert len({name for name, _ in seen}) > 50
