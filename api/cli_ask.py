"""Commands that run engines: check and run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from sievert import arguments as a
from sievert.console import Screen

if TYPE_CHECKING:
    from sievert.running import Answers


def check(
    bundle: a.BundlePath,
    variant: a.SomeVariants = None,
    engine: a.BuiltEngines = None,
    samples: a.Samples = None,
    data: a.Data = "",
    tokens: a.Tokens = None,
    raw_prompt: a.RawPrompt = False,
    model: a.Checkpoint = "",
    low_memory: a.LowMemory = False,
    strict: a.Strict = False,
    report: a.JsonFile = None,
) -> None:
    """Judge engines against the PyTorch model, stage by stage: PASS, AMBIGUOUS (near ties) or FAIL.

    An engine that this machine cannot execute is NOT RUN; the ONNX files it was built from are judged all the same.
    """
    from sievert import tables
    from sievert.checking import check as judge

    screen = Screen()
    if report is not None:
        require_folder(report)
    with screen.progress() as progress:
        checked = judge(
            bundle,
            variants=variant or [],
            engines=engine or [],
            samples="auto" if samples is None else samples,
            data=data,
            model=model,
            tokens="auto" if tokens is None else tokens,
            template=not raw_prompt,
            low_memory=low_memory,
            progress=progress,
        )
    for outcome in checked.outcomes:
        for each in outcome.reports:
            if each.samples:
                screen.show(tables.stage_table(each))
                screen.show()
    screen.show(tables.verdict_table(checked))
    for line in tables.verdict_lines(checked):
        screen.show(line)
    if report is not None:
        write_file(report, (json.dumps(checked.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
        screen.show(f"Every number is in {shlex.quote(str(report))}")
    if code := checked.exit_code(strict=strict):
        raise typer.Exit(code)
    screen.next(f'run {shlex.quote(str(bundle))} --image IMAGE --prompt "QUESTION"')


def run(
    bundle: a.BundlePath,
    prompt: a.Prompts,
    image: a.SomeImageFiles = None,
    video: a.VideoSource = "",
    fps: a.FramesPerSecond = None,
    variant: a.OneVariant = "",
    engine: a.Engine = "onnxruntime",
    low_memory: a.LowMemory = False,
    max_new_tokens: a.Limit = None,
    temperature: a.Temperature = 0.0,
    top_p: a.TopP = 1.0,
    seed: a.Seed = 0,
    raw_prompt: a.RawPrompt = False,
    show_kept: a.KeptFile = None,
) -> None:
    """Ask about an image, or several, or a video. Answers go to the standard output, all else to the error output."""
    from sievert.bundle.errors import InputError
    from sievert.engines.run.videos import load_video
    from sievert.running import run as ask

    if show_kept is not None:
        require_png("--show-kept", show_kept)
    if bool(image) == bool(video):
        raise InputError("give what the question is about: either --image, once for each image, or --video")
    if fps is not None and not video:
        raise InputError("--fps is the rate of --video: leave it out, or give a video")
    screen = Screen()
    speaker = _Speaker(screen, prompt)
    with screen.progress() as progress:
        found = ask(
            bundle,
            image or load_video(video, 0.0 if fps is None else fps),
            prompt,
            variant=variant,
            engine=engine,
            low_memory=low_memory,
            max_new_tokens="auto" if max_new_tokens is None else max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            template=not raw_prompt,
            on_text=speaker.say,
            progress=progress,
        )
    for line in _summary(found):
        screen.note(f"[dim]{line}[/]")
    if show_kept is None:
        screen.note("[dim]To see what was kept, add: --show-kept kept.png[/]")
    else:
        from io import BytesIO

        from sievert.drawing import draw_answers

        drawn = BytesIO()
        draw_answers(found).save(drawn, "PNG")
        write_file(show_kept, drawn.getvalue())
        screen.note(f"[dim]What was kept is drawn in {shlex.quote(str(show_kept))}[/]")


class _Speaker:
    """Writes answers as they come, one after the other, even where several are written at once."""

    def __init__(self, screen: Screen, prompts: list[str]) -> None:
        self._screen = screen
        self._prompts = prompts
        self._waiting = [""] * len(prompts)
        self._complete = [False] * len(prompts)
        self._current = 0
        self._begun = False

    def say(self, prompt: int, text: str) -> None:
        self._waiting[prompt] += text
        self._complete[prompt] |= not text
        while self._current < len(self._prompts):
            now = self._current
            if not self._begun:
                if not self._waiting[now] and not self._complete[now]:
                    return
                self._begun = True
                if len(self._prompts) > 1:
                    self._screen.write(self._prompts[now])
                self._waiting[now] = self._waiting[now].lstrip()
            self._screen.write(self._waiting[now], end="")
            self._waiting[now] = ""
            if not self._complete[now]:
                return
            self._screen.write("")
            self._current, self._begun = now + 1, False


def _summary(found: Answers) -> list[str]:
    kept = ", ".join(f"{stage.keep} of {found.visual_tokens} visual tokens from layer {stage.layer} on" for stage in found.plan.stages)
    lines = [f"{found.variant} on {found.engine}: {kept or f'all {found.visual_tokens} visual tokens'}"]
    first = [answer.seconds[0] for answer in found.answers]
    tokens = sum(len(answer.tokens) for answer in found.answers)
    times = " + ".join(f"{seconds * 1000:.0f}" for seconds in first)
    lines.append(f"image {found.vision_seconds * 1000:.0f} ms, first token {times} ms, {tokens} tokens in all")
    if cut := [answer.prompt for answer in found.answers if answer.finish == "length"]:
        lines.append(f"{len(cut)} of {len(found.answers)} answers reached the maximum and stop there")
    return lines


def require_folder(path: Path) -> None:
    """Refuse a place for a result before the work that makes it."""
    from sievert.bundle.errors import InputError

    if path.is_dir() or not path.absolute().parent.is_dir():
        reason = "it is a folder" if path.is_dir() else f"there is no folder {path.parent}"
        raise InputError(f"{path} cannot be written ({reason}): give another place")


def require_png(option: str, path: Path) -> None:
    """Refuse a place for a picture before the work that makes it."""
    from sievert.bundle.errors import InputError

    if path.suffix.lower() != ".png":
        raise InputError(f"{option} {path}: give a file name that ends in .png")
    require_folder(path)


def write_file(path: Path, data: bytes) -> None:
    """Write a result."""
    from sievert.bundle.errors import InputError

    try:
        path.write_bytes(data)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror or error}): give another place") from error
