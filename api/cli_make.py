"""Commands that make something: export, prune, build."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from sievert import arguments as a
from sievert import arguments_make as m
from sievert.console import Screen

if TYPE_CHECKING:
    from sievert.planning import Cut


def export(
    model: m.Model,
    out: m.Out = "",
    dtype: m.DType = m.DTypeName.float32,
    layer: a.Layers = None,
    keep: a.Keeps = None,
    selector: a.Selectors = None,
    option: a.SelectorOptions = None,
    positions: a.Positions = None,
    plan: a.PlanFile = "",
    name: a.VariantName = "",
    no_prune: m.NoPrune = False,
    max_text: m.MaxText = None,
    max_new_tokens: a.MaxNewTokens = 128,
    dynamic_text: m.DynamicText = False,
    batch: a.Batch = 1,
    decode_batch: a.DecodeBatch = None,
    images: m.Images = None,
    image_size: m.ImageSize = "",
    frames: m.Frames = 0,
    sample_prompt: m.SamplePrompts = None,
    sample_image: m.SampleImages = None,
    share_weights: m.ShareWeights = "",
    engine: a.SomeEngines = None,
    force: a.Force = False,
) -> None:
    """Make a bundle from a checkpoint: the graphs, the variant [bold]full[/], a pruned one, and their engines.

    --layer and --keep may be repeated together, for several cuts. With neither, a selector cuts where its paper does.
    """
    from sievert import tables
    from sievert.bundle.errors import PlanError
    from sievert.exporting import export as export_bundle
    from sievert.exporting import parse_size

    if no_prune and (layer or keep or selector or option or plan or name):
        raise PlanError("--no-prune was given together with what to drop: leave out one or the other")
    cuts = () if no_prune else read_cuts(plan, layer, keep, selector, option, positions)
    screen = Screen()
    with screen.progress() as progress:
        made = export_bundle(
            model,
            out,
            dtype=dtype.value,
            image_size=parse_size(image_size) if image_size else None,
            cuts=cuts,
            positions=positions.value if positions else "auto",
            plan=plan,
            name=name,
            max_text="auto" if max_text is None else max_text,
            max_new_tokens=max_new_tokens,
            dynamic_text=dynamic_text,
            batch=batch,
            decode_batch="auto" if decode_batch is None else decode_batch,
            images="auto" if images is None else images,
            frames=frames,
            sample_prompts=sample_prompt or [],
            sample_images=sample_image or [],
            share_weights=share_weights,
            engines=engine or ["onnxruntime"],
            force=force,
            progress=progress,
        )
    place = _shown(out or str(made.path.name))
    screen.show(f"Made the bundle [bold]{place}[/]: {tables.describe_size(made.path)}")
    screen.show(tables.made_table(made.made, made.built))
    screen.next(f"check {place}", f'run {place} --image IMAGE --prompt "QUESTION" --show-kept kept.png')


def prune(
    bundle: a.BundlePath,
    layer: a.Layers = None,
    keep: a.Keeps = None,
    selector: a.Selectors = None,
    option: a.SelectorOptions = None,
    positions: a.Positions = None,
    plan: a.PlanFile = "",
    name: a.VariantName = "",
    max_text: m.MaxTextAsFull = None,
    max_new_tokens: m.MaxNewTokensAsFull = None,
    dynamic_text: m.DynamicTextAsFull = None,
    batch: m.BatchAsFull = None,
    decode_batch: m.DecodeBatchAsFull = None,
    images: m.ImagesAsFull = None,
    sample_prompt: m.SamplePrompts = None,
    force: a.Force = False,
) -> None:
    """Add a variant to a bundle that drops visual tokens before a decoder layer.

    --layer and --keep may be repeated together, for several cuts. With neither, a selector cuts where its paper does.
    """
    from sievert import tables
    from sievert.pruning import prune as add_variant

    cuts = read_cuts(plan, layer, keep, selector, option, positions)
    screen = Screen()
    with screen.progress() as progress:
        made = add_variant(
            bundle,
            cuts=cuts,
            positions=positions.value if positions else "auto",
            plan=plan,
            name=name,
            max_text="auto" if max_text is None else max_text,
            max_new_tokens="auto" if max_new_tokens is None else max_new_tokens,
            dynamic_text="auto" if dynamic_text is None else dynamic_text,
            batch="auto" if batch is None else batch,
            decode_batch="auto" if decode_batch is None else decode_batch,
            images="auto" if images is None else images,
            sample_prompts=sample_prompt or [],
            force=force,
            progress=progress,
        )
    screen.show(f"Made the variant [bold]{made.name}[/] of {_shown(bundle)}")
    screen.show(tables.made_table([made], []))
    screen.next(f"build {_shown(bundle)} --variant {made.name}", f"check {_shown(bundle)} --variant {made.name}")


def build(
    bundle: a.BundlePath,
    variant: a.SomeVariants = None,
    engine: a.SomeEngines = None,
    capability: m.Capabilities = None,
) -> None:
    """Build engines for variants of a bundle."""
    from sievert import tables
    from sievert.building import build as build_engines

    screen = Screen()
    with screen.progress() as progress:
        built = build_engines(
            bundle, variants=variant or [], engines=engine or ["onnxruntime"], capabilities=capability or [], progress=progress
        )
    screen.show(tables.built_table(built))
    screen.show("Built is not run: what an engine says is judged by a check.")
    screen.next(f"check {_shown(bundle)}", f"inspect {_shown(bundle)}")


def read_cuts(
    plan: str,
    layers: list[int] | None,
    keeps: list[str] | None,
    selectors: list[str] | None,
    options: list[str] | None,
    positions: a.PositionName | None,
) -> tuple[Cut, ...]:
    """The cuts of the options; with a plan there may be none of these.

    Raises:
        PlanError: both were given, or options that do not belong together.
    """
    from sievert.bundle.errors import PlanError
    from sievert.planning import pair_cuts

    if plan and (layers or keeps or selectors or options or positions):
        raise PlanError("--plan was given together with --layer, --keep, --selector, --option or --positions: leave out one or the other")
    return pair_cuts(layers or [], keeps or [], selectors or [], options or [])


def _shown(path: str | Path) -> str:
    return shlex.quote(str(path))
