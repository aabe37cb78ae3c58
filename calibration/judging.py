"""What a tensor held over all runs, and what that means for a narrower format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
import onnx_ir as ir

from sievert.bundle.specs import describe_values
from sievert.calibration.collection import Collection
from sievert.calibration.formats import FORMATS, Format
from sievert.calibration.scopes import find_scope, is_float32_island
from sievert.engines.run.dtypes import Array

Kind = Literal["input", "weight", "computed"]
Verdict = Literal["nan", "overflow", "close", "fits", "float32"]

CLOSE: Final = 4.0
"""Below this headroom other data may overflow: a range from samples is no bound."""
_LARGEST: Final = {name: each.largest for name, each in FORMATS.items()} | {
    name: float(np.finfo(name).max) for name in ("float32", "float64")
}


@dataclass
class Seen:
    """What a tensor held so far. NaN, infinities and the largest finite values of its own type (``fills``: masks are made of them) are
    counted, and left out of the range; ``tiny`` are values other than 0 below the format's smallest normal one.
    """

    low: float = math.inf
    high: float = -math.inf
    values: int = 0
    nans: int = 0
    infinities: int = 0
    fills: int = 0
    tiny: int = 0
    overflowing_runs: int = 0
    largest_run: int = 0

    @property
    def magnitude(self) -> float:
        """The largest absolute value, 0 where there was none."""
        return max(0.0, -self.low, self.high) if self.high >= self.low else 0.0

    def add(self, array: Array, limits: Format, run: int = 0) -> None:
        """Take in one run."""
        self.values += array.size
        largest = _LARGEST[array.dtype.name]
        if array.dtype.itemsize == 2:
            array = array.astype(np.float32)
        size = np.abs(array)
        self.tiny += int(np.count_nonzero((size < limits.smallest_normal) & (size > 0)))
        usual = size < largest  # false for NaN
        if not usual.all():
            nans, infinities = int(np.count_nonzero(np.isnan(array))), int(np.count_nonzero(np.isinf(array)))
            self.nans += nans
            self.infinities += infinities
            self.fills += array.size - int(np.count_nonzero(usual)) - nans - infinities
            array = array[usual]
        if array.size:
            low, high = float(array.min()), float(array.max())
            if max(-low, high) > self.magnitude:
                self.largest_run = run
            self.low, self.high = min(self.low, low), max(self.high, high)
            self.overflowing_runs += max(-low, high) > limits.largest


@dataclass(frozen=True)
class TensorRange:
    """One tensor. ``low``, ``high`` and ``magnitude`` are of its usual values (see :class:`Seen`), ``tiny`` a share from 0 to 1.

    ``at`` names the samples of the run that reached the magnitude, ``headroom`` is the format's limit over it, None where it is 0. ``node``
    computes the tensor and ``module`` is where in the model that stands; both are empty for inputs and weights. ``starts``: it overflows
    though nothing it is computed from does, weights aside.
    """

    graph: str
    name: str
    kind: Kind
    dtype: str
    shape: tuple[int, ...]
    op: str
    node: str
    module: str
    low: float
    high: float
    magnitude: float
    headroom: float | None
    tiny: float
    at: str
    nans: int
    infinities: int
    fills: int
    verdict: Verdict
    starts: bool
    reason: str


def judge(
    collection: Collection,
    graph: str,
    model: ir.Model,
    found: Mapping[ir.Value, Seen],
    limits: Format,
    judged: frozenset[str],
    *,
    sixteen: bool,
) -> Iterator[TensorRange]:
    """Inputs, weights that were not ``judged`` with an earlier graph, then computed values in the graph's order.

    ``sixteen``: the graph is a 16-bit one, with float32 where that is needed.
    """
    over = {value for value, seen in found.items() if _overflows(value, seen, limits)}
    order = [*model.graph.inputs, *model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    for value in order:
        if value not in found or (value.const_value is not None and value.name in judged):
            continue
        seen, node = found[value], value.producer()
        (spec,) = describe_values([value])
        module = "" if node is None else find_scope(node)
        headroom = None if seen.magnitude == 0 else limits.largest / seen.magnitude
        culprits = [] if node is None else [each for each in node.inputs if each is not None and each in over]
        verdict: Verdict = "fits"
        if is_float32_island(module) or (spec.dtype == "float32" and sixteen):
            verdict = "float32"
        elif value in over:
            verdict = "overflow"
        elif seen.nans:
            verdict = "nan"
        elif headroom is not None and headroom < CLOSE:
            verdict = "close"
        kind: Kind = "computed" if node is not None else "weight" if value.const_value is not None else "input"
        yield TensorRange(
            graph=graph,
            name=str(value.name),
            kind=kind,
            dtype=spec.dtype,
            shape=tuple(int(axis) for axis in spec.shape),
            op="" if node is None else node.op_type,
            node="" if node is None else str(node.name),
            module=module,
            low=seen.low if math.isfinite(seen.low) else 0.0,
            high=seen.high if math.isfinite(seen.high) else 0.0,
            magnitude=seen.magnitude,
            headroom=headroom,
            tiny=seen.tiny / max(1, seen.values),
            at="" if kind == "weight" else collection.name_samples(graph, seen.largest_run),
            nans=seen.nans,
            infinities=seen.infinities,
            fills=seen.fills,
            verdict=verdict,
            starts=verdict == "overflow" and all(each.const_value is not None for each in culprits),
            reason=_explain(
                verdict, seen, limits, [str(each.name) for each in culprits], 0 if kind == "weight" else collection.count(graph)
            ),
        )


def _overflows(value: ir.Value, seen: Seen, limits: Format) -> bool:
    """Beyond the limit; or, where the tensor is in the format already, what overflow leaves behind."""
    narrow = value.dtype is not None and value.dtype.name.lower() == limits.name
    return seen.magnitude > limits.largest or (narrow and seen.infinities + seen.nans > 0)


def _explain(verdict: Verdict, seen: Seen, limits: Format, culprits: Sequence[str], runs: int) -> str:
    if verdict == "float32":
        return "stays float32 in a 16-bit export"
    if verdict == "nan":
        return f"holds {seen.nans} NaN before it is narrowed: find out why first, with `sievert check`"
    if verdict == "close":
        return (
            f"reaches {seen.magnitude:.4g}, less than {CLOSE:g} times below {limits.name}'s {limits.largest:.6g}: other data may go beyond"
        )
    if verdict == "fits":
        return ""
    beyond = seen.magnitude > limits.largest
    reached = f"reaches {seen.magnitude:.4g}" if beyond else f"holds {seen.infinities} infinities and {seen.nans} NaN"
    often = f" in {seen.overflowing_runs} of {runs} runs" if runs and beyond else ""
    cause = f"; so does its input {', '.join(culprits)}" if culprits else ""
    return f"{reached}{often}, {limits.name} ends at {limits.largest:.6g}{cause}"
