"""What is in a bundle."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sievert.bundle.manifest import Manifest
from sievert.bundle.store import Bundle
from sievert.progress import Progress, silent
from sievert.sampling import count_text


@dataclass(frozen=True)
class LintLine:
    """What a target would say of a graph of a variant, once it is lowered for it. ``severity`` is ``error`` or ``warning``."""

    variant: str
    graph: str
    target: str
    severity: str
    rule: str
    text: str


@dataclass(frozen=True)
class CacheInfo:
    """Key and value caches of a variant: rows of each layer, and bytes of one prefill batch and one decode batch."""

    rows: tuple[int, ...]
    prefill_bytes: int
    decode_bytes: int


@dataclass(frozen=True)
class Inspection:
    """A bundle's manifest, with what can be computed from it: sizes in bytes by kind of file, caches by variant, lint findings.

    ``sample_text`` are the text tokens of the longest sample prompt by the number of images of a prompt, template included; empty without
    samples. ``shared_by`` is how many bundles have the weights file.
    """

    path: Path
    manifest: Manifest
    verified: bool
    sizes: Mapping[str, int]
    caches: Mapping[str, CacheInfo]
    lint: tuple[LintLine, ...]
    sample_text: Mapping[int, int]
    shared_by: int


def inspect(bundle: str | Path, *, verify: bool = False, sample_prompts: Sequence[str] = (), progress: Progress = silent) -> Inspection:
    """Read a bundle. ``verify`` hashes every file; without it sizes, small files and a sample of the weights are checked. The
    ``sample_prompts`` are counted as its processor counts them.

    Raises:
        PromptError: a sample prompt that the model does not take.
        BundleError: the bundle is not what its manifest says; the message names the file.
    """
    progress("hashing every file" if verify else "reading the bundle")
    opened = Bundle.open(bundle, verify="full" if verify else "size")
    manifest = opened.manifest
    images = {variant.profile.images for variant in manifest.variants.values()} if sample_prompts else set()
    sample_text = {number: count_text(opened.path, manifest.geometry, sample_prompts, images=number) for number in sorted(images)}
    return Inspection(
        path=opened.path,
        manifest=manifest,
        verified=verify,
        sizes=measure(manifest),
        caches={name: measure_caches(manifest, name) for name in manifest.variants},
        lint=tuple(line for name in manifest.variants for line in lint_variant(opened, name, progress)),
        sample_text=sample_text,
        shared_by=opened.weights_path.stat().st_nlink,
    )


def measure(manifest: Manifest) -> dict[str, int]:
    """Bytes by kind of file: weights, those of quantised variants, dynamic graphs, static ones, engines, the checkpoint's small files."""
    sizes = dict.fromkeys(
        ("weights", "quantised weights", "dynamic graphs", "variants' graphs", "engines", "tokenizer and configuration"), 0
    )
    weights, dynamic = {manifest.weights_file, *map(manifest.place, manifest.weights)}, {entry.file for entry in manifest.graphs.values()}
    for name, entry in manifest.files.items():
        if name in weights:
            kind = "weights"
        elif name.endswith(".data"):
            kind = "quantised weights"
        elif name in dynamic:
            kind = "dynamic graphs"
        elif name.endswith(".engine"):
            kind = "engines"
        elif name.endswith(".onnx"):
            kind = "variants' graphs"
        else:
            kind = "tokenizer and configuration"
        sizes[kind] += entry.bytes
    return sizes


def measure_caches(manifest: Manifest, variant: str) -> CacheInfo:
    """The caches of a variant."""
    made, geometry = manifest.variants[variant], manifest.geometry
    kinds = {spec.name: 4 if spec.dtype == "float32" else 2 for spec in made.graphs["decode"].inputs}
    sizes = [kinds[f"past_key_values.{layer}.{part}"] for layer in range(len(made.capacities)) for part in ("key", "value")]
    rows = [rows for rows in made.capacities for _ in range(2)]
    one = geometry.kv_heads * geometry.head_size * sum(size * count for size, count in zip(sizes, rows, strict=True))
    return CacheInfo(made.capacities, one * made.profile.batch, one * made.profile.decode_batch)


def lint_variant(bundle: Bundle, variant: str, progress: Progress = silent) -> list[LintLine]:
    """What each target would say of a variant's graphs, lowered for it."""
    import onnx_ir as ir

    from sievert.exporter.brisk import no_collector
    from sievert.graph_passes.lint import lint
    from sievert.graph_passes.lower import lower
    from sievert.graph_passes.lowering.targets import TARGETS

    progress(f"lint of {variant}")
    lines = []
    with no_collector():
        for graph in bundle.variant(variant).graphs:
            model = ir.load(bundle.graph_file(graph, variant=variant))
            for target in TARGETS:
                for found in lint(lower(model, target), target):
                    text = f"{found.node}: {found.message}. To do: {found.fix}"
                    lines.append(LintLine(variant, graph, target, found.severity, found.rule, text))
    return lines
