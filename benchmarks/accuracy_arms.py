"""What `benchmarks/accuracy.py` compares: methods with the options tried for each, and the plans of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.bundle.plan import Option, Plan, Stage, resolve_keep
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.groups import make_cuttings
from sievert.graph_passes.prefill import build_prefill
from sievert.graph_passes.selectors import registry
from sievert.graph_passes.selectors.registry import find_schedule
from sievert.graph_passes.selectors.schedule import EMBEDDINGS, scale_layers

KEEPS: Final = ("50%", "35.3%", "22.2%", "11.1%", "5%")
FEWEST: Final = "2.5%"
"""Asked of the methods that still answer at 5 %, and of the floors."""
TUNED_AT: Final = "11.1%"
EQUAL_TO: Final = "35.3%"
"""The table at equal prefill FLOPs spends what this share costs at the common layer."""

Options = Mapping[str, Option]


@dataclass(frozen=True)
class Method:
    """A selector under test. ``candidates`` are settings that choose differently at the common layer, the paper's first.

    ``few``: it is also asked with :data:`FEWEST` of the tokens. ``seeds``: so many draws, of which the mean is judged.
    """

    name: str
    selector: str
    candidates: tuple[Options, ...] = ({},)
    few: bool = False
    seeds: int = 1

    def layer(self, depth: int) -> int:
        """The common layer, or 0 for what scores embeddings or the vision encoder's attention."""
        return 0 if find_schedule(self.selector, self.candidates[0]) == EMBEDDINGS else common_layer(depth)

    @property
    def cuts_anywhere(self) -> bool:
        """Whether it may cut before any layer that has one before it."""
        return self.layer(28) > 0


_QUERIES: Final[tuple[Options, ...]] = ({"queries": "mean"}, {"queries": "class_token"})
METHODS: Final[tuple[Method, ...]] = (
    Method("IWP", "iwp", ({}, {"strength": 1.0}, {"strength": 10.0}, {"growth": 1}), few=True),
    Method("IWP, softmax per head", "iwp", ({"head_norm": "softmax"},), few=True),
    Method("magnitude only", "magnitude", ({}, {"head_norm": "softmax"}, {"text": "all"}, {"magnitude_rotary": True}), few=True),
    Method("TransPrune", "transprune", ({}, {"weights": "image"})),
    Method("FastV", "fastv"),
    Method("PyramidDrop", "pyramiddrop"),
    Method("SparseVLM", "sparsevlm", ({}, {"text": "all"})),
    Method("DART", "dart"),
    Method("DART, embeddings", "dart", ({"on": "embeddings"},)),
    Method("DivPrune", "divprune"),
    Method("CDPruner", "cdpruner", ({}, {"text": "all"})),
    Method("VisionZip", "visionzip", tuple(reversed(_QUERIES))),
    Method("FoPru", "fopru", _QUERIES),
    Method("FoPru, rows", "fopru", tuple({"strategy": "row", **queries} for queries in _QUERIES)),
    Method("random", "random", few=True, seeds=3),
    Method("uniform stride", "uniform", few=True),
)
SCHEDULED: Final = ("TransPrune", "PyramidDrop", "SparseVLM")
OVER_LAYERS: Final = ("IWP", "magnitude only", "FastV", "random")
AT_EQUAL_FLOPS: Final = (*OVER_LAYERS, "PyramidDrop", "DART", "DART, embeddings", "DivPrune", "CDPruner", "VisionZip", "FoPru")


@dataclass(frozen=True)
class Arm:
    """One variant under test. ``method`` is empty for the unpruned model; arms of one ``group`` are draws of the same plan."""

    name: str
    group: str
    method: str
    keep: str
    plan: Plan

    @property
    def layer(self) -> str:
        """Where it cuts, in words."""
        return ", ".join(str(stage.layer) for stage in self.plan.stages)

    @property
    def kept(self) -> str:
        """How many tokens each of its cuts leaves."""
        return ", ".join(str(stage.keep) for stage in self.plan.stages)


FULL: Final = Arm("full", "full", "", "100%", Plan())


def common_layer(depth: int) -> int:
    """The layer all methods that can choose cut before: the IWP paper's 4 of 28."""
    return scale_layers((4,), 28, depth)[0]


def make_stage(selector: str, options: Options, layer: int, keep: str, geometry: Geometry) -> Stage:
    """One cut; a share becomes the count that this selector really keeps."""
    defaults = registry.options(selector)
    given = {key: value for key, value in options.items() if value != defaults[key]}
    keep_count = registry.make(selector, given).resolve_keep(keep, geometry)
    return Stage(selector=selector, layer=layer, keep=keep_count, requested=keep, options=given)


def _draw(
    group: str,
    method: Method,
    options: Options,
    keep: str,
    cuts: Sequence[tuple[int, str]],
    plan: Plan,
    model: Geometry,
    *,
    draws: bool = False,
) -> list[Arm]:
    """An arm, or with ``draws`` one for each seed; ``plan`` says the positions, ``cuts`` are ``(layer, keep)``."""
    arms = []
    for seed in range(method.seeds if draws else 1):
        chosen = {**options, "seed": seed} if seed else options
        stages = tuple(make_stage(method.selector, chosen, layer, each, model) for layer, each in cuts)
        name = f"{group}-s{seed}" if seed else group
        arms.append(Arm(name, group, method.name, keep, plan.model_copy(update={"stages": stages})))
    return arms


def keep_arms(model: Geometry, tuned: Mapping[str, Options]) -> list[Arm]:
    """Every method at every share, at the common layer or, where it cannot choose, before layer 0. The unpruned model leads."""
    arms = [FULL]
    for number, method in enumerate(METHODS):
        for place, keep in enumerate((*KEEPS, FEWEST) if method.few else KEEPS):
            cuts = [(method.layer(model.depth), keep)]
            arms += _draw(f"k{number}-{place}", method, tuned[method.name], keep, cuts, Plan(), model, draws=True)
    return arms


def tuning_arms(model: Geometry) -> list[Arm]:
    """Every candidate of the methods that have several."""
    arms = [FULL]
    for number, method in enumerate(METHODS):
        for place, options in enumerate(method.candidates if len(method.candidates) > 1 else ()):
            arms += _draw(f"t{number}-{place}", method, options, TUNED_AT, [(method.layer(model.depth), TUNED_AT)], Plan(), model)
    return arms


def layer_arms(model: Geometry, tuned: Mapping[str, Options]) -> list[Arm]:
    """Some methods before each layer, at two shares."""
    arms = [FULL]
    for method in (method for method in METHODS if method.name in OVER_LAYERS):
        for layer in range(_first_layer(method), model.depth):
            for place, keep in enumerate((TUNED_AT, FEWEST)):
                arms += _draw(f"l{layer}-{method.selector}-{place}", method, tuned[method.name], keep, [(layer, keep)], Plan(), model)
    return arms


def _first_layer(method: Method) -> int:
    """1 for what reads the layer before its cut."""
    return 1 if method.selector in ("fastv", "dart") and method.cuts_anywhere else 0


class Budget:
    """Plans of equal prefill FLOPs, the selectors' own left out: counted on graphs whose selector computes nothing."""

    def __init__(self, dynamic: Mapping[str, ir.Model], model: Geometry, profile: Profile) -> None:
        self._decoder, self._model, self._profile = find_decoder(dynamic["decoder"]), model, profile
        self._counted: dict[tuple[tuple[int, int], ...], int] = {}
        self.target = self.count([(common_layer(model.depth), resolve_keep(EQUAL_TO, model.visual_tokens))])

    def count(self, cuts: Sequence[tuple[int, int]]) -> int:
        """Prefill FLOPs of cuts ``(layer, keep)``."""
        key = tuple(cuts)
        if key not in self._counted:
            stages = tuple(Stage(selector="uniform", layer=layer, keep=keep, requested=str(keep)) for layer, keep in cuts)
            plan = Plan(stages=stages)
            graph = build_prefill(
                self._decoder,
                self._profile,
                plan,
                make_cuttings(plan, self._profile, self._model),
                self._model.grid or (1, self._model.visual_tokens),
            )
            self._counted[key] = count_flops(FixShapes()(graph).model)
        return self._counted[key]

    def scale_cuts(self, layers: Sequence[int], shares: Sequence[float]) -> list[tuple[int, int]] | None:
        """The cuts before ``layers``, keeping in these proportions, that come nearest to the target from below; None if none do."""

        def cuts(first: int) -> list[tuple[int, int]]:
            return [(layer, max(1, round(first * share / shares[0]))) for layer, share in zip(layers, shares, strict=True)]

        low, high = 0, self._model.visual_tokens
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(cuts(middle)) <= self.target else (low, middle - 1)
        return cuts(low) if low else None

    def arms(self, tuned: Mapping[str, Options]) -> list[Arm]:
        """The methods before every layer the target allows, and the papers' own schedules, positions included, scaled to it."""
        arms, depth = [FULL], self._model.depth
        for layer in range(depth):
            cuts = self.scale_cuts([layer], [1.0])
            for method in (method for method in METHODS if method.name in AT_EQUAL_FLOPS and cuts is not None):
                if layer >= _first_layer(method) and (layer == 0 or method.cuts_anywhere):
                    arms += self._draw(f"e{layer}-{len(arms)}", method, tuned, cuts or [], Plan())
        for method in (method for method in METHODS if method.name in SCHEDULED):
            schedule = find_schedule(method.selector, tuned[method.name])
            cuts = self.scale_cuts(scale_layers(schedule.layers, schedule.depth, depth), schedule.shares)
            if cuts is not None:
                arms += self._draw(f"e-{method.selector}", method, tuned, cuts, Plan(positions=schedule.positions))
        return arms

    def _draw(self, group: str, method: Method, tuned: Mapping[str, Options], cuts: Sequence[tuple[int, int]], plan: Plan) -> list[Arm]:
        return _draw(group, method, tuned[method.name], "equal FLOPs", [(layer, str(keep)) for layer, keep in cuts], plan, self._model)
