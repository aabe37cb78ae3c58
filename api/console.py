"""What the command line shows: results on the standard output, everything else on the error output.

Without a terminal (a log of CI, a pipe) there are no colours, no animation and no line breaks at a width nobody chose.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.status import Status

from sievert.progress import Progress

_LOG_WIDTH = 160  # tables in a log
_SILENT = {
    "TRANSFORMERS_VERBOSITY": "error",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "ORT_LOGGING_LEVEL": "3",
}


class Screen:
    """The two outputs of a command."""

    def __init__(self) -> None:
        self._out = _console(stderr=False)
        self._err = _console(stderr=True)

    def show(self, what: RenderableType = "") -> None:
        """Show a result: a table, or a line of rich markup."""
        self._out.print(what, soft_wrap=isinstance(what, str))

    def write(self, text: str, *, end: str = "\n") -> None:
        """Write text as it is, at once: what a model says is no markup, and gives no orders to a terminal."""
        self._out.print(text.replace("\x1b", ""), end=end, markup=False, highlight=False, emoji=False, soft_wrap=True)
        self._out.file.flush()

    def note(self, text: str) -> None:
        """A line of rich markup beside the results."""
        self._err.print(text, soft_wrap=True, highlight=False)

    def next(self, *commands: str) -> None:
        """What to do after this command."""
        for place, command in enumerate(commands):
            self._out.print(f"{'Next:' if place == 0 else '  or:'} [cyan]sievert {escape(command)}[/]", soft_wrap=True, highlight=False)

    def error(self, text: str, *, kind: str = "error") -> None:
        """The one message that ends a command."""
        self._err.print(f"[bold red]{kind}:[/] {escape(text)}", soft_wrap=True, highlight=False)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """Names the stages of a long step as they pass: a spinner and ticks on a terminal, plain lines without one."""
        reporter = _Reporter(self._err)
        try:
            yield reporter.begin
        except BaseException:
            reporter.end(well=False)
            raise
        reporter.end(well=True)

    @contextmanager
    def counter(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """Shows how many of how many there are; nothing until the first count."""
        counter = _Counter(self._err, what)
        try:
            yield counter.count
        finally:
            counter.end()


class _Counter:
    """A bar on a terminal; without one, a line for each tenth."""

    def __init__(self, console: Console, what: str) -> None:
        self._console, self._what = console, what
        self._bar: Bar | None = None
        self._task = TaskID(0)
        self._tenths = 0

    def count(self, done: int, total: int) -> None:
        if self._console.is_terminal:
            if self._bar is None:
                columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
                self._bar = Bar(*columns, console=self._console)
                self._task = self._bar.add_task(self._what, total=total)
                self._bar.start()
            self._bar.update(self._task, completed=done)
        elif (tenths := 10 * done // max(1, total)) > self._tenths:
            self._tenths = tenths
            self._console.print(f"  {self._what}: {done} of {total}", soft_wrap=True, highlight=False)

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()


class _Reporter:
    """One line for each stage. What follows a colon is a detail of it, which only a spinner has room for."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None
        self._stage, self._start = "", 0.0

    def begin(self, what: str) -> None:
        stage = what.partition(": ")[0]
        if stage != self._stage:
            self.end(well=True)
            self._stage, self._start = stage, time.monotonic()
            if stage and self._console.is_terminal:
                self._status = self._console.status(escape(stage))
                self._status.start()
            elif stage:  # before it is done, so that a log shows where a build hangs
                self._console.print(f"  {escape(stage)} ...", end="", soft_wrap=True, highlight=False)
                self._console.file.flush()
        if self._status is not None:
            self._status.update(escape(what))

    def end(self, *, well: bool) -> None:
        if not self._stage:
            return
        took = f"{time.monotonic() - self._start:.1f} s"
        if self._status is not None:
            self._status.stop()
            mark = "[green]done[/]" if well else "[red]stopped[/]"
            self._console.print(f"  {mark} {escape(self._stage)} [dim]{took}[/]", soft_wrap=True, highlight=False)
        else:
            self._console.print(f" {took}" if well else " stopped", soft_wrap=True, highlight=False)
        self._stage, self._status = "", None


class _LogHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        style = "yellow" if record.levelno >= logging.WARNING else "dim"
        text = f"{record.levelname.lower()}: {self.format(record)}"
        self._console.print(text, markup=False, highlight=False, soft_wrap=True, style=style)


def configure_output(*, verbosity: int) -> None:
    """Libraries quiet, our warnings shown; 1: our steps too; 2: what libraries say. The only place that configures logging."""
    handler = _LogHandler(_console(stderr=True))
    handler.setFormatter(logging.Formatter("%(name)s: %(message)s" if verbosity else "%(message)s"))
    root, ours = logging.getLogger(), logging.getLogger("sievert")
    for each in (root, ours):
        for old in [old for old in each.handlers if isinstance(old, _LogHandler)]:
            each.removeHandler(old)
    if verbosity < 2:
        os.environ.update({name: value for name, value in _SILENT.items() if name not in os.environ})
        warnings.simplefilter("ignore")
        if not root.handlers:
            root.addHandler(logging.NullHandler())  # else Python prints what libraries warn about
        ours.addHandler(handler)
    else:
        root.addHandler(handler)
        root.setLevel(logging.INFO)
    ours.setLevel((logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)])


def _console(*, stderr: bool) -> Console:
    console = Console(stderr=stderr)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console = Console(stderr=stderr, width=_LOG_WIDTH)
    return console
