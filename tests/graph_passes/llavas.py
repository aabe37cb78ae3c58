"""A variant of a tiny LLaVA in memory: prompts padded into its graphs, run in ONNX Runtime, and compared with transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from sievert.bundle.plan import Plan, PositionPolicy, Stage
from sievert.bundle.profile import Profile
from sievert.exporter.export import Exported
from sievert.graph_passes.expose import expose
from sievert.graph_passes.variant import make_variant
from sievert.parity.reference import Reference, ReferenceInputs

Array = NDArray[Any]
IMAGE = 4
STEPS = 3


@dataclass(frozen=True)
class Prompts:
    """B prompts: ids ``[L]`` with L different from row to row; ``pixels[B, C, H, W]``, or ``[B, M, C, H, W]`` of M images each."""

    ids: tuple[Array, ...]
    pixels: Array


class Static:
    """A variant in memory, run in ONNX Runtime."""

    def __init__(self, exported: Exported, plan: Plan, profile: Profile, *, exposed: Sequence[str] = ()) -> None:
        graphs = make_variant(exported.graphs, exported.geometry, plan, profile)
        graphs["prefill"] = expose(graphs["prefill"], exposed)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.sessions = {name: ort.InferenceSession(ir.to_proto(model).SerializeToString(), options) for name, model in graphs.items()}
        self.profile = profile

    def run(self, graph: str, feeds: dict[str, Array]) -> dict[str, Array]:
        session = self.sessions[graph]
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        return dict(zip([value.name for value in session.get_outputs()], session.run(None, taken), strict=True))

    def answer(self, prompts: Prompts, tokens: Array) -> tuple[dict[str, Array], list[Array]]:
        """Outputs of prefill, and logits ``[B, V]`` after the prompt and after each of ``tokens[B, T]``."""
        feeds = pad(prompts, self.profile)
        feeds |= self.run("vision_encoder", feeds)
        feeds |= self.run("embed_tokens", feeds)
        for value in self.sessions["prefill"].get_inputs():
            if value.name.startswith("past_key_values"):
                feeds[value.name] = np.full(value.shape, 7e3, np.float32)
        first = self.run("prefill", feeds)
        logits, lengths, state = [first["logits"]], feeds["attention_mask"].sum(1), first
        for token in tokens.T:
            caches = {name.replace("present", "past_key_values"): value for name, value in state.items() if name.startswith("present")}
            state = self.run("decode", {"input_ids": token[:, None], "position_ids": lengths[:, None], "cache_row": lengths, **caches})
            logits.append(state["logits"])
            lengths = lengths + 1
        return first, logits


def pad(prompts: Prompts, profile: Profile) -> dict[str, Array]:
    """Right-padded inputs of the static graphs; those of dynamic text are as long as the longest prompt."""
    batch, length = len(prompts.ids), max(map(len, prompts.ids)) if profile.dynamic_text else profile.sequence
    feeds = {name: np.zeros((batch, length), np.int64) for name in ("input_ids", "attention_mask")}
    for row, ids in enumerate(prompts.ids):
        feeds["input_ids"][row, : len(ids)], feeds["attention_mask"][row, : len(ids)] = ids, 1
    feeds["position_ids"] = np.broadcast_to(np.arange(length), (batch, length)).copy()
    feeds["visual_index"] = np.stack([np.flatnonzero(ids == IMAGE) for ids in prompts.ids])
    feeds["pixel_values"] = prompts.pixels
    return feeds


def reference_inputs(ids: Array, pixels: Array) -> ReferenceInputs:
    """One prompt about the picture ``pixels[C, H, W]``, or about several ``[M, C, H, W]``."""
    several = pixels.reshape(-1, *pixels.shape[-3:])
    return ReferenceInputs(ids, several, len(several))


def plan_of(layers_and_keeps: list[tuple[int, int]], *, selector: str = "iwp", positions: PositionPolicy = "keep") -> Plan:
    stages = tuple(Stage(selector=selector, layer=layer, keep=keep, requested=str(keep)) for layer, keep in layers_and_keeps)
    return Plan(stages=stages, positions=positions)


def assert_close(found: Array, expected: Array, what: str) -> None:
    limit = 1e-5 * max(1.0, float(np.abs(expected).max()))
    worst = float(np.abs(found - expected).max())
    assert worst <= limit, f"{what}: off by {worst:.3g}, allowed {limit:.3g}"


def compare(
    exported: Exported, reference: Reference, plan: Plan, profile: Profile, prompts: Prompts, *, exposed: Sequence[str] = ()
) -> dict[str, Array]:
    """Run the variant and the reference on the engine's own kept tokens; every row's logits and caches agree.

    Gives prefill's outputs, with the ``exposed`` values of its stages.
    """
    tokens = np.random.default_rng(1).integers(5, 60, (profile.batch, STEPS))
    first, logits = Static(exported, plan, profile, exposed=exposed).answer(prompts, tokens)
    for row, ids in enumerate(prompts.ids):
        kept = [first[f"kept_index.{stage}"][row] for stage in range(len(plan.stages))]
        for stage, rows in zip(plan.stages, kept, strict=True):
            assert len(set(rows.tolist())) == stage.keep, "a kept token stands twice"
            assert np.all(ids[rows] == IMAGE) and np.all(np.diff(rows) > 0)
        state, arrays, _ = reference.prefill(reference_inputs(ids, prompts.pixels[row]), plan, kept)
        expected = [state.logits, *(reference.decode(state, int(token)) for token in tokens[row])]
        assert_close(np.stack([step[row] for step in logits]), np.stack(expected), f"logits of row {row} under {plan}")
        for layer in range(exported.geometry.depth):
            for part in ("key", "value"):
                cache = arrays[f"present.{layer}.{part}"]  # [G, rows, d]
                assert_close(first[f"present.{layer}.{part}"][row][:, : cache.shape[1]], cache, f"present.{layer}.{part} of row {row}")
    return first
