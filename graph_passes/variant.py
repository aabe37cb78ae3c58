"""The static graphs of one variant, from the dynamic graphs of a bundle: values in, values out, no disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import ProfileError
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry
from sievert.graph_passes.causal import read_sights
from sievert.graph_passes.decode import build_decode
from sievert.graph_passes.decoder import find_decoder
from sievert.graph_passes.finish import FixShapes
from sievert.graph_passes.groups import make_cuttings
from sievert.graph_passes.prefill import build_prefill
from sievert.graph_passes.specialise import merge_images, specialise
from sievert.graph_passes.vision_scores import AddVisionScores

GRAPHS: Final = ("vision_encoder", "embed_tokens", "prefill", "decode")

Progress = Callable[[str], None]


def make_variant(
    dynamic: Mapping[str, ir.Model], geometry: Geometry, plan: Plan, profile: Profile, *, progress: Progress = lambda _: None
) -> dict[str, ir.Model]:
    """Specialise, splice and finish: the four static graphs of the contract, weights still where the dynamic graphs have them.

    An empty plan gives the unpruned baseline. ``progress`` is told each stage's name before it runs.

    Raises:
        PlanError, ProfileError: the plan or profile does not fit the model.
        GraphError: the decoder's structure is not one the passes know, or a layer attends by another rule than those known.
    """
    profile.check(geometry)
    plan.check(geometry, profile.images)
    cuttings = make_cuttings(plan, profile, geometry)
    if profile.images > 1:
        _check_images(dynamic["embed_tokens"])
    progress("reading the decoder")
    decoder = find_decoder(dynamic["decoder"])
    sights = read_sights(decoder, profile.capacity(), two_way=geometry.two_way, prompt=profile.sequence, images=profile.image_tokens)
    batch, length, pictures = profile.batch, profile.sequence_axis, profile.batch * profile.images
    features = (batch, profile.visual_tokens, geometry.width)
    progress("vision_encoder")
    alone = isinstance(_first_axis(dynamic["vision_encoder"]), int)  # it takes one picture, and runs once for each
    shape = (1 if alone else pictures, *geometry.picture_shape)
    graphs = {"vision_encoder": specialise(dynamic["vision_encoder"], {"pixel_values": shape})}
    tap = cuttings[0].selector.vision_tap if cuttings else None
    if tap is not None:
        graphs["vision_encoder"] = FixShapes()(AddVisionScores(tap, geometry)(graphs["vision_encoder"])).model
    if profile.images > 1 and not alone:
        graphs["vision_encoder"] = merge_images(graphs["vision_encoder"], batch, profile.images)
    progress("embed_tokens")
    graphs["embed_tokens"] = specialise(
        dynamic["embed_tokens"],
        {"input_ids": (batch, length), "image_features": features, "visual_index": (batch, profile.visual_tokens)},
    )
    progress("prefill")
    grid = geometry.grid or (1, geometry.visual_tokens)
    prefill = build_prefill(
        decoder, profile, plan, cuttings, grid, planes=geometry.visual_planes, sights=sights, first_position=geometry.first_position
    )
    graphs["prefill"] = FixShapes()(prefill).model
    progress("decode")
    graphs["decode"] = FixShapes()(build_decode(decoder, dynamic["embed_tokens"], profile, plan, sights=sights)).model
    return graphs


def _first_axis(vision_encoder: ir.Model) -> object:
    shape = vision_encoder.graph.inputs[0].shape
    return None if shape is None else shape[0]


def _check_images(embed_tokens: ir.Model) -> None:
    """Refuse several images where the dynamic graph takes one.

    Raises:
        ProfileError: the bundle was made before the graph left their number open.
    """
    for value in embed_tokens.graph.inputs:
        if value.name == "visual_index" and value.shape is not None and isinstance(value.shape[1], int):
            raise ProfileError("this bundle was made by a version that knew one image per prompt: export the model again")
