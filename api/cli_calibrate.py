"""Commands about precision: collect calibration data, and measure ranges with it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from sievert import arguments as a
from sievert.cli_ask import require_folder, require_png, write_file
from sievert.console import Screen


def collect(
    bundle: a.BundlePath,
    data: a.CalibrationData = "",
    variant: a.CollectedVariant = "full",
    samples: a.CalibrationSamples = None,
    decode_steps: a.DecodeSteps = "3",
    engine: a.Engine = "onnxruntime",
    out: a.CollectionOut = "",
    random: a.RandomData = False,
    raw_prompt: a.RawPrompt = False,
    force: a.Force = False,
) -> None:
    """Store what every graph is really fed, for calibration: your own images and prompts, through the whole chain.

    Random data needs [bold]--random[/], and every command that uses it says so.
    """
    from sievert import tables_calibrate as tables
    from sievert.collecting import collect as run_chain

    screen = Screen()
    with screen.progress() as progress, screen.counter("samples") as count:
        found = run_chain(
            bundle,
            data,
            variant=variant,
            samples="auto" if samples is None else samples,
            decode_steps=_steps(decode_steps),
            engine=engine,
            out=out,
            random=random,
            template=not raw_prompt,
            force=force,
            progress=progress,
            on_count=count,
        )
    place = str(Path(out) if out else found.path)
    screen.show(tables.collection_table(found))
    for line in tables.collection_lines(found, place):
        screen.show(line)
    screen.next(f"ranges {shlex.quote(str(bundle))} --collection {shlex.quote(place)}")


def ranges(
    bundle: a.BundlePath,
    collection: a.CollectionFolder = "",
    variant: a.RangedVariant = "",
    dtype: a.NarrowDType = a.NarrowDTypeName.float16,
    engine: a.LoweredFor = "",
    worst: a.Worst = 20,
    report: a.JsonFile = None,
) -> None:
    """Measure every tensor of a variant on calibration data: what would overflow in 16 bit, and has to stay float32."""
    from sievert import tables_calibrate as tables
    from sievert.bundle.store import Bundle
    from sievert.ranging import ranges as measure

    screen = Screen()
    if report is not None:
        require_folder(report)
    with screen.progress() as progress:
        found = measure(bundle, collection, variant=variant, dtype=dtype.value, lowered_for=engine, progress=progress)
    screen.show(tables.ranges_table(found, worst))
    for line in tables.ranges_lines(found):
        screen.show(line)
    if report is not None:
        write_file(report, (json.dumps(found.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        screen.show(f"Every tensor is in {shlex.quote(str(report))}")
    if found.emulated:  # narrowed as it was exported
        model = shlex.quote(Bundle.open(bundle).manifest.source.model)
        screen.next(f"export {model} OUT --dtype {'bfloat16' if found.keep_float32 else dtype.value}")
    else:
        data = f" --collection {shlex.quote(str(collection))}" if str(collection) else ""
        formats = (dtype.value, "bfloat16") if found.keep_float32 else (dtype.value,)
        screen.next(*(f"quantise {shlex.quote(str(bundle))} --variant {found.variant} --format {each}{data}" for each in formats))


def quantise(
    bundle: a.BundlePath,
    variant: a.QuantisedFrom = "full",
    format: a.NumberFormat = None,  # noqa: A002 (the option's name)
    kv: a.CacheType = "",
    name: a.QuantisedName = "",
    calibration: a.Calibrated = a.CalibrationName.max,
    percentile: a.Percentile = 99.99,
    block: a.Block = 32,
    collection: a.CollectionFolder = "",
    quantise_selector: a.QuantiseSelector = False,
    quantise_head: a.QuantiseHead = False,
    keep_high: a.KeepHigh = None,
    keep_worst: a.KeepWorst = 0,
    sensitivity: a.SensitivityFile = "",
    random: a.RandomScales = False,
    force: a.Force = False,
) -> None:
    """Add a variant with quantised weights, and with int8 and fp8 quantised activations too; their scales come from calibration data.
    Or keep its caches in 16 bit.

    What a selector reads is never quantised, unless asked.
    """
    from sievert import tables_calibrate as tables
    from sievert.quantising import quantise as add_variant

    screen = Screen()
    with screen.progress() as progress:
        made = add_variant(
            bundle,
            variant=variant,
            format="auto" if format is None else format.value,
            kv=kv,
            name=name,
            calibration=calibration.value,
            percentile=percentile,
            block=block,
            collection=collection,
            quantise_selector=quantise_selector,
            quantise_head=quantise_head,
            keep_high=keep_high or [],
            keep_worst=keep_worst,
            sensitivity=sensitivity,
            random=random,
            force=force,
            progress=progress,
        )
    place = shlex.quote(str(bundle))
    screen.show(f"Made the variant [bold]{made.name}[/] of {place}")
    for line in tables.quantised_lines(made):
        screen.show(line)
    precision = made.variant.precision
    data = " --data QUESTIONS.jsonl" if precision is not None and precision.calibration else ""  # scales fit the kind they came from
    screen.next(f"check {place} --variant {made.name}{data}", f"build {place} --variant {made.name} --engine tensorrt-rtx")


def sensitivity(
    bundle: a.BundlePath,
    collection: a.CollectionFolder = "",
    variant: a.RangedVariant = "",
    format: a.SensedFormat = a.FormatName.int8,  # noqa: A002 (the option's name)
    calibration: a.Calibrated = a.CalibrationName.max,
    percentile: a.Percentile = 99.99,
    block: a.Block = 32,
    samples: a.SensitivitySamples = 32,
    random: a.RandomScales = False,
    report: a.JsonFile = None,
    plot: a.PlotFile = None,
) -> None:
    """Quantise one layer at a time and measure what the first answers lose: which layers to leave as they are."""
    from sievert import tables_calibrate as tables
    from sievert.plotting import draw_sensitivity, require_pyplot
    from sievert.sensing import sensitivity as measure

    screen = Screen()
    if report is not None:
        require_folder(report)
    if plot is not None:
        require_png("--plot", plot)
        require_pyplot()
    with screen.progress() as progress:
        found = measure(
            bundle,
            collection,
            variant=variant,
            format=format.value,
            calibration=calibration.value,
            percentile=percentile,
            block=block,
            samples=samples,
            random=random,
            progress=progress,
        )
    screen.show(tables.sensitivity_table(found))
    for line in tables.sensitivity_lines(found):
        screen.show(line)
    if plot is not None:
        write_file(plot, draw_sensitivity(found))
        screen.show(f"The same as bars: {shlex.quote(str(plot))}")
    if report is not None:
        write_file(report, (json.dumps(found.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
        place, file = shlex.quote(str(bundle)), shlex.quote(str(report))
        screen.next(f"quantise {place} --variant {found.variant} --format {found.format} --sensitivity {file} --keep-worst 1")


def _steps(text: str) -> int | list[int]:
    """``3`` is how many, ``1,4,16`` are which; ``8,`` is one."""
    from sievert.bundle.errors import ProfileError

    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        numbers = [int(part) for part in parts]
    except ValueError:
        raise ProfileError(f"--decode-steps {text!r}: give how many (3) or which (1,4,16)") from None
    return numbers if "," in text or len(numbers) != 1 else numbers[0]
