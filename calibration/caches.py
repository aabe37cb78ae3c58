"""Keys and values in 16 bit beside graphs that compute in float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import CalibrationError, VariantError
from sievert.bundle.store import Bundle
from sievert.calibration.collection import Collection
from sievert.calibration.options import PLAIN
from sievert.calibration.ranges import measure_ranges
from sievert.graph_passes.caches import NarrowCaches

KINDS: Final[Mapping[str, ir.DataType]] = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
MEASURED: Final = frozenset({"float16"})
"""Those that values may not fit: bfloat16 has the range of float32."""


@dataclass(frozen=True)
class CacheFormat:
    """``dtype`` of the caches, and those that stay as they are: ``kept`` names them as ``GRAPH/TENSOR``, with the reason."""

    dtype: str
    kept: Mapping[str, str] = field(default_factory=dict)

    @property
    def measured(self) -> bool:
        """Whether data said what fits."""
        return self.dtype in MEASURED

    def narrow(self, model: ir.Model) -> bool:
        """Whether a cache of ``model`` was narrowed."""
        high = {name.partition("/")[2] for name in self.kept}
        # A cache is one thing under two names, and in all graphs.
        high |= {f"past_key_values{name.removeprefix('present')}" for name in high}
        return NarrowCaches(KINDS[self.dtype], frozenset(high))(model).modified


def require_kind(kv: str) -> None:
    """A type that caches may have.

    Raises:
        CalibrationError: another one, with what is wrong about it.
    """
    if kv in KINDS:
        return
    known = " or ".join(KINDS)
    if kv in ("int8", "fp8", "float8e4m3fn", "int4"):
        raise CalibrationError(
            f"kv={kv!r}: TensorRT for RTX refuses to update a cache of 8 bits or fewer (TensorScatter takes 16 and 32 bit floats): "
            f"choose {known}"
        )
    raise CalibrationError(f"kv={kv!r} is no type for caches: choose {known}")


def plan_caches(
    bundle: Bundle,
    base: str,
    kv: str,
    collection: Collection | None,
    *,
    random: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> CacheFormat:
    """The caches of ``base`` in ``kv``; of float16, what the data shows to overflow stays as it is.

    Raises:
        CalibrationError: a type that caches cannot have, no data where it is needed, data of another variant, NaN in it, or nothing that
            could be narrowed.
        VariantError: the bundle is of 16 bit, and its caches are so already.
        EngineUnavailableError, EngineError: ONNX Runtime cannot measure the caches here.
    """
    require_kind(kv)
    if bundle.manifest.source.dtype != PLAIN:
        raise VariantError(f"the bundle is {bundle.manifest.source.dtype}, and so are its caches: kv is for float32 bundles")
    if kv not in MEASURED:
        return CacheFormat(kv)
    if collection is None:
        raise CalibrationError(f"{kv} caches may overflow, which data tells: run `sievert collect` first, or choose bfloat16")
    collection.require_use(base, random=random)
    found = measure_ranges(collection, base, dtype=kv, wanted=lambda name: name.startswith("present."), progress=progress)
    if broken := [each for each in found.tensors if each.verdict == "nan"]:
        raise CalibrationError(f"{broken[0].name} of {broken[0].graph} holds NaN on {broken[0].at}: {broken[0].reason}")
    kept = {f"{each.graph}/{each.name}": each.reason for each in found.keep_float32}
    if len({name.partition("/")[2] for name in kept}) == 2 * bundle.manifest.geometry.depth:
        raise CalibrationError(f"every cache overflows {kv}: choose bfloat16")
    return CacheFormat(kv, kept)
