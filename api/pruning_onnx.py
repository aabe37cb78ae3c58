"""A decoder that another tool exported to a folder of pruned graphs."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sievert.bundle.errors import BundleError, GraphError, InputError, PlanError
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.plan_file import choose_cuts
from sievert.planning import Cut, Positions, make_plan, make_profile
from sievert.progress import Progress, Size, silent

if TYPE_CHECKING:
    import onnx_ir as ir

    from sievert.bundle.manifest import WeightEntry
    from sievert.bundle.pruned import PrunedDecoder
    from sievert.bundle.specs import Geometry
    from sievert.graph_passes.foreign.normalise import ForeignDecoder
    from sievert.graph_passes.lower import Target
    from sievert.parity.source import SourceCheck

WEIGHTS = "weights.data"


@dataclass(frozen=True)
class PrunedOnnx:
    """The folder, what ``pruned.json`` says, and how the unpruned graphs compared with the source (None: not asked)."""

    path: Path
    record: PrunedDecoder
    check: SourceCheck | None


def prune_onnx(
    prefill: str | Path,
    out: str | Path,
    *,
    visual_tokens: int,
    decode: str | Path = "",
    cuts: Sequence[Cut] = (Cut(),),
    positions: Positions = "auto",
    plan: str | Path | Plan = "",
    max_text: int = 128,
    max_new_tokens: int = 128,
    batch: int = 1,
    decode_batch: Size = "auto",
    images: int = 1,
    grid: tuple[int, int] | None = None,
    target: Target = "onnxruntime",
    check: bool = False,
    force: bool = False,
    progress: Progress = silent,
) -> PrunedOnnx:
    """Prune ``prefill``, a decoder of standard operators and any length, into the new folder ``out``.

    It becomes ``prefill.onnx`` and ``decode.onnx`` of the graphs' contract (docs/contract.md), and ``embed_tokens.onnx`` where the source
    starts from ids, over one weights file; ``pruned.json`` names every tensor. ``visual_tokens`` are those of one image, ``grid`` its rows
    and columns of patches. Decode is made from the same graph; ``decode``, the tool's own, is only checked to be the same decoder.
    ``check`` compares logits with the source's where nothing is dropped, in ONNX Runtime, and refuses if they differ.

    Raises:
        GraphError: the graph is not read as a decoder (the message says what was matched and where it stopped), or the check failed.
        InputError: a file that is not there, another decoder in ``decode``, or a grid of another size.
        PlanError, ProfileError: what is asked for does not fit the decoder.
        IntegrityError: weights that are not plain files beside the graph.
        BundleError: ``out`` is taken (``force`` replaces a pruned decoder) or cannot be written. Nothing is left behind.
    """
    from sievert.bundle.place import check_place
    from sievert.bundle.pruned import PRUNED_DECODER, create_pruned, read_pruned
    from sievert.graph_passes.foreign.variant import describe_geometry, make_pruned
    from sievert.graph_passes.foreign.weights import write_weights
    from sievert.graph_passes.lower import lower

    cuts, positions = choose_cuts(cuts, positions, plan)
    _refuse_vision(cuts)
    if grid is not None and grid[0] * grid[1] != visual_tokens:
        raise InputError(f"a grid of {grid[0]} x {grid[1]} has {grid[0] * grid[1]} patches, but an image has {visual_tokens} visual tokens")
    check_place(Path(out).resolve(), PRUNED_DECODER, force=force)
    source = Path(prefill)
    if Path(out).resolve() == source.resolve().parent:
        raise BundleError(f"{out} is the source's own folder: choose another path")
    progress(f"reading {source.name}")
    foreign = read_source(source, any_length=True)
    geometry = describe_geometry(foreign, visual_tokens, grid)
    checked = make_plan(geometry, cuts, positions=positions, images=images)
    profile = make_profile(
        geometry, batch=batch, decode_batch=decode_batch, images=images, max_text=max_text, max_new_tokens=max_new_tokens
    )
    if str(decode):
        progress(f"comparing {Path(decode).name} with it")
        compare_decoders(source, foreign, Path(decode))
    with create_pruned(Path(out), force=force) as new:
        weights = write_weights(_models(foreign), new.path / WEIGHTS, progress=lambda name: progress(f"writing weights: {name}"))
        graphs = {
            name: lower(model, target)
            for name, model in make_pruned(foreign, geometry, checked, profile, progress=lambda name: progress(f"making {name}")).items()
        }
        found = None
        if check:
            progress("comparing with the source")
            found = _check(source, foreign, geometry, checked, profile, new.path / WEIGHTS, target)
        files = {name: new.add(f"{name}.onnx", _serialise(model)) for name, model in graphs.items()}
        new.finish(_describe(source, foreign, geometry, checked, profile, target, graphs, files, weights))
    path = Path(out).resolve()
    return PrunedOnnx(path, read_pruned(path), found)


def read_source(path: Path, *, any_length: bool) -> ForeignDecoder:
    """A graph of another tool, read and brought into form; weights stay in their files. ``any_length``: it has to be of any length.

    Raises:
        InputError: no such file. IntegrityError: no ONNX graph, or weights that are not plain files beside it. GraphError: not a decoder.
    """
    import onnx_ir as ir

    from sievert.bundle.external_data import check_external_data
    from sievert.graph_passes.foreign.normalise import check_lengths, normalise

    if not path.is_file():
        raise InputError(f"{path} is no file: give the ONNX graph of a decoder")
    check_external_data(path)
    model = ir.load(path)
    if any_length:
        check_lengths(model)
    return normalise(model)


def compare_decoders(source: Path, foreign: ForeignDecoder, decode: Path) -> None:
    """Refuse a decode graph that is not of the same decoder: other sizes, or other weights.

    Raises:
        InputError: it differs; the message says in what. Others as :func:`read_source`.
    """
    from sievert.graph_passes.foreign.weights import digests

    other = read_source(decode, any_length=False)  # it may be of one token
    for what in ("depth", "width", "heads", "kv_heads", "head_size", "dtype"):
        first, second = getattr(foreign.decoder, what), getattr(other.decoder, what)
        if first != second:
            raise InputError(f"{decode.name} is not the decoder of {source.name}: {what} {second} against {first}; leave it out")
    first_weights, second_weights = digests(_models(foreign)), digests(_models(other))
    if first_weights != second_weights:
        raise InputError(
            f"{decode.name} does not hold the weights of {source.name}: {len(first_weights ^ second_weights)} tensors stand in one of them "
            "only. Decode is made from the prefill graph: leave the other out"
        )


def parse_grid(text: str) -> tuple[int, int]:
    """``24x24`` as rows and columns.

    Raises:
        InputError: another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text.strip())
    if match is None:
        raise InputError(f"--grid {text!r}: write rows x columns of the image's patches, for example 24x24")
    return int(match[1]), int(match[2])


def _refuse_vision(cuts: Sequence[Cut]) -> None:
    from sievert.graph_passes.selectors import registry

    for cut in cuts:
        if registry.make(cut.selector, {}).vision_tap is not None:
            usable = [name for name in registry.SELECTORS if registry.make(name, {}).vision_tap is None]
            raise PlanError(
                f"selector {cut.selector} scores in the vision encoder, and a decoder alone has none: choose one of {', '.join(usable)}"
            )


def _models(foreign: ForeignDecoder) -> list[ir.Model]:
    return [foreign.model, *([] if foreign.embedding is None else [foreign.embedding])]


def _check(
    source: Path, foreign: ForeignDecoder, geometry: Geometry, plan: Plan, profile: Profile, weights: Path, target: Target
) -> SourceCheck:
    """The same cuts, each keeping everything, against the source."""
    from sievert.graph_passes.foreign.variant import make_pruned
    from sievert.graph_passes.lower import lower
    from sievert.parity.source import compare_with_source

    total = profile.visual_tokens
    whole = plan.model_copy(update={"stages": tuple(stage.model_copy(update={"keep": total}) for stage in plan.stages)})
    alike = profile.model_copy(update={"decode_batch": profile.batch})
    graphs = {name: lower(model, target) for name, model in make_pruned(foreign, geometry, whole, alike).items()}
    found = compare_with_source(source, foreign, graphs, weights, alike)
    if not found.passed:
        raise GraphError(
            f"where every token is kept, logits differ from {source.name}'s by {found.worst:.3g} ({found.allowed:.3g} is allowed): "
            "nothing was written; please report this graph"
        )
    return found


def _serialise(model: ir.Model) -> bytes:
    from sievert.graph_passes.expose import to_bytes

    return to_bytes(model)


def _describe(
    source: Path,
    foreign: ForeignDecoder,
    geometry: Geometry,
    plan: Plan,
    profile: Profile,
    target: Target,
    graphs: Mapping[str, ir.Model],
    files: Mapping[str, str],
    weights: tuple[WeightEntry, ...],
) -> PrunedDecoder:
    import numpy as np

    from sievert.bundle.files import sha256_file
    from sievert.bundle.manifest import GraphEntry
    from sievert.bundle.pruned import PrunedDecoder, PrunedSizes, PrunedSource
    from sievert.bundle.specs import describe_values
    from sievert.graph_passes.selectors import registry

    roles = foreign.roles
    named = [name for name in (roles.ids, roles.embeds, roles.mask, roles.positions) if name is not None]
    lost = [plan.dropped_at(layer, profile.visual_tokens) for layer in range(geometry.depth)]
    return PrunedDecoder(
        source=PrunedSource(
            file=source.name,
            sha256=sha256_file(source.resolve()),
            inputs=(*named, *(past.name for past in foreign.past)),
            matched=foreign.matched,
        ),
        sizes=PrunedSizes(
            depth=geometry.depth,
            width=geometry.width,
            heads=geometry.heads,
            kv_heads=geometry.kv_heads,
            head_size=geometry.head_size,
            vocabulary=geometry.vocabulary,
            dtype=np.dtype(foreign.decoder.dtype.numpy()).name,
            max_positions=foreign.max_positions,
            grid=geometry.grid,
        ),
        plan=plan,
        profile=profile,
        capacities=tuple(profile.capacity(each) for each in lost),
        reads_question=any(registry.make(stage.selector, stage.options).reads_question for stage in plan.stages),
        target=target,
        graphs={
            name: GraphEntry(file=files[name], inputs=describe_values(model.graph.inputs), outputs=describe_values(model.graph.outputs))
            for name, model in graphs.items()
        },
        weights_file=WEIGHTS,
        weights=weights,
    )
