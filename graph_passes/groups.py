"""Several images in one prompt: each is ranked by itself, and the images share a stage's budget in proportion to their tokens.

A selector never knows: for each image it is handed that image's tokens as if they were all there are, and everything else of the sequence
as it is. With one image nothing is added to the graph.

Before::

    visual_index[B, Nv] -> selector -> order[B, K], scores[B, Nv]

After::

    visual_index[B, Nv] -+-> image 0 [B, Nv_0] -> selector -> order[B, K_0], scores[B, Nv_0] -+-> order[B, K], scores[B, Nv]
                         +-> image 1 [B, Nv_1] -> selector -> order[B, K_1], scores[B, Nv_1] -+
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.graph_passes.op import Op
from sievert.graph_passes.selectors import registry
from sievert.graph_passes.selectors.base import Selection, Selector, StageInputs


@dataclass(frozen=True)
class Group:
    """One image's tokens at a stage: ``visual`` of the stage's visual tokens from place ``start`` on, of which ``keep`` stay.

    Before any cut the image had ``original`` tokens, the first of which was number ``first`` of the prompt's.
    """

    start: int
    visual: int
    keep: int
    first: int
    original: int


@dataclass(frozen=True)
class Cutting:
    """A stage made concrete: the selector object, and the tokens of every image that enter it and that it leaves."""

    selector: Selector
    layer: int
    groups: tuple[Group, ...]

    @property
    def keep(self) -> int:
        """How many tokens it leaves in all."""
        return sum(group.keep for group in self.groups)


def share_keep(keep: int, tokens: Sequence[int]) -> tuple[int, ...]:
    """``keep`` tokens shared by images of ``tokens`` each, in proportion, by largest remainder; of equal remainders the earlier image's.

    No image gets more than it has.
    """
    total = sum(tokens)
    shares = [keep * count // total for count in tokens]
    by_remainder = sorted(range(len(tokens)), key=lambda image: (-(keep * tokens[image] % total), image))
    for image in by_remainder[: keep - sum(shares)]:
        shares[image] += 1
    return tuple(shares)


def share_stage(selector: Selector, stage: Stage, geometry: Geometry, tokens: Sequence[int]) -> tuple[int, ...]:
    """How many each image keeps of the ``tokens`` of its own that enter a stage.

    Raises:
        PlanError: the selector cannot make the stage for one of the images.
    """
    keeps = share_keep(stage.keep, tokens)
    for image, keep in enumerate(keeps):
        try:
            selector.check(stage.model_copy(update={"keep": keep}), geometry)
        except PlanError as error:
            if len(keeps) == 1:
                raise
            raise PlanError(f"image {image + 1} of {len(keeps)} gets {keep} of the {stage.keep} tokens that are kept: {error}") from error
    return keeps


def make_cuttings(plan: Plan, profile: Profile, geometry: Geometry) -> tuple[Cutting, ...]:
    """The stages of a plan that fits the profile.

    Raises:
        PlanError: a selector cannot make its stage.
    """
    originals = left = profile.image_tokens
    cuttings = []
    for stage in plan.stages:
        selector = registry.make(stage.selector, stage.options)
        keeps = share_stage(selector, stage, geometry, left)
        groups = tuple(
            Group(start=sum(left[:image]), visual=left[image], keep=keeps[image], first=sum(originals[:image]), original=originals[image])
            for image in range(profile.images)
        )
        cuttings.append(Cutting(selector, stage.layer, groups))
        left = keeps
    return tuple(cuttings)


def select_by_image(build: GraphBuilder, cutting: Cutting, inputs: StageInputs) -> Selection:
    """Every image's selection, one after the other: places count on from image to image.

    What a selector carries goes back to the same image at later stages, under ``name/image``.
    """
    if len(cutting.groups) == 1:
        return cutting.selector.select(build, inputs)
    op = build.op
    orders, scores, carried = [], [], dict[str, ir.Value]()
    for image, group in enumerate(cutting.groups):
        build.push_module(f"image.{image}")
        selection = cutting.selector.select(build, _narrow(build, inputs, group, image))
        orders.append(op.Add(selection.order, group.start) if group.start else selection.order)
        scores.append(selection.scores)
        carried |= {f"{name}/{image}": value for name, value in selection.carried.items()}
        build.pop_module()
    return Selection(op.Concat(*orders, axis=1), op.Concat(*scores, axis=1), carried)


def _narrow(build: GraphBuilder, inputs: StageInputs, group: Group, image: int) -> StageInputs:
    """A stage's inputs with the tokens of one image as its only visual tokens."""
    g = inputs.geometry
    op: Op = build.op

    def part(values: ir.Value) -> ir.Value:
        return op.Slice(values, [group.start], [group.start + group.visual], [1])

    original = part(inputs.original_index)
    return replace(
        inputs,
        geometry=replace(g, visual=group.visual, keep=group.keep, original_visual=group.original, other_images=g.visual - group.visual),
        visual_index=part(inputs.visual_index),
        original_index=op.Sub(original, group.first) if group.first else original,
        carried=_carried_by(inputs.carried, image),
        visual_scores=None if inputs.visual_scores is None else part(inputs.visual_scores),
        all_visual_index=inputs.visual_index,
    )


def _carried_by(carried: Mapping[str, ir.Value], image: int) -> dict[str, ir.Value]:
    """What earlier stages left for this image."""
    named = {name: name.rpartition("/") for name in carried}
    return {short: carried[name] for name, (short, _, number) in named.items() if number == str(image)}
