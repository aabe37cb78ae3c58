"""Calibration data: the real inputs of every graph, collected from the user's own images and prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from sievert.bundle.errors import CalibrationError, EngineUnavailableError
from sievert.bundle.names import FULL
from sievert.bundle.store import Bundle
from sievert.progress import Progress, Size, silent

if TYPE_CHECKING:
    from sievert.calibration.collection import Collection

OnCount = Callable[[int, int], None]
"""Called with how many samples are done and how many there are."""

DEFAULT_SAMPLES: Final = 128
"""What post-training calibration usually takes."""
MADE_UP: Final = 8


def collect(
    bundle: str | Path,
    data: str | Path = "",
    *,
    variant: str = FULL,
    samples: Size = "auto",
    decode_steps: int | Sequence[int] = 3,
    engine: str = "onnxruntime",
    out: str | Path = "",
    random: bool = False,
    template: bool = True,
    force: bool = False,
    progress: Progress = silent,
    on_count: OnCount = lambda _, __: None,
) -> Collection:
    """Run images and prompts through a variant and store what each of its graphs was fed, as safetensors with a ``collection.json``.

    ``data`` is a file of lines ``{"image": ..., "prompt": ...}`` (``"images": [...]`` for a variant that takes several), image paths
    relative to it, or a folder that holds one such ``.jsonl`` file. ``samples`` takes the first lines; ``auto`` is 128 at most.
    ``decode_steps`` are the tokens of the greedy answer that decode's inputs are stored for, counted from 1; a number n means the first n
    of 1, 2, 4, 8 and so on. ``out`` is by default ``BUNDLE-calibration`` beside the bundle; ``force`` replaces a collection that stands
    there. ``random`` takes made-up pictures and words in place of data (8 if ``samples`` is ``auto``), which is written into the collection
    and said whenever it is loaded.

    Raises:
        CalibrationError: no data and not ``random``, or both; fewer than 2 samples, one that leads to NaN, a place that is taken.
        InputError, ImageError, PromptError: data that cannot be used, with its line.
        ProfileError: decode steps that the variant has no room for.
        VariantError: no such variant, or it has no such engine.
        EngineUnavailableError: the engine cannot run on this machine.
        BundleError: the bundle is not what its manifest says, or ``out`` cannot be written.
    """
    from sievert.calibration.collect import choose_steps
    from sievert.calibration.collect import collect as run_chain
    from sievert.calibration.material import find_data, make_random, require_unchanged, use_questions
    from sievert.calibration.place import choose_place
    from sievert.calibration.questions import check_questions, read_questions
    from sievert.engines.run.prompt import Prompter
    from sievert.engines.run.registry import find_runtime

    if reason := find_runtime(engine).unavailable():
        raise EngineUnavailableError(reason)
    if random == bool(str(data)):
        raise CalibrationError(
            "random samples and data were both asked for: leave out one of --random and --data"
            if random
            else "no data was given: name a file of your own images and prompts with --data, or take made-up ones with --random"
        )
    if samples != "auto" and samples < 1:
        raise CalibrationError(f"samples={samples}: give a number of at least 2")
    progress("checking the bundle")
    opened = Bundle.open(bundle)
    profile = opened.variant(variant).profile
    steps = choose_steps(decode_steps, profile)
    place = choose_place(opened, out, force=force)
    questions = None
    if random:
        progress("making random samples")
        prompter = Prompter(opened.path, opened.manifest.geometry, profile)
        material = make_random(prompter, opened.path, MADE_UP if samples == "auto" else samples)
    else:
        progress("reading the data")
        questions = read_questions(find_data(data), limit=DEFAULT_SAMPLES if samples == "auto" else samples)
        count = len(questions.questions)
        check_questions(
            questions, opened, [variant], template=template, tell=lambda done: progress(f"checking images and prompts: {done} of {count}")
        )
        material = use_questions(questions, template=template)
    progress("")

    def finish() -> None:
        if questions is not None:
            require_unchanged(questions)

    return run_chain(opened, variant, place, material, engine=engine, steps=steps, force=force, finish=finish, on_count=on_count)


def load_collection(folder: str | Path, bundle: str | Path | Bundle, *, progress: Progress = silent) -> Collection:
    """Open calibration data for a bundle: every file hashed, and found to be of this model. Random data is warned about, each time.

    Raises:
        CalibrationError: no collection there, one of another model or number of tokens, of a single sample, or changed since.
        BundleError: the bundle is not what its manifest says.
    """
    from sievert.calibration.collection import load_collection as load

    opened = bundle if isinstance(bundle, Bundle) else Bundle.open(bundle)
    return load(folder, opened, progress=progress)
