"""The transcriptions by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Option
from sievert.parity.selectors.cdpruner import CdPruner
from sievert.parity.selectors.dart import Dart
from sievert.parity.selectors.divprune import DivPrune
from sievert.parity.selectors.fastv import FastV
from sievert.parity.selectors.fopru import FoPru
from sievert.parity.selectors.iwp import Iwp, Magnitude
from sievert.parity.selectors.pyramiddrop import PyramidDrop
from sievert.parity.selectors.random import Random
from sievert.parity.selectors.sparsevlm import SparseVlm
from sievert.parity.selectors.steps import ReferenceSelector
from sievert.parity.selectors.transprune import TransPrune
from sievert.parity.selectors.uniform import Uniform
from sievert.parity.selectors.visionzip import VisionZip

SELECTORS: Mapping[str, type[Any]] = {
    "iwp": Iwp,
    "magnitude": Magnitude,
    "fastv": FastV,
    "pyramiddrop": PyramidDrop,
    "sparsevlm": SparseVlm,
    "transprune": TransPrune,
    "dart": Dart,
    "divprune": DivPrune,
    "cdpruner": CdPruner,
    "fopru": FoPru,
    "visionzip": VisionZip,
    "random": Random,
    "uniform": Uniform,
}


def reference_selector(name: str, options: Mapping[str, Option]) -> ReferenceSelector:
    """The transcription ``name`` with ``options``.

    Raises:
        PlanError: a selector without a transcription, or an option it does not have.
    """
    if name not in SELECTORS:
        raise PlanError(f"selector {name!r} has no float64 transcription to be judged by: choose one of {', '.join(SELECTORS)}")
    known = {field.name for field in dataclasses.fields(SELECTORS[name])}
    unknown = sorted(set(options) - known)
    if unknown:
        raise PlanError(f"selector {name!r} has no option {unknown[0]!r}: choose one of {', '.join(sorted(known))}")
    selector: ReferenceSelector = SELECTORS[name](**options)
    return selector
