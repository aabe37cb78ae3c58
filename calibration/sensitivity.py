"""What quantising one layer at a time does to the answers, on calibration data."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir

from sievert.bundle.errors import CalibrationError
from sievert.bundle.files import sha256_bytes
from sievert.calibration.collection import Collection
from sievert.calibration.quantise import Recipe, choose_weights, measure_scales, quantise_models, require_plain
from sievert.engines.run.base import ModelFile, Session
from sievert.engines.run.dtypes import Array
from sievert.engines.run.registry import find_runtime
from sievert.graph_passes.expose import to_bytes
from sievert.graph_passes.quantise import Linear, find_linears
from sievert.parity.effects import divergence

_LAYER: Final = re.compile(r"(.*?\blayers\.\d+)\.")
_CHAIN: Final = ("vision_encoder", "embed_tokens", "prefill")
_FORMAT: Final = 1
DEFAULT_SAMPLES: Final = 32
"""Each is run once for every unit."""


@dataclass(frozen=True)
class Unit:
    """A layer, another module, or a whole graph, quantised alone. ``divergence`` is the mean KL of the first token's probabilities from
    those without quantisation, in nats, ``worst`` its largest; ``kept_overlap`` the mean share of kept tokens that stay (1 where none are
    dropped); ``changed`` the share of first tokens that become others.
    """

    name: str
    weights: int
    divergence: float
    worst: float
    kept_overlap: float
    changed: float


@dataclass(frozen=True)
class Sensitivity:
    """All units, what loses most first; ``graphs`` are whole ones, and ``everything`` all of it together."""

    variant: str
    format: str
    calibration: str
    samples: int
    random: bool
    units: tuple[Unit, ...]
    graphs: tuple[Unit, ...]
    everything: Unit

    def to_json(self) -> dict[str, Any]:
        """Plain values only, as :func:`read_worst` takes them."""
        return {"sievert_sensitivity": _FORMAT, **asdict(self)}


def measure_sensitivity(
    collection: Collection,
    variant: str,
    recipe: Recipe,
    *,
    samples: int = DEFAULT_SAMPLES,
    random: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Sensitivity:
    """Quantise one unit of ``variant`` at a time, in memory, and compare its prefill with the unquantised one on all the data.

    A unit is a layer of the vision encoder or decoder, or another module with weights. The chain runs from the pixels, so that what the
    vision encoder loses reaches the logits. Scales come from all the data, losses from its first ``samples`` (whole batches).

    Raises:
        VariantError: no such variant, or a quantised one.
        CalibrationError: data of another variant, or random data without ``random``.
        EngineError: ONNX Runtime refused a graph.
    """
    bundle = collection.bundle
    entry = require_plain(bundle, variant)
    collection.require_use(variant, random=random)
    models = {graph: ir.load(bundle.graph_file(graph, variant=variant)) for graph in entry.graphs}
    chosen, _ = choose_weights(models, recipe)
    scales, _ = measure_scales(models, chosen, recipe, collection if recipe.format.activations else None, progress=progress)
    runs = max(1, min(collection.count("prefill"), -(-samples // bundle.variant(variant).profile.batch)))
    chain = _Chain(collection, {graph: models[graph] for graph in _CHAIN}, runs)
    progress("running without quantisation")
    before = chain.run({})

    def judge(name: str, weights: Mapping[str, Linear]) -> Unit:
        made = quantise_models(chain.models, weights, scales, recipe)
        touched = {graph: model for graph, model in made.items() if any(each.name in weights for each in find_linears(chain.models[graph]))}
        return _compare(name, len(weights), before, chain.run(touched, float8=recipe.format.name == "fp8"))

    groups: dict[str, dict[str, Linear]] = {}
    for name, linear in chosen.items():
        groups.setdefault(name_unit(name), {})[name] = linear
    units = []
    for number, (name, weights) in enumerate(groups.items(), 1):
        progress(f"{name}: {number} of {len(groups)}")
        units.append(judge(name, weights))
    graphs = []
    for graph in _CHAIN:
        inside = {each.name: chosen[each.name] for each in find_linears(models[graph]) if each.name in chosen}
        if inside:
            progress(f"all of {graph}")
            graphs.append(judge(graph, inside))
    progress("all together")
    return Sensitivity(
        variant=variant,
        format=recipe.format.name,
        calibration=recipe.calibration,
        samples=len(before.logits),
        random=collection.random,
        units=tuple(sorted(units, key=lambda unit: -unit.divergence)),
        graphs=tuple(graphs),
        everything=judge("everything", chosen),
    )


def name_unit(weight: str) -> str:
    """The layer that a weight is of, or else its module."""
    match = _LAYER.match(weight)
    return match[1] if match else weight.partition(".weight")[0]


def read_worst(path: Path, count: int, form: str) -> dict[str, str]:
    """The ``count`` units that lose most, as :class:`~sievert.calibration.quantise.Recipe` keeps them: part of a name, and the reason.

    Raises:
        CalibrationError: no such report, one of another format, or fewer units.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found = [(str(unit["name"]), float(unit["divergence"])) for unit in raw["units"]]
        of = str(raw["format"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CalibrationError(f"{path} is no report of `sievert sensitivity --json` ({error}): make one") from error
    if of != form:
        raise CalibrationError(f"{path} measured {of}, not {form}: run `sievert sensitivity --format {form}`")
    if not 1 <= count <= len(found):
        raise CalibrationError(f"{count} of the units of {path}: it has {len(found)}, choose 1..{len(found)}")
    return {f"{name}.": f"among the {count} that lose most (KL {loss:.2g} alone)" for name, loss in found[:count]}


@dataclass
class _Result:
    logits: list[Array]
    kept: list[list[Array]]


class _Chain:
    """A variant from pixels to first logits on all the data, with some graphs replaced. Graphs that stay are loaded and run once."""

    def __init__(self, collection: Collection, models: Mapping[str, ir.Model], runs: int) -> None:
        self.models = models
        self._runs = runs
        self._collection = collection
        self._plain = {graph: self._load(graph, to_bytes(model)) for graph, model in models.items()}

    def _load(self, graph: str, content: bytes, *, float8: bool = False) -> Session:
        path = self._collection.bundle.path / f"{graph}.onnx"  # nothing is there: it says where the weights are
        return find_runtime("onnxruntime").load(ModelFile(path, sha256_bytes(content), content, float8=float8))

    def run(self, replaced: Mapping[str, ir.Model], *, float8: bool = False) -> _Result:
        sessions = dict(self._plain)
        sessions |= {graph: self._load(graph, to_bytes(model), float8=float8) for graph, model in replaced.items()}
        found = _Result([], [])
        for run in range(self._runs):
            feed = self._collection.feed("prefill", run)
            if "vision_encoder" in replaced:
                feed |= self._embed(sessions, run, feed)
            wanted = [spec.name for spec in sessions["prefill"].outputs if not spec.name.startswith("present.")]
            outputs = sessions["prefill"].run(feed, wanted)
            rows = [row for row, sample in enumerate(self._collection.info.graphs["prefill"].feeds[run].samples) if sample is not None]
            found.logits += [outputs["logits"][row] for row in rows]
            kept = [outputs[name] for name in wanted if name.startswith("kept_index.")]
            found.kept += [[index[row] for index in kept] for row in rows]
        return found

    def _embed(self, sessions: Mapping[str, Session], run: int, feed: Mapping[str, Array]) -> dict[str, Array]:
        seen = sessions["vision_encoder"].run(self._collection.feed("vision_encoder", run))
        embed = self._collection.feed("embed_tokens", run) | {"image_features": seen["image_features"]}
        others = {name: array for name, array in seen.items() if name in feed}  # scores, planes
        return {**others, "inputs_embeds": sessions["embed_tokens"].run(embed)["inputs_embeds"]}


def _compare(name: str, weights: int, before: _Result, after: _Result) -> Unit:
    losses = [divergence(one, other) for one, other in zip(before.logits, after.logits, strict=True)]
    overlaps = [
        len(np.intersect1d(one, other)) / len(one)
        for pair in zip(before.kept, after.kept, strict=True)
        for one, other in zip(*pair, strict=True)
    ]
    changed = [int(one.argmax()) != int(other.argmax()) for one, other in zip(before.logits, after.logits, strict=True)]
    return Unit(name, weights, float(np.mean(losses)), max(losses), float(np.mean(overlaps)) if overlaps else 1.0, float(np.mean(changed)))
