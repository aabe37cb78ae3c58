"""The reference work of the performance benchmark: Qwen2-0.5B's decoder shape behind a tiny vision tower, random weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import onnx_ir as ir

import sievert
from sievert.bundle.files import sha256_bytes
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.engines.build.builders import find_builder
from sievert.engines.build.process import build_engine
from sievert.engines.run.alone import Alone
from sievert.engines.run.base import ModelFile, Runtime
from sievert.engines.run.files import find_model
from sievert.engines.run.ort import OnnxRuntime
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.lower import lower
from tests.tiny_llava import make_tiny_llava

VISUAL: Final = 576
TEXT: Final = 40
NEW: Final = 64
LAYER: Final = 4
KEEPS: Final = ("35.3%", "22.2%", "11.1%")
RUNTIME_NAME: Final = "onnxruntime"


@dataclass(frozen=True)
class Reference:
    """The checkpoint and its bundle: ``full`` and one pruned variant for each of ``KEEPS``."""

    checkpoint: Path
    bundle: Bundle
    runtime: Runtime

    @property
    def profile(self) -> Profile:
        """The sizes of every variant."""
        return self.bundle.variant("full").profile

    def load(self, variant: str, graph: str) -> Alone:
        """A graph as ``sievert run`` would load it."""
        return self._alone(find_model(self.bundle, variant, graph, self.runtime, ""), self.profile)

    def load_model(self, model: ir.Model, name: str, profile: Profile) -> Alone:
        """A graph that is no variant's, lowered for the runtime, and built where it runs engines; its weights are the bundle's."""
        builder = find_builder(self.runtime.name)
        content = to_bytes(lower(model, builder.target))
        path = self.bundle.path / f"{name}.onnx"
        if builder.module is None:
            return self._alone(ModelFile(path, sha256_bytes(content), content), profile)
        engine = path.with_suffix(".engine")
        try:
            path.write_bytes(content)
            build_engine(builder.module, path, engine)
            return self._alone(ModelFile(engine, sha256_bytes(engine.read_bytes())), profile)
        finally:  # each engine holds the weights
            path.unlink(missing_ok=True)
            engine.unlink(missing_ok=True)

    def _alone(self, file: ModelFile, profile: Profile) -> Alone:
        return Alone(self.runtime.load(file), self.bundle.manifest.geometry, profile)

    @property
    def layer(self) -> int:
        """The layer that is cut before."""
        return self.bundle.variant(name_of(KEEPS[0])).plan.stages[0].layer

    def dynamic(self, graph: str) -> ir.Model:
        """A dynamic graph that variants are made from."""
        return ir.load(self.bundle.graph_file(graph))

    def graph(self, variant: str, graph: str) -> ir.Model:
        """The static graph of a variant, before it is lowered."""
        return ir.load(self.bundle.graph_file(graph, variant=variant))


def name_of(keep: str) -> str:
    """The variant that keeps this share."""
    return f"iwp-{keep.rstrip('%').replace('.', '_')}"


def plan_for(visual: int, keep: str, layer: int) -> Plan:
    """The plan of the pruned variants for another number of visual tokens."""
    count = int(float(keep.rstrip("%")) / 100 * visual + 0.5)
    return Plan(stages=(Stage(selector="iwp", layer=layer, keep=count, requested=keep),))


def make_reference(folder: Path, *, layers: int, vocabulary: int, threads: int, kv_heads: int = 2) -> Reference:
    """Make the checkpoint, export it and prune it, all through the public functions. ``kv_heads`` 14 is the multi-head shape."""
    checkpoint = folder / "checkpoint"
    make_tiny_llava(
        checkpoint,
        decoder="qwen2",
        layers=layers,
        heads=14,
        kv_heads=kv_heads,
        head_size=64,
        width=896,
        image_size=336,
        patch=14,
        vocabulary=vocabulary,
        max_positions=32768,
        tied=True,
        text={"intermediate_size": 4864, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    )
    bundle = folder / "bundle"
    make_variants(checkpoint, bundle, layers=layers)
    sievert.build(bundle, engines=[RUNTIME_NAME])
    return Reference(checkpoint, Bundle.open(bundle), OnnxRuntime(threads=threads))


def make_variants(checkpoint: Path, bundle: Path, *, layers: int, dtype: Literal["float32", "float16"] = "float32") -> None:
    """``full`` and one pruned variant for each of ``KEEPS``, without engines."""
    sievert.export(checkpoint, bundle, cuts=(), dtype=dtype, max_text=TEXT, max_new_tokens=NEW, force=bundle.exists())
    for keep in KEEPS:
        sievert.prune(bundle, cuts=(sievert.Cut(layer=min(LAYER, layers - 1), keep=keep),), name=name_of(keep))
