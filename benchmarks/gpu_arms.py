"""What one engine runs against PyTorch in the GPU benchmark: vision, prefill at three shares, decode, and what the device holds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from benchmarks import performance_peers as peers
from benchmarks.performance_decode import TOKENS, run_steps
from benchmarks.performance_model import KEEPS, NEW, VISUAL, Reference, name_of
from sievert.bundle.errors import SievertError
from sievert.bundle.store import Bundle
from sievert.engines.run.alone import Alone
from sievert.engines.run.footprint import read_footprint
from sievert.engines.run.ort import OnnxRuntime
from sievert.engines.run.registry import find_runtime
from sievert.engines.run.timing import compare, take_turns
from sievert.graph_passes.bound import build_bound
from sievert.graph_passes.flops import count_flops

PICTURE: Final = (3, 336, 336)
WARM_UP: Final = 3  # an engine may still compile in its first run, and allocate in its second
RATIOS: Final = (
    ("pruned", "bound"),
    ("pruned", "full"),
    ("full", "PyTorch"),
    ("pruned", "PyTorch pruned by hooks"),
    ("engine", "PyTorch"),
)

Arms = Mapping[str, Callable[[], object]]


@dataclass
class Case:
    """One engine and its rival; ``model`` is None where PyTorch does not reach the device. ``loaded_s``: to build and load each graph."""

    reference: Reference
    model: Any
    device: str
    rounds: int
    loaded_s: dict[str, float] = field(default_factory=dict)
    _full: dict[str, Alone] = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """Rows of a prompt."""
        return self.reference.profile.sequence

    def load(self, variant: str, graph: str) -> Alone:
        """A graph of a variant, lowered and built for the engine; those of ``full`` are kept, as several groups have them."""
        name = f"{variant}.{graph}"
        if name in self._full:
            return self._full[name]
        if graph == "bound":
            entry, geometry = self.reference.bundle.variant(variant), self.reference.bundle.manifest.geometry
            model = build_bound(self.reference.dynamic("decoder"), geometry, entry.plan, entry.profile)
        else:
            model = self.reference.graph(variant, graph)
        start = time.perf_counter()
        loaded = self.reference.load_model(model, name, self.reference.bundle.variant(variant).profile)
        self.loaded_s[name] = round(time.perf_counter() - start, 2)
        if variant == "full":
            self._full[name] = loaded
        return loaded

    def used_mib(self) -> int:
        """What the device holds; on the CPU, what this process holds beside mapped files."""
        if self.device == "cpu":
            return read_footprint().anonymous >> 20
        free, total = torch.cuda.mem_get_info()
        return int(total - free) >> 20


def vision(case: Case) -> tuple[Arms, dict[str, Any]]:
    """One picture."""
    arms: dict[str, Callable[[], object]] = {"engine": case.load("full", "vision_encoder").run}
    if case.model is not None:
        arms["PyTorch"] = peers.run_torch_vision(case.model, PICTURE)
    return arms, {}


def prefill(keep: str) -> Callable[[Case], tuple[Arms, dict[str, Any]]]:
    """A prompt, unpruned, pruned to ``keep``, and with the kept tokens given."""

    def group(case: Case) -> tuple[Arms, dict[str, Any]]:
        reference, variant = case.reference, name_of(keep)
        arms: dict[str, Callable[[], object]] = {
            "full": case.load("full", "prefill").run,
            "pruned": case.load(variant, "prefill").run,
            "bound": case.load(variant, "bound").run,
        }
        if case.model is not None:
            count = reference.bundle.variant(variant).plan.stages[0].keep
            arms["PyTorch"] = peers.run_torch(case.model, case.rows)
            arms["PyTorch pruned by hooks"] = peers.run_torch_pruned(case.model, case.rows, reference.layer, VISUAL, count)
        flops = [count_flops(reference.graph(name, "prefill")) for name in (variant, "full")]
        return arms, {"pruned over full by FLOPs": flops[0] / flops[1]}

    return group


def decode(case: Case) -> tuple[Arms, dict[str, Any]]:
    """Steps after a full prompt; PyTorch with a static cache. Milliseconds are of one token."""
    arms: dict[str, Callable[[], object]] = {
        "full": run_steps(case.load("full", "decode")),
        "pruned": run_steps(case.load(name_of(KEEPS[-1]), "decode")),
    }
    if case.model is not None:
        arms["PyTorch"] = peers.run_torch_decode(case.model, case.rows, NEW, TOKENS)
    return arms, {"tokens": TOKENS}


GROUPS: Final[Mapping[str, Callable[[Case], tuple[Arms, dict[str, Any]]]]] = {
    "vision": vision,
    **{f"prefill, {keep}": prefill(keep) for keep in KEEPS},
    "decode": decode,
}


def measure_engine(engine: str, device: str, checkpoint: Path, bundle: Path, *, rounds: int, threads: int) -> dict[str, Any]:
    """All groups of one engine as plain values. A group that the engine or PyTorch refuses says so, and the others are measured."""
    runtime = OnnxRuntime(threads=threads) if engine == "onnxruntime" else find_runtime(engine)
    case = Case(Reference(checkpoint, Bundle.open(bundle), runtime), None, device, rounds)
    found: dict[str, Any] = {"version": runtime.version(), "PyTorch": "", "held_mib": {}, "groups": {}}
    if device == "cuda" and not torch.cuda.is_available():
        found["PyTorch"] = f"PyTorch {torch.__version__} sees no GPU: it was not measured"
    else:
        found["held_mib"] = _measure_held(case)
        case.model = peers.load_torch(checkpoint, threads, device=device, dtype=torch.float16 if device == "cuda" else torch.float32)
        found["held_mib"]["PyTorch"] = case.used_mib() - found["held_mib"].pop("after")
    for name, group in GROUPS.items():
        try:
            found["groups"][name] = _measure_group(case, group)
        except (SievertError, torch.OutOfMemoryError) as error:
            found["groups"][name] = {"refused": f"{type(error).__name__}: {error}"}
    return {**found, "loaded_s": case.loaded_s}


def _measure_held(case: Case) -> dict[str, int]:
    """MiB that the loaded pair of prefill and decode holds once both ran, and what is held after it is gone."""
    before = case.used_mib()
    try:
        pair = [case.load(name_of(KEEPS[-1]), graph) for graph in ("prefill", "decode")]
        for graph in pair:
            graph.run()
        held = {"prefill and decode": case.used_mib() - before}
        for graph in pair:
            graph.close()
        del pair, graph
    except SievertError:  # its group says why
        held = {}
    return {**held, "after": case.used_mib()}


def _measure_group(case: Case, group: Callable[[Case], tuple[Arms, dict[str, Any]]]) -> dict[str, Any]:
    arms, known = group(case)
    seconds = take_turns(arms, case.rounds, warm_up=WARM_UP)
    each = known.get("tokens", 1)
    ratios = {f"{own} / {other}": asdict(compare(seconds[own], seconds[other])) for own, other in RATIOS if {own, other} <= seconds.keys()}
    return {**known, "ms": {name: statistics.median(times) * 1e3 / each for name, times in seconds.items()}, "ratios": ratios}
