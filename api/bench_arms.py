"""What ``sievert bench`` runs against what: the variants of one or two bundles, their bounds, and the parts of prefill."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sievert.bundle.errors import InputError, VariantError
from sievert.bundle.files import sha256_bytes
from sievert.bundle.names import FULL, MANIFEST
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.run.base import ModelFile, Runtime
from sievert.inspecting import measure_caches

_PROFILE_RUNS = 5


@dataclass(frozen=True)
class Machine:
    """Where the numbers come from."""

    processor: str
    cores: int
    memory_gib: float
    gpu: str
    onnxruntime: str


@dataclass(frozen=True)
class Reference:
    """What ratios are over: ``variant`` of ``bundle``, or, where that is empty, the variant of the same name there."""

    bundle: Bundle
    variant: str


@dataclass(frozen=True, eq=False)
class Arm:
    """A variant to be measured. ``name`` says which, with its bundle where there are two."""

    bundle: Bundle
    variant: str
    name: str

    @property
    def profile(self) -> Profile:
        """Its sizes."""
        return self.bundle.variant(self.variant).profile

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values of the decode batch."""
        return measure_caches(self.bundle.manifest, self.variant).decode_bytes

    @property
    def pictures(self) -> int:
        """How often the vision encoder runs for a batch: once, or once a picture where its graph takes one."""
        (pixels,) = self.bundle.graph("vision_encoder", variant=self.variant).inputs
        alone = (1, *self.bundle.manifest.geometry.picture_shape)
        return self.profile.batch * self.profile.images if tuple(pixels.shape) == alone else 1

    def against(self, reference: Reference | None, arms: Sequence[Arm]) -> Arm | None:
        """The arm this one is compared with, if there is one."""
        if reference is None:
            return None
        wanted = (reference.bundle.path, reference.variant or self.variant)
        return next((arm for arm in arms if (arm.bundle.path, arm.variant) == wanted), None)


def find_reference(bundle: Bundle, against: str) -> Reference | None:
    """What ``against`` names: a variant, another bundle's folder, or (empty) the unpruned variant, None where there is none.

    Raises:
        VariantError: it names neither.
        InputError: a bundle of another model.
        BundleError: the other bundle is not what its manifest says.
    """
    if not against:
        return Reference(bundle, FULL) if FULL in bundle.manifest.variants else None
    if against in bundle.manifest.variants:
        return Reference(bundle, against)
    if not (Path(against) / MANIFEST).is_file():
        raise VariantError(
            f"--against {against}: no variant of this bundle ({', '.join(sorted(bundle.manifest.variants))}) and no bundle's folder"
        )
    other = Bundle.open(against)
    ours, theirs = (each.manifest.geometry.model_dump() for each in (bundle, other))
    if different := [field for field in ours if ours[field] != theirs[field]]:
        shown = ", ".join(f"{field} {ours[field]} and {theirs[field]}" for field in different[:3])
        raise InputError(f"--against {against} is a bundle of another model ({shown}): compare bundles of the same one")
    return Reference(other, "")


def choose_arms(bundle: Bundle, variants: Sequence[str], reference: Reference | None) -> list[Arm]:
    """The variants asked for (all, if none is), and what they are compared with, which comes first.

    Raises:
        VariantError: one of them does not exist, or the other bundle has none of that name.
        InputError: two that are compared read or write another number of prompts at a time.
    """
    names = list(dict.fromkeys(variants or sorted(bundle.manifest.variants, key=lambda name: (name != FULL, name))))
    arms = [Arm(bundle, name, name) for name in names]
    if reference is not None and reference.bundle.path != bundle.path:
        for name in names:
            if name not in reference.bundle.manifest.variants:
                known = ", ".join(sorted(reference.bundle.manifest.variants))
                raise VariantError(f"the bundle to compare with has no variant {name!r} (it has {known}): choose one both have, --variant")
        arms = [*(Arm(reference.bundle, name, f"{name} of {reference.bundle.path.name}") for name in names), *arms]
    elif reference is not None:
        arms = [Arm(bundle, reference.variant, reference.variant), *(arm for arm in arms if arm.variant != reference.variant)]
    for arm in arms:
        arm.bundle.variant(arm.variant)
        other = arm.against(reference, arms)
        for field in ("batch", "decode_batch", "images"):
            if other is not None and (ours := getattr(arm.profile, field)) != (theirs := getattr(other.profile, field)):
                raise InputError(
                    f"{arm.name} has {field}={ours}, but {other.name}, which it is compared with, {theirs}: choose others with --variant "
                    "and --against"
                )
    return arms


def load_bound(arm: Arm, runtime: Runtime) -> ModelFile | None:
    """The bound of a pruned variant, as its own prefill would be handed to the runtime; None where there is none, or nothing to run it.

    A variant of another precision has none: its bound would have to be quantised as it is.

    Raises:
        PlanError, GraphError: as for the variant itself.
    """
    variant = arm.bundle.variant(arm.variant)
    if not variant.plan.stages or variant.precision is not None or not runtime.reads_onnx:
        return None
    import onnx_ir as ir

    from sievert.graph_passes.bound import build_bound
    from sievert.graph_passes.expose import to_bytes
    from sievert.graph_passes.lower import lower

    decoder = ir.load(arm.bundle.graph_file("decoder"))
    bound = build_bound(decoder, arm.bundle.manifest.geometry, variant.plan, variant.profile)
    content = to_bytes(lower(bound, "onnxruntime") if "onnxruntime" in variant.engines else bound)
    return ModelFile(arm.bundle.path / f"{arm.variant}.bound.onnx", sha256_bytes(content), content)


def time_parts(arm: Arm, model: ModelFile, *, low_memory: bool = False) -> dict[str, float]:
    """Milliseconds of each layer, selector and the head in one prefill, by ONNX Runtime's profiler; in the order in which they begin."""
    import onnx_ir as ir

    from sievert.engines.run.ort import OnnxRuntime
    from sievert.engines.run.ort_profile import profile_graph
    from sievert.graph_passes.parts import find_part, name_parts

    parts = name_parts(ir.load(model.path), arm.bundle.variant(arm.variant).plan)
    spent: dict[str, float] = {}
    for node in profile_graph(OnnxRuntime(prepack=not low_memory), model, arm.bundle.manifest.geometry, arm.profile, runs=_PROFILE_RUNS):
        part = find_part(parts, node.node)
        spent[part] = spent.get(part, 0.0) + node.ms
    return spent


def describe_machine() -> Machine:
    """The machine this runs on."""
    from sievert.diagnosing import doctor

    found = doctor()
    return Machine(_processor(), found.cores, round(found.memory_gib, 1), found.gpu, found.packages.get("onnxruntime", ""))


def _processor() -> str:
    """The processor's name as the system gives it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not on every system
        lines = []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
