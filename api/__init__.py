"""Sievert: vision-language models into engines that drop visual tokens inside the graph, and a verdict that says they still agree.

Everything of the ``sievert`` command is a function here. None of them prints; steps that take long tell a ``progress`` callback
what they do. Importing this package loads no other library: each function imports what it needs when it is called::

    import sievert

    made = sievert.export("path/to/checkpoint", "my-bundle", cuts=[sievert.Cut(keep="22%")])
    report = sievert.check(made.path, samples=8)
    answers = sievert.run(made.path, "photo.png", ["what is this?"], variant="iwp-22")
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sievert.bundle.errors import (
    BundleError,
    CalibrationError,
    CheckpointError,
    EngineError,
    EngineUnavailableError,
    GraphError,
    ImageError,
    InputError,
    IntegrityError,
    ManifestError,
    PlanError,
    ProfileError,
    PromptError,
    SievertError,
    UnsupportedModelError,
    VariantError,
)

if TYPE_CHECKING:
    from sievert.benching import bench
    from sievert.building import build
    from sievert.bundle.remote_code import trust_remote_code
    from sievert.checking import check
    from sievert.collecting import collect, load_collection
    from sievert.comparing import compare_selectors
    from sievert.diagnosing import doctor
    from sievert.evaluating import evaluate
    from sievert.exporting import export
    from sievert.inspecting import inspect
    from sievert.listing import list_engines, list_families, list_selectors
    from sievert.plan_file import write_plan
    from sievert.planning import Cut
    from sievert.pruning import prune
    from sievert.pruning_onnx import prune_onnx
    from sievert.quantising import quantise
    from sievert.ranging import ranges
    from sievert.running import run
    from sievert.sensing import sensitivity
    from sievert.tuning import tune

    __version__: str

__all__ = [
    "BundleError",
    "CalibrationError",
    "CheckpointError",
    "Cut",
    "EngineError",
    "EngineUnavailableError",
    "GraphError",
    "ImageError",
    "InputError",
    "IntegrityError",
    "ManifestError",
    "PlanError",
    "ProfileError",
    "PromptError",
    "SievertError",
    "UnsupportedModelError",
    "VariantError",
    "__version__",
    "bench",
    "build",
    "check",
    "collect",
    "compare_selectors",
    "doctor",
    "evaluate",
    "export",
    "inspect",
    "list_engines",
    "list_families",
    "list_selectors",
    "load_collection",
    "prune",
    "prune_onnx",
    "quantise",
    "ranges",
    "run",
    "sensitivity",
    "trust_remote_code",
    "tune",
    "write_plan",
]

# Modules are not named like the functions: importing a module `sievert.export` would put it in the function's place.
_HOMES = {
    "Cut": "planning",
    "bench": "benching",
    "build": "building",
    "check": "checking",
    "collect": "collecting",
    "compare_selectors": "comparing",
    "doctor": "diagnosing",
    "evaluate": "evaluating",
    "export": "exporting",
    "inspect": "inspecting",
    "list_engines": "listing",
    "list_families": "listing",
    "list_selectors": "listing",
    "load_collection": "collecting",
    "prune": "pruning",
    "prune_onnx": "pruning_onnx",
    "quantise": "quantising",
    "ranges": "ranging",
    "run": "running",
    "sensitivity": "sensing",
    "trust_remote_code": "bundle.remote_code",
    "tune": "tuning",
    "write_plan": "plan_file",
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("sievert")
    if name in _HOMES:
        return getattr(import_module(f"sievert.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sievert' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
