"""A checkpoint to a bundle: dynamic graphs, the unpruned variant, a pruned one, engines."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sievert.building import Built, build_variant, require_builders
from sievert.bundle.create import BUNDLE
from sievert.bundle.errors import BundleError, InputError, SievertError
from sievert.bundle.names import DOWNLOADS, FULL
from sievert.bundle.place import check_place
from sievert.bundle.plan import Plan
from sievert.bundle.specs import Geometry
from sievert.bundle.store import Bundle
from sievert.engines.run.images import load_image
from sievert.plan_file import choose_cuts
from sievert.planning import DEFAULT_TEXT, Cut, Positions, describe_profile, make_plan, make_profile, name_variant
from sievert.progress import Progress, Size, silent
from sievert.pruning import Made, add, check_name
from sievert.sampling import count_text, leave_room, load_samples

if TYPE_CHECKING:
    from sievert.exporter.export import Examined
    from sievert.exporter.load import DType


@dataclass(frozen=True)
class ExportResult:
    """The bundle's folder, its variants (``full`` first), and its engines."""

    path: Path
    made: tuple[Made, ...]
    built: tuple[Built, ...]


def export(
    model: str | Path,
    out: str | Path = "",
    *,
    dtype: DType = "float32",
    image_size: tuple[int, int] | None = None,
    cuts: Sequence[Cut] = (Cut(),),
    positions: Positions = "auto",
    plan: str | Path | Plan = "",
    name: str = "",
    max_text: Size = "auto",
    max_new_tokens: int = 128,
    dynamic_text: bool = False,
    batch: int = 1,
    decode_batch: Size = "auto",
    images: Size = "auto",
    frames: int = 0,
    sample_prompts: Sequence[str] = (),
    sample_images: Sequence[str | Path] = (),
    share_weights: str | Path = "",
    engines: Sequence[str] = ("onnxruntime",),
    force: bool = False,
    progress: Progress = silent,
) -> ExportResult:
    """Export ``model`` (a folder or a hub id) to a new bundle at ``out``: by default ``NAME-bundle`` in the current folder.

    The variant ``full`` is always made; ``cuts``, or in their place a ``plan`` or the YAML file of one, make a pruned one beside it, none
    at all if empty. Then the engines are built. ``images`` is how many each prompt has; ``frames``, if not 0, how many the
    video has that each prompt has instead. With ``dynamic_text`` prefill takes prompts of any
    length up to ``max_text``. What was asked for is checked against the model's configuration before its weights are read.
    ``force`` replaces a bundle.

    ``max_text`` ``auto`` is what the longest of ``sample_prompts`` takes, rounded up to a multiple of 16, or 128. ``sample_images`` are
    those of one prompt: ``images`` ``auto`` is their number, or 1, and where a model takes several sizes and ``image_size`` is not given,
    the first decides.

    ``share_weights`` is the bundle of another export of the same checkpoint and dtype, for another image size: its weights file becomes
    this one's too, as a hard link, after every byte was compared. What depends on the size stays each bundle's own.

    Raises:
        CheckpointError, UnsupportedModelError: no checkpoint, or one that is not exported.
        PlanError, ProfileError, InputError: what is asked for does not fit the model.
        BundleError: ``out`` is taken or cannot be written, or the weights are not those of ``share_weights``.
        GraphError: the model's graphs have not the structure the passes need.
        EngineUnavailableError, EngineError: an engine cannot be built here; the bundle and its variants stay.
    """
    from sievert.exporter.export import export_model
    from sievert.exporter.write import write_bundle

    cuts, positions = choose_cuts(cuts, positions, plan)
    target = Path(out) if str(out) else default_place(model)
    require_builders(engines)
    check_place(target.expanduser().resolve(), BUNDLE, force=force)
    share = open_to_share(share_weights, target.expanduser().resolve(), dtype) if str(share_weights) else None
    pictures = load_samples(sample_images, sample_prompts, max_text=max_text, images=images, frames=frames)
    images = (len(pictures) or 1) if images == "auto" else images
    sample_size = (pictures[0].height, pictures[0].width) if pictures else None
    examined = examine(model, image_size=image_size, sample_size=sample_size, images=images, frames=frames, progress=progress)
    geometry = examined.geometry
    if sample_prompts:
        progress("reading the sample prompts")
        folder, kind = examined.checkpoint.folder, examined.processor
        max_text = leave_room(count_text(folder, geometry, sample_prompts, images=images, pictures=pictures, kind=kind))
    profile = make_profile(
        geometry,
        batch=batch,
        decode_batch=decode_batch,
        images=images,
        max_text=DEFAULT_TEXT if max_text == "auto" else max_text,
        max_new_tokens=max_new_tokens,
        dynamic_text=dynamic_text,
    )
    plans = name_plans(geometry, cuts, positions=positions, name=name, images=images)
    progress("tracing the model")
    exported = export_model(model, dtype=dtype, image_size=(geometry.image_height, geometry.image_width), images=images, frames=frames)
    progress("writing the weights")
    size = f" --image-size {geometry.image_height}x{geometry.image_width}" if image_size or sample_size else ""
    size += f" --frames {frames}" if frames else ""
    size += f" --share-weights {share_weights}" if share else ""
    command = f"export {model} --dtype {dtype}{size} {describe_profile(profile)}"
    bundle = write_bundle(exported, target.expanduser(), force=force, command=command, share=share)
    del exported  # the weights: gigabytes that engines are built without
    try:
        made = [add(bundle, plan=plan, profile=profile, name=each, force=False, progress=progress) for each, plan in plans.items()]
        built = [build_variant(bundle, each, engine, progress=progress) for each in plans for engine in engines]
    except SievertError as error:
        there = ", ".join(sorted(bundle.manifest.variants)) or "none"
        error.add_note(f"The bundle {target} stays (variants: {there}): go on with `sievert prune` and `sievert build`.")
        raise
    return ExportResult(bundle.path, tuple(made), tuple(built))


def open_to_share(path: str | Path, target: Path, dtype: DType) -> Bundle:
    """The bundle whose weights one at ``target`` shall share, as far as can be said before the model is read.

    Raises:
        BundleError: no bundle, one of another dtype, the one that is replaced, or one on another filesystem.
    """
    bundle = Bundle.open(Path(path).expanduser())
    if bundle.path == target:
        raise BundleError(f"{target} is to share its weights with itself: choose another path for the new bundle")
    if (other := bundle.manifest.source.dtype) != dtype:
        raise BundleError(f"{path} holds {other} weights and this export {dtype} ones, so they cannot be shared: give --dtype {other}")
    nearest = next(folder for folder in (target.parent, *target.parent.parents) if folder.exists())
    if nearest.stat().st_dev != bundle.path.stat().st_dev:
        raise BundleError(f"{path} is on another filesystem than {nearest}: a file can only be shared on one; leave --share-weights out")
    return bundle


def parse_size(text: str) -> tuple[int, int]:
    """Height and width from ``HEIGHTxWIDTH``, or those of an image file.

    Raises:
        InputError: neither.
        ImageError: a file that is no image.
    """
    if found := re.fullmatch(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", text.strip().lower()):
        return int(found[1]), int(found[2])
    if not Path(text).is_file():
        raise InputError(f"--image-size {text}: give HEIGHTxWIDTH in pixels, such as 448x672, or an image file")
    picture = load_image(text)
    return picture.height, picture.width


def default_place(model: str | Path) -> Path:
    """``NAME-bundle`` in the current folder, after the checkpoint's folder or the last part of a hub id."""
    return Path(f"{Path(model).expanduser().resolve().name or 'model'}-bundle")


def examine(
    model: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    sample_size: tuple[int, int] | None = None,
    images: int = 1,
    frames: int = 0,
    progress: Progress = silent,
) -> Examined:
    """What the small files of a model tell; a hub id is downloaded. Raises as :func:`export` does for checkpoints."""
    from sievert.exporter.export import examine_checkpoint

    progress("reading the configuration")
    hub = str(model).count("/") == 1 and not Path(model).expanduser().exists()
    with contextlib.nullcontext() if not hub else _growing(DOWNLOADS.expanduser(), f"downloading {model}", progress):
        return examine_checkpoint(model, image_size=image_size, sample_size=sample_size, images=images, frames=frames)


@contextlib.contextmanager
def _growing(folder: Path, what: str, progress: Progress) -> Iterator[None]:
    """Tell how much has been added to ``folder`` while the block runs."""

    def size() -> int:
        return sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file()) if folder.is_dir() else 0

    def watch() -> None:
        while not ended.wait(1):
            with contextlib.suppress(FileNotFoundError):  # a part that was just renamed
                progress(f"{what}: {max(0, size() - before) / 2**20:.0f} MiB")

    ended, before = threading.Event(), size()
    progress(what)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


def name_plans(geometry: Geometry, cuts: Sequence[Cut], *, positions: Positions, name: str, images: int) -> dict[str, Plan]:
    """The plans of an export's variants by name, ``full`` first.

    Raises:
        PlanError: the model cannot take one.
        VariantError: the name is ``full``, or cannot name a variant.
    """
    plans = {FULL: Plan()}
    if cuts:
        plan = make_plan(geometry, cuts, positions=positions, images=images)
        check_name(chosen := name or name_variant(plan), plan)
        plans[chosen] = plan
    return plans
