"""Who may import whom, and what an import may cost."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.house.tree import FOLDERS, ROOT, imported, modules, python_files, reaches

HEAVY = {"torch", "transformers", "onnxruntime", "tensorrt", "tensorrt_rtx", "onnx", "onnx_ir", "onnxscript", "matplotlib"}
RUNTIMES = {"onnxruntime", "tensorrt", "tensorrt_rtx"}

# DESIGN's table, most specific prefix first: what a package may import of ours, and what it must not lead to by any chain.
ALLOWED: dict[str, set[str]] = {
    "sievert.bundle": set(),
    "sievert.exporter": {"sievert.bundle"},
    "sievert.graph_passes": {"sievert.bundle"},
    "sievert.engines.run": {"sievert.bundle", "sievert.engines"},
    "sievert.engines.build": {"sievert.bundle", "sievert.engines", "sievert.graph_passes"},
    "sievert.engines": {"sievert.bundle"},
    "sievert.parity.selectors": {"sievert.bundle"},
    "sievert.parity": {"sievert.bundle", "sievert.engines", "sievert.graph_passes"},
    "sievert.calibration": {"sievert.bundle", "sievert.graph_passes", "sievert.engines", "sievert.parity"},
    "sievert": set(FOLDERS.values()),
}
FORBIDDEN: dict[str, set[str]] = {
    "sievert.bundle": {"torch", "transformers", *RUNTIMES},
    "sievert.graph_passes": {"torch", "transformers", *RUNTIMES},
    "sievert.engines.run": {"torch", "sievert.graph_passes"},
    "sievert.parity.selectors": {"sievert.graph_passes", "sievert.exporter", "onnxscript", "torch", *RUNTIMES},
    "sievert.graph_passes.selectors": {"sievert.parity"},
}


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rule(name: str) -> str:
    return next(package for package in ALLOWED if within(name, package))


def test_the_table_speaks_of_packages_that_exist():
    assert set(FOLDERS.values()) <= modules().keys()
    assert (ALLOWED.keys() | FORBIDDEN.keys()) <= modules().keys()
    assert len(modules()) > len(ALLOWED)


def test_packages_import_only_what_the_table_allows():
    wrong = []
    for name, path in modules().items():
        package = rule(name)
        for line, target in imported(path):
            if not within(target, "sievert") or within(target, package):
                continue
            if not any(within(target, allowed) for allowed in ALLOWED[package]):
                wrong.append(f"{path.relative_to(ROOT)}:{line} imports {target}")
    assert wrong == []


@pytest.mark.parametrize("package", FORBIDDEN)
def test_no_chain_of_imports_leads_where_a_package_must_not_go(package: str):
    chains = [
        " -> ".join(chain)
        for name in modules()
        if within(name, package)
        for target, chain in reaches(name).items()
        if any(within(target, forbidden) for forbidden in FORBIDDEN[package])
    ]
    assert chains == []


def test_our_packages_are_imported_by_their_installed_names_only():
    # From the repository's root `import bundle` works too, and makes a second copy of every class.
    wrong = [
        f"{path.relative_to(ROOT)}:{line} imports {target}"
        for path in python_files()
        for line, target in imported(path)
        if target.startswith(".") or target.split(".")[0] in FOLDERS
    ]
    assert wrong == []


def modules_loaded_by(*names: str) -> set[str]:
    """Top-level names in ``sys.modules`` of a fresh interpreter, away from the repository, after importing ``names``."""
    script = f"import importlib, json, sys\nfor name in {names!r}: importlib.import_module(name)\nprint(json.dumps(list(sys.modules)))"
    run = subprocess.run([sys.executable, "-I", "-c", script], capture_output=True, text=True, cwd="/", check=False)
    assert run.returncode == 0, run.stderr
    return {name.split(".")[0] for name in json.loads(run.stdout)}


def test_importing_packages_and_the_bundle_is_light():
    packages = [name for name, path in modules().items() if path.name == "__init__.py"]
    bundle = [name for name in modules() if within(name, "sievert.bundle")]
    assert {"sievert", "sievert.bundle.store", "sievert.bundle.manifest", "sievert.graph_passes"} <= {*packages, *bundle}
    assert modules_loaded_by(*packages, *bundle) & HEAVY == set()


def test_importing_every_pass_loads_no_torch_and_no_runtime():
    names = [name for name in modules() if within(name, "sievert.graph_passes")]
    assert modules_loaded_by(*names) & {"torch", *RUNTIMES} == set()


def test_importing_every_runner_loads_no_torch_and_no_runtime():
    names = [name for name in modules() if within(name, "sievert.engines.run")]
    assert modules_loaded_by(*names) & {"torch", *RUNTIMES} == set()
