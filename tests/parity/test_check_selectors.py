"""Every selector end to end: exported, spliced where its paper cuts, run in ONNX Runtime and judged against the PyTorch model."""

from __future__ import annotations

import pytest

from sievert.bundle.plan import Option, Plan, Stage
from sievert.bundle.profile import Profile
from sievert.bundle.store import Bundle
from sievert.exporter.export import export_model
from sievert.exporter.write import write_bundle
from sievert.graph_passes.prune import add_variant
from sievert.graph_passes.selectors.registry import SELECTORS
from sievert.graph_passes.selectors.schedule import scale_layers
from sievert.parity.check import check_against
from sievert.parity.load import load_reference
from sievert.parity.reference import Reference
from sievert.parity.verdict import Verdict
from tests.tiny_llava import make_tiny_llava

DEPTH, VISUAL = 6, 16
PROFILE = Profile(batch=2, decode_batch=2, visual_tokens=VISUAL, max_text=16, max_new_tokens=3)
CASES: list[tuple[str, dict[str, Option]]] = [
    ("fastv", {}),
    ("pyramiddrop", {}),
    ("sparsevlm", {}),
    ("transprune", {}),
    ("transprune", {"weights": "image", "text": "all", "first": 0}),
    ("dart", {}),
    ("dart", {"on": "embeddings"}),
    ("divprune", {}),
    ("cdpruner", {}),
    ("fopru", {}),
    ("fopru", {"strategy": "row"}),
    ("visionzip", {}),
    ("visionzip", {"queries": "mean"}),
]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("selectors")
    return write_bundle(export_model(make_tiny_llava(folder / "model", layers=DEPTH)), folder / "bundle")


@pytest.fixture(scope="module")
def reference(bundle: Bundle) -> Reference:
    return load_reference(bundle.manifest)


def paper_plan(name: str, options: dict[str, Option]) -> Plan:
    """The paper's schedule for a decoder of ``DEPTH`` layers; half of the tokens where it names no share."""
    schedule = SELECTORS[name].schedule
    layers = scale_layers(schedule.layers, schedule.depth, DEPTH)
    keeps = [round(VISUAL * share) for share in schedule.shares or (0.5,)]
    cuts = zip(layers, keeps, strict=True)
    stages = [Stage(selector=name, layer=layer, keep=keep, requested=str(keep), options=options) for layer, keep in cuts]
    return Plan(stages=tuple(stages), positions=schedule.positions)


@pytest.mark.parametrize(("name", "options"), CASES, ids=["-".join([name, *map(str, options.values())]) for name, options in CASES])
def test_a_true_engine_passes(bundle: Bundle, reference: Reference, name: str, options: dict[str, Option]) -> None:
    plan = paper_plan(name, options)
    add_variant(bundle, name=name, plan=plan, profile=PROFILE, force=True)
    report = check_against(reference, bundle, name, count=3, tokens=2)
    assert (report.verdict, report.reason) == (Verdict.PASS, "")
    judged = {stage.stage for stage in report.stages if stage.verdict is Verdict.PASS}
    assert sum(stage.startswith("selector scores") for stage in judged) == len(plan.stages)
    assert ("vision scores" in judged) == (name in {"fopru", "visionzip"})
    assert all(stage.worst is None or stage.worst.severity < 0.3 for stage in report.stages)
    for sample in report.samples:
        assert all(sample.same_kept) and sample.engine_text == sample.reference_text
