"""The bound of a pruned prefill: the same front and tail with the kept tokens given, so that nothing is selected.

What a variant takes beyond its bound is the price of selecting. A bound answers nothing by itself and is in no registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.graph_passes.causal import read_sights
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.groups import Cutting, Group, make_cuttings
from sievert.graph_passes.prefill import build_prefill
from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs
from sievert.graph_passes.selectors.options import number


@dataclass(frozen=True)
class _Given(Selector):
    """Keeps the tokens whose places ``given_index.{stage}[B, K]`` says, an input of the graph."""

    stage: int = number(0, at_least=0)

    name: ClassVar[str] = "given"

    def select(self, build: GraphBuilder, inputs: StageInputs) -> Selection:
        """The input as the order; scores of zero, which nothing reads."""
        g = inputs.geometry
        order = build.input(f"given_index.{self.stage}", ir.DataType.INT64, [g.batch, g.keep])
        return Selection(order, build.op.Expand(0.0, [g.batch, g.visual]), {})

    def largest_topk(self, visual: int, keep: int) -> int:  # noqa: ARG002 (it ranks nothing)
        """None."""
        return 0


def build_bound(decoder: ir.Model, geometry: Geometry, plan: Plan, profile: Profile) -> ir.Model:
    """Static prefill of ``plan`` that takes ``given_index.{s}[B, K_s]`` (int64, places among the stage's visual tokens) for each stage.

    ``decoder`` is the dynamic decoder of the bundle. Otherwise the graph takes and gives what the variant's prefill does, without
    ``visual_scores``.

    Raises:
        PlanError, GraphError: as for the variant itself.
    """
    cuttings = []
    for stage, cutting in enumerate(make_cuttings(plan, profile, geometry)):
        whole = Group(0, sum(group.visual for group in cutting.groups), cutting.keep, 0, profile.visual_tokens)
        cuttings.append(Cutting(_Given(stage), cutting.layer, (whole,)))
    grid = geometry.grid or (1, geometry.visual_tokens)
    found = find_decoder(decoder)
    sights = read_sights(found, profile.capacity(), two_way=geometry.two_way, prompt=profile.sequence, images=profile.image_tokens)
    prefill = build_prefill(
        found, profile, plan, cuttings, grid, planes=geometry.visual_planes, sights=sights, first_position=geometry.first_position
    )
    return FixShapes()(prefill).model
