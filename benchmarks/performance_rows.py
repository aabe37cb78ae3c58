"""What a row of the performance table is, and the models that rows share."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.performance_model import Reference
from sievert.engines.run.timing import FEWEST_ROUNDS, Ratio, compare, take_turns


@dataclass(frozen=True)
class Row:
    """One ratio and what it should be: at most or at least ``target``; a row without one only states."""

    what: str
    ratio: Ratio
    target: str
    met: bool | None
    note: str

    def line(self) -> str:
        """The row as Markdown."""
        ratio, met = self.ratio, {True: "yes", False: "no", None: ""}[self.met]
        interval = f"{ratio.low:.3f} to {ratio.high:.3f}"
        return f"| {self.what} | {ratio.median:.3f} | {interval} | {ratio.pairs} | {self.target} | {met} | {self.note} |"


def judge(what: str, own: Sequence[float], other: Sequence[float], *, at_most: float = 0.0, at_least: float = 0.0, note: str = "") -> Row:
    """``own`` over ``other`` in pairs, against a target if one is given."""
    ratio = compare(own, other)
    if at_most:
        return Row(what, ratio, f"at most {at_most:g}", ratio.high <= at_most, note)
    if at_least:
        return Row(what, ratio, f"at least {at_least:g}", ratio.low >= at_least, note)
    return Row(what, ratio, "stated", None, note)


@dataclass
class Case:
    """Sizes of a run, and the reference models it has made so far. ``make`` is :func:`make_reference`.

    A comparison takes ``rounds`` rounds, and more until it took ``seconds``: what is short is disturbed more, and cheap to repeat.
    """

    folder: Path
    layers: int
    vocabulary: int
    rounds: int
    seconds: float
    threads: int
    clock: Callable[[], float]
    make: Callable[..., Reference]
    _made: dict[int, Reference] = field(default_factory=dict)

    def take_turns(self, arms: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each arm in each round."""
        start = time.perf_counter()
        taken = take_turns(arms, self.rounds, clock=self.clock)
        elapsed = time.perf_counter() - start
        more = int((self.seconds - elapsed) / elapsed * self.rounds)
        if more >= FEWEST_ROUNDS:
            for name, times in take_turns(arms, more, warm_up=0, clock=self.clock).items():
                taken[name] += times
        return taken

    def reference(self, kv_heads: int = 2) -> Reference:
        """The reference model with this many key heads, made once."""
        if kv_heads not in self._made:
            folder = self.folder / f"{self.layers}-layers-{kv_heads}-kv-heads"
            self._made[kv_heads] = self.make(
                folder, layers=self.layers, vocabulary=self.vocabulary, threads=self.threads, kv_heads=kv_heads
            )
        return self._made[kv_heads]
