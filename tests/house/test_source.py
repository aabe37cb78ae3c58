"""What every source file keeps to: sizes, who speaks to the user, and nothing of the machine it was written on."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from sievert.exporter.architectures import ARCHITECTURES
from tests.house.tree import FOLDERS, ROOT, imported, modules, parse, python_files, repository_files

LONGEST_FUNCTION = 90
LONGEST_FILE = 350
EXAMPLES = re.compile(r"llava-hf/llava-[\w.-]+( llava)?|path/to/llava")
"""What messages and help show a checkpoint by."""
LIBRARY = tuple(folder for folder in FOLDERS if folder != "api")

# Put together here, so that this file does not hold what it looks for.
HOSTS = tuple(
    "".join(parts)
    for parts in (("py", "pi.org"), ("python", "hosted.org"), ("download.", "pytorch.org"), ("pypi.", "nvidia.com"), ("/simple", "/"))
)
MACHINE = re.compile(r"(?<![\w.:~/-])/(?:work|home|root|opt|mnt|Users|scratch)/[\w.]")


def where(path: Path, node: ast.AST) -> str:
    return f"{path.relative_to(ROOT)}:{getattr(node, 'lineno', 0)}"


def test_functions_and_files_are_short():
    long = []
    for path in python_files(*FOLDERS):
        if (lines := len(path.read_text().splitlines())) > LONGEST_FILE:
            long.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > LONGEST_FUNCTION:
                    long.append(f"{where(path, node)}: {node.name} has {length} lines")
    assert long == []


def test_only_the_api_prints_parses_and_exits():
    names = {"print", "input", "exit", "quit", "SystemExit", "breakpoint"}
    attributes = {("sys", "exit"), ("os", "_exit"), ("sys", "stdout"), ("sys", "stderr"), ("sys", "argv"), ("logging", "basicConfig")}
    wrong = []
    for path in python_files(*LIBRARY):
        for node in library_nodes(parse(path)):
            if isinstance(node, ast.Name) and node.id in names:
                wrong.append(f"{where(path, node)}: {node.id}")
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (node.value.id, node.attr) in attributes:
                wrong.append(f"{where(path, node)}: {node.value.id}.{node.attr}")
        wrong += [f"{path.relative_to(ROOT)}:{line}: {name}" for line, name in imported(path) if speaks(name)]
    assert wrong == []


def library_nodes(module: ast.Module) -> Iterator[ast.AST]:
    """All nodes but those under ``if __name__ == "__main__"``: such a file is also a worker process, which has an end of its own."""
    for statement in module.body:
        if not (isinstance(statement, ast.If) and ast.unparse(statement.test) == "__name__ == '__main__'"):
            yield from ast.walk(statement)


def speaks(name: str) -> bool:
    """Whether an import is of something that parses or prints. A rich table is only a value, which the api prints."""
    return name.split(".", maxsplit=1)[0] in {"typer", "rich", "click", "argparse", "tqdm"} and name != "rich.table.Table"


def test_the_search_for_exits_finds_them_outside_the_main_block_only():
    outside, inside = "raise SystemExit", "if __name__ == '__main__':\n    raise SystemExit"
    found = [any(isinstance(node, ast.Name) for node in library_nodes(ast.parse(text))) for text in (outside, inside)]
    assert found == [True, False]
    assert speaks("rich.console.Console")
    assert speaks("typer.Typer")
    assert not speaks("rich.table.Table")


def test_every_module_says_what_it_is():
    assert [name for name, path in modules().items() if not ast.get_docstring(parse(path))] == []


def text_files() -> list[tuple[Path, str]]:
    found = []
    for path in repository_files():
        data = path.read_bytes()
        if len(data) < 1 << 20 and b"\0" not in data:
            found.append((path, data.decode("utf-8")))
    assert len(found) > 20
    return found


def test_no_file_names_a_machines_folders_or_a_registrys_host():
    wrong = []
    for path, text in text_files():
        for number, line in enumerate(text.splitlines(), 1):
            found = [host for host in HOSTS if host in line]
            if match := MACHINE.search(line):
                found.append(match[0])
            wrong += [f"{path.relative_to(ROOT)}:{number}: {what}" for what in found]
    assert wrong == []


@pytest.mark.parametrize("text", ["see /wo" + "rk/x", '"/ho' + 'me/me"', "(/op" + "t/wheels"])
def test_the_search_for_machine_paths_finds_them(text: str):
    assert MACHINE.search(text)


@pytest.mark.parametrize("text", ["https://example.org/home/x", "a/root/b", "~/opt/x", "./work/x", "/usr/bin/env"])
def test_the_search_for_machine_paths_leaves_others_alone(text: str):
    assert not MACHINE.search(text)


def test_no_generic_code_names_a_model_family():
    """A family is a file of data in exporter/architectures, and a name is known there alone."""
    stems = {match[0] for each in ARCHITECTURES if (match := re.match(r"[a-z]+", each.name))}
    assert {"llava", "qwen", "idefics"} <= stems
    wrong = []
    for path in python_files(*FOLDERS):
        if path.parent == ROOT / "exporter" / "architectures":
            continue
        for number, line in enumerate(EXAMPLES.sub("", path.read_text(encoding="utf-8")).splitlines(), 1):
            wrong += [f"{path.relative_to(ROOT)}:{number}: {stem}" for stem in stems if stem in line.lower()]
    assert wrong == []


def test_remote_code_is_trusted_by_the_user_alone():
    """Transformers is told no, or what the user said; only the command line says it for him."""
    flag, told, entered = "trust_remote_code", [], set()
    for path in python_files(*FOLDERS):
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.keyword) and node.arg == flag:
                told.append(ast.unparse(node.value))
            if isinstance(node, ast.Dict) and path.name != "__init__.py":
                keys = [key.value if isinstance(key, ast.Constant) else None for key in node.keys]
                told += [ast.unparse(value) for key, value in zip(keys, node.values, strict=True) if key == flag]
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(flag):
                entered.add(path.relative_to(ROOT).as_posix())
    assert len(told) >= 6 and set(told) == {"False", "is_trusted()"}
    assert entered == {"api/cli.py"}
