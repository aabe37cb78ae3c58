"""The tables of ``sievert inspect``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from sievert.bundle.manifest import Manifest
from sievert.bundle.specs import Geometry, TensorSpec
from sievert.inspecting import Inspection
from sievert.quantising import measure_weights
from sievert.sampling import leave_room
from sievert.tables import VARIANT_COLUMNS, describe_bytes, make_table, place_graph, summarise_source, variant_row
from sievert.tables_calibrate import group_kept


def inspection(found: Inspection, *, tensors: bool) -> Iterable[Table | str]:
    """Everything there is to see, one part after the other. ``tensors`` names each one, and all weights."""
    yield f"[bold]{escape(found.path.name)}[/]  {summarise_source(found.manifest)}"
    yield describe_input(found.manifest.geometry)
    if code := found.manifest.source.remote_code:
        yield f"Its processor runs code of its own, with --trust-remote-code only: {', '.join(code)}"
    if found.sample_text:
        yield describe_sample(found)
    yield _sizes(found)
    yield _variants(found)
    if any(variant.precision for variant in found.manifest.variants.values()):
        yield _precision(found.manifest)
    yield _engines(found.manifest)
    yield _graphs(found.manifest, every=tensors)
    if tensors:
        yield _weights(found.manifest)
    yield _lint(found)
    yield _history(found.manifest)


def describe_input(geometry: Geometry) -> str:
    """What a prompt is about, and the visual tokens it becomes."""
    g, film = geometry, geometry.film
    grid = f" ({g.grid[0]} rows, {g.grid[1]} columns)" if g.grid and g.grid[0] * g.grid[1] == g.visual_tokens else ""
    size = f"{g.image_height}x{g.image_width} pixels (height x width)"
    if film is not None:
        return f"A video of {film.frames} frames of {size}: {g.visual_tokens} visual tokens"
    number = f"; in prompts of {g.images} {'image' if g.images == 1 else 'images'}" if g.images else ""
    return f"An image of {size}: {g.visual_tokens} visual tokens{grid}{number}"


def describe_sample(found: Inspection) -> str:
    """What the sample prompts come to, and which variants have room for them."""
    lines = []
    for images, text in found.sample_text.items():
        visual, most = images * found.manifest.geometry.visual_tokens, leave_room(text)
        of_these = {name: made.profile for name, made in found.manifest.variants.items() if made.profile.images == images}
        able = [name for name, profile in of_these.items() if profile.max_text >= text]
        several = f" with {images} images" if images > 1 else ""
        rooms = "those that take it: " + ", ".join(able) if able else f"no variant takes it; sievert prune --max-text {most} makes one"
        lines.append(
            f"The longest sample prompt{several}: {visual} visual + {text} text tokens (template included) = {visual + text}; {rooms}"
        )
    return "\n".join(lines)


def shorten_specs(specs: Sequence[TensorSpec]) -> list[str]:
    """Tensors as ``name dtype[shape]``, numbered ones of a kind joined: ``present.0..3.key float32[1, 2, 40, 16]``."""

    def kind(spec: TensorSpec) -> tuple[str, str, tuple[int | str, ...]]:
        return re.sub(r"\.\d+(?=\.|$)", ".#", spec.name), spec.dtype, spec.shape

    lines = []
    for (name, dtype, shape), group in groupby(sorted(specs, key=lambda spec: ("#" in kind(spec)[0], kind(spec)[0])), key=kind):
        numbers = sorted({int(match[1]) for spec in group if (match := re.search(r"\.(\d+)(?=\.|$)", spec.name))})
        if len(numbers) > 1:
            name = name.replace("#", f"{numbers[0]}..{numbers[-1]}" if numbers[-1] - numbers[0] + 1 == len(numbers) else str(numbers))
        elif numbers:
            name = name.replace("#", str(numbers[0]))
        lines.append(f"{name} {dtype}[{', '.join(map(str, shape))}]")
    return lines


def _sizes(found: Inspection) -> Table:
    table = make_table("Sizes", "what", "size", numbers=("size",))
    for kind, count in found.sizes.items():
        shared = f" (one file, shared by {found.shared_by} bundles)" if kind == "weights" and found.shared_by > 1 else ""
        table.add_row(kind + shared, describe_bytes(count))
    table.add_row("in all", describe_bytes(sum(found.sizes.values())))
    return table


def _variants(found: Inspection) -> Table:
    table = make_table("Variants", *VARIANT_COLUMNS, "cache rows by layer", "caches", numbers=VARIANT_COLUMNS[2:])
    for name, variant in found.manifest.variants.items():
        caches = found.caches[name]
        rows = ", ".join(f"{len(list(group))} x {rows}" for rows, group in groupby(caches.rows))
        sizes = describe_bytes(caches.decode_bytes)
        table.add_row(*variant_row(name, variant), rows, sizes)
    return table


def _precision(manifest: Manifest) -> Table:
    numbers = ("its weights", "before")
    table = make_table(
        "Precision", "variant", "made from", "format", "scales of activations", *numbers, "kept as they are", numbers=numbers
    )
    for name, variant in manifest.variants.items():
        precision = variant.precision
        if precision is None:
            continue
        size, before = measure_weights(manifest, variant)
        form = precision.label + (f", block {precision.block}" if precision.block else "")
        scales = f"{precision.calibration} over {precision.samples} samples" if precision.calibration else "none"
        scales = f"[yellow]{scales}, RANDOM data[/]" if precision.random else scales
        kept = "\n".join(f"{len(names)}: {escape(reason)}" for reason, names in group_kept(precision.kept).items())
        table.add_row(name, precision.base, form, scales, describe_bytes(size), describe_bytes(before), kept)
    return table


def _engines(manifest: Manifest) -> Table:
    table = make_table("Engines", "variant", "engine", "graph", "file", "size", "built by", numbers=("size",))
    for name, variant in manifest.variants.items():
        for engine, entry in variant.engines.items():
            for graph, made in sorted(entry.graphs.items(), key=lambda item: place_graph(item[0])):
                file = made.file or made.lowered
                table.add_row(name, engine, graph, file, describe_bytes(manifest.files[file].bytes), escape(made.builder))
    if not table.rows:
        table.add_row("none built yet", "", "", "", "", "")
    return table


def _graphs(manifest: Manifest, *, every: bool) -> Table:
    table = make_table("Graphs", "variant", "graph", "takes", "gives")
    owners = [("(dynamic)", manifest.graphs), *((name, variant.graphs) for name, variant in manifest.variants.items())]
    for owner, graphs in owners:
        for graph, entry in sorted(graphs.items(), key=lambda item: place_graph(item[0])):
            takes, gives = (
                [f"{spec.name} {spec.dtype}[{', '.join(map(str, spec.shape))}]" for spec in specs] if every else shorten_specs(specs)
                for specs in (entry.inputs, entry.outputs)
            )
            table.add_row(owner, graph, escape("\n".join(takes)), escape("\n".join(gives)))
    return table


def _weights(manifest: Manifest) -> Table:
    table = make_table("Weights", "name", "dtype", "shape", "offset", "size", numbers=("offset", "size"))
    for weight in manifest.weights:
        table.add_row(weight.name, weight.dtype, "x".join(map(str, weight.shape)), str(weight.offset), describe_bytes(weight.nbytes))
    return table


def _lint(found: Inspection) -> Table:
    table = make_table("Lint, for each target as the graph is lowered for it", "variant", "graph", "target", "severity", "rule", "finding")
    for line in found.lint:
        colour = "red" if line.severity == "error" else "yellow"
        table.add_row(line.variant, line.graph, line.target, f"[{colour}]{line.severity}[/]", line.rule, escape(line.text))
    if not found.lint:
        table.add_row("no findings", "", "", "", "", "")
    return table


def _history(manifest: Manifest) -> Table:
    table = make_table("History", "finished (UTC)", "seconds", "command", "with", numbers=("seconds",))
    for step in manifest.history:
        versions = ", ".join(f"{name} {version}" for name, version in step.versions.items() if name in {"sievert", "torch", "transformers"})
        table.add_row(step.finished.replace("+00:00", ""), f"{step.seconds:.1f}", escape(step.command), versions)
    return table
