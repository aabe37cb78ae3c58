"""What `benchmarks/accuracy.py` compares: methods with the options tried for each, and the plans of its tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.bundle.plan import Option, Plan, Stage, resolve_keep
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.graph_passes.flops import count_flops
from sievert.graph_passes.selectors.registry import SELECTORS
from sievert.graph_passes.selectors.schedule import EMBEDDINGS, scale_layers
from sievert.graph_passes.variant import make_variant

KEEPS: Final = ("50%", "35.3%", "22.2%", "11.1%", "5%")
FEWEST: Final = "2.5%"
"""Asked of the methods that still answer at 5 %, and of the floors."""
TUNED_AT: Final = "11.1%"
EQUAL_TO: Final = "35.3%"
"""The table at equal prefill FLOPs spends what this share costs at the common layer."""

Options = Mapping[str, Option]


@dataclass(frozen=True)
class Method:
    """A selector under test. ``candidates`` are the settings tried on training questions, at most four for any method.

    ``few``: it is also asked with :data:`FEWEST` of the tokens.
    """

    name: str
    selector: str
    candidates: tuple[Options, ...] = ({},)
    few: bool = False

    @property
    def fixed_layer(self) -> int | None:
        """0 for what scores embeddings or the vision encoder's attention, None for what cuts anywhere."""
        on_embeddings = any(options.get("on") == "embeddings" for options in self.candidates)
        return 0 if on_embeddings or SELECTORS[self.selector].schedule == EMBEDDINGS else None


_TEXT: Final[tuple[Options, ...]] = ({"text": "after_image"}, {"text": "all"})
_QUERIES: Final = ("mean", "class_token")
_STRENGTHS: Final[tuple[Options, ...]] = ({}, {"strength": 1.0}, {"strength": 10.0}, {"growth": 1})
METHODS: Final[tuple[Method, ...]] = (
    Method("IWP, one maximum", "iwp", tuple({"head_norm": "global", **more} for more in _STRENGTHS), few=True),
    Method("IWP, softmax per head", "iwp", tuple({"head_norm": "softmax", **more} for more in _STRENGTHS), few=True),
    Method("magnitude only", "magnitude", ({}, {"head_norm": "softmax"}, {"text": "all"}, {"magnitude_rotary": True}), few=True),
    Method("TransPrune", "transprune", tuple({"weights": weights, **text} for weights in ("sequence", "image") for text in _TEXT)),
    Method("FastV", "fastv"),
    Method("PyramidDrop", "pyramiddrop"),
    Method("SparseVLM", "sparsevlm", _TEXT),
    Method("DART", "dart", _TEXT),
    Method("DART, embeddings", "dart", tuple({"on": "embeddings", **text} for text in _TEXT)),
    Method("DivPrune", "divprune"),
    Method("CDPruner", "cdpruner", _TEXT),
    Method("VisionZip", "visionzip", tuple({"queries": queries} for queries in ("class_token", "mean"))),
    Method("FoPru", "fopru", tuple({"strategy": strategy, "queries": queries} for strategy in ("rank", "row") for queries in _QUERIES)),
    Method("random", "random", few=True),
    Method("uniform stride", "uniform", few=True),
)
SCHEDULED: Final = ("TransPrune", "PyramidDrop", "SparseVLM")
OVER_LAYERS: Final = ("IWP, one maximum", "magnitude only", "FastV", "PyramidDrop", "DART", "random")


@dataclass(frozen=True)
class Arm:
    """One variant under test. ``table`` says which table it belongs to, ``method`` is empty for the unpruned model."""

    name: str
    table: str
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


def common_layer(depth: int) -> int:
    """The layer all methods that can choose cut before: the IWP paper's 4 of 28."""
    return scale_layers((4,), 28, depth)[0]


def make_stage(selector: str, options: Options, layer: int, keep: str, geometry: Geometry) -> Stage:
    """One cut; a share becomes the count that this selector really keeps."""
    factory = SELECTORS[selector].factory(**options)
    return Stage(selector=selector, layer=layer, keep=factory.resolve_keep(keep, geometry), requested=keep, options=dict(options))


def keep_arms(geometry: Geometry, tuned: Mapping[str, Options]) -> list[Arm]:
    """Every method at every share, at the common layer or, where it cannot choose, before layer 0. The unpruned model leads."""
    arms = [Arm("full", "keep", "", "100%", Plan())]
    for number, method in enumerate(METHODS):
        layer = common_layer(geometry.depth) if method.fixed_layer is None else method.fixed_layer
        for place, keep in enumerate((*KEEPS, FEWEST) if method.few else KEEPS):
            stage = make_stage(method.selector, tuned[method.name], layer, keep, geometry)
            arms.append(Arm(f"k{number}-{place}", "keep", method.name, keep, Plan(stages=(stage,))))
    return arms


def tuning_arms(geometry: Geometry) -> list[Arm]:
    """Every candidate of the methods that have several."""
    arms = [Arm("full", "tune", "", "100%", Plan())]
    for number, method in enumerate(METHODS):
        layer = common_layer(geometry.depth) if method.fixed_layer is None else method.fixed_layer
        if len(method.candidates) > 1:
            for place, options in enumerate(method.candidates):
                stage = make_stage(method.selector, options, layer, TUNED_AT, geometry)
                arms.append(Arm(f"t{number}-{place}", "tune", method.name, TUNED_AT, Plan(stages=(stage,))))
    return arms


def layer_arms(geometry: Geometry, tuned: Mapping[str, Options], layers: Sequence[int]) -> list[Arm]:
    """The methods that cut anywhere, before each layer at two shares."""
    arms = []
    for method in METHODS:
        if method.name in OVER_LAYERS:
            first = 1 if method.selector in ("fastv", "dart") else 0
            for layer in (layer for layer in layers if layer >= first):
                for keep in (TUNED_AT, FEWEST):
                    stage = make_stage(method.selector, tuned[method.name], layer, keep, geometry)
                    name = f"l{layer}-{method.selector}-{keep.strip('%').replace('.', '_')}"
                    arms.append(Arm(name, "layer", method.name, keep, Plan(stages=(stage,))))
    return arms


class Budget:
    """Plans of equal prefill FLOPs, the selectors' own left out: counted on graphs whose selector computes nothing."""

    def __init__(self, dynamic: Mapping[str, ir.Model], geometry: Geometry, profile: Profile) -> None:
        self._dynamic, self._geometry, self._profile = dynamic, geometry, profile
        self._counted: dict[tuple[tuple[int, int], ...], int] = {}
        self.target = self.count([(common_layer(geometry.depth), resolve_keep(EQUAL_TO, geometry.visual_tokens))])

    def count(self, cuts: Sequence[tuple[int, int]]) -> int:
        """Prefill FLOPs of cuts ``(layer, keep)``."""
        key = tuple(cuts)
        if key not in self._counted:
            stages = tuple(Stage(selector="uniform", layer=layer, keep=keep, requested=str(keep)) for layer, keep in cuts)
            graphs = make_variant(self._dynamic, self._geometry, Plan(stages=stages), self._profile)
            self._counted[key] = count_flops(graphs["prefill"])
        return self._counted[key]

    def scale_cuts(self, layers: Sequence[int], shares: Sequence[float]) -> list[tuple[int, int]] | None:
        """The cuts before ``layers``, keeping in these proportions, that come nearest to the target from below; None if none do."""
        visual = self._geometry.visual_tokens

        def cuts(first: int) -> list[tuple[int, int]]:
            return [(layer, max(1, round(first * share / shares[0]))) for layer, share in zip(layers, shares, strict=True)]

        low, high = 0, visual
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.count(cuts(middle)) <= self.target else (low, middle - 1)
        return cuts(low) if low else None

    def arms(self, tuned: Mapping[str, Options]) -> list[Arm]:
        """The methods that cut anywhere before every layer the target allows, and the papers' own schedules scaled to it."""
        arms: list[Arm] = []
        depth = self._geometry.depth
        for layer in range(depth):
            cuts = self.scale_cuts([layer], [1.0])
            for method in METHODS:
                fits = method.fixed_layer == layer or (method.fixed_layer is None and method.name in OVER_LAYERS)
                if cuts is not None and fits and not (layer == 0 and method.selector in ("fastv", "dart") and method.fixed_layer is None):
                    arms.append(self._arm(f"e{layer}-{len(arms)}", method, tuned, cuts))
        for method in METHODS:
            if method.name in SCHEDULED:
                schedule = SELECTORS[method.selector].schedule
                cuts = self.scale_cuts(scale_layers(schedule.layers, schedule.depth, depth), schedule.shares)
                if cuts is not None:
                    arms.append(self._arm(f"e-{method.selector}", method, tuned, cuts))
        return arms

    def _arm(self, name: str, method: Method, tuned: Mapping[str, Options], cuts: Sequence[tuple[int, int]]) -> Arm:
        stages = tuple(make_stage(method.selector, tuned[method.name], layer, str(keep), self._geometry) for layer, keep in cuts)
        return Arm(name, "equal", method.name, "equal FLOPs", Plan(stages=stages))
