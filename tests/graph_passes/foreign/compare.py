"""A folder that `prune-onnx` made, run by file in ONNX Runtime and compared with transformers under the same plan."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from sievert.bundle.plan import Plan
from sievert.parity.reference import Reference, ReferenceInputs
from tests.graph_passes.foreign.sources import load_llava

Array = NDArray[Any]
IMAGE, STEPS = 4, 5


class Folder:
    """The graphs of a folder, by nothing but its files."""

    def __init__(self, path: Path) -> None:
        self.record = json.loads((path / "pruned.json").read_text())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        self.sessions = {name: ort.InferenceSession(path / entry["file"], options) for name, entry in self.record["graphs"].items()}
        self.sequence = self.record["profile"]["visual_tokens"] + self.record["profile"]["max_text"]

    def run(self, graph: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
        session = self.sessions[graph]
        taken = {value.name: feeds[value.name] for value in session.get_inputs()}
        return dict(zip([value.name for value in session.get_outputs()], session.run(None, taken), strict=True))


def assert_close(found: Array, expected: Array, what: str) -> float:
    limit, worst = 1e-5 * max(1.0, float(np.abs(expected).max())), float(np.abs(found - expected).max())
    assert worst <= limit, f"{what}: off by {worst:.3g}, allowed {limit:.3g}"
    return worst


def prompts(rows: int, sequence: int, seed: int = 3) -> list[Array]:
    """Ids of ``rows`` prompts of different lengths, the image after two words."""
    random = np.random.default_rng(seed)
    visual, found = 16, []
    for row in range(rows):
        words = random.integers(5, 60, sequence - visual - row)
        found.append(np.concatenate([words[:2], np.full(visual, IMAGE), words[2:]]))
    return found


def compare_with_transformers(path: Path, shape: str) -> float:
    """Same kept sets as the reference's own selectors, and the same logits and caches after the prompt and after each of STEPS tokens.

    Gives the largest difference of logits.
    """
    folder, llava = Folder(path), load_llava(shape)
    reference, plan = Reference(llava), Plan.model_validate_json(json.dumps(folder.record["plan"]))
    random = np.random.default_rng(5)
    ids = prompts(folder.record["profile"]["batch"], folder.sequence)
    pixels = random.standard_normal((len(ids), 1, 3, 32, 32)).astype(np.float32)
    tokens = random.integers(5, 60, (len(ids), STEPS))
    lengths = np.array([len(row) for row in ids])
    embedded = [reference.embed(ReferenceInputs(row, pixels[number])) for number, row in enumerate(ids)]
    feeds: dict[str, Array] = {name: np.zeros((len(ids), folder.sequence), np.int64) for name in ("input_ids", "attention_mask")}
    for number, row in enumerate(ids):
        feeds["input_ids"][number, : len(row)], feeds["attention_mask"][number, : len(row)] = row, 1
    feeds["position_ids"] = np.broadcast_to(np.arange(folder.sequence), feeds["input_ids"].shape).copy()
    feeds["visual_index"] = np.stack([np.flatnonzero(row == IMAGE) for row in ids])
    feeds["image_features"] = np.stack([features.numpy() for features, _ in embedded])
    if "embed_tokens" in folder.sessions:
        feeds |= folder.run("embed_tokens", feeds)
    else:
        feeds["inputs_embeds"] = np.zeros((len(ids), folder.sequence, embedded[0][1].shape[-1]), np.float32)
        for number, (_, hidden) in enumerate(embedded):
            feeds["inputs_embeds"][number, : hidden.shape[1]] = hidden[0].numpy()
    for value in folder.sessions["prefill"].get_inputs():
        if value.name.startswith("past_key_values"):
            feeds[value.name] = np.full(value.shape, 7e3, np.float32)
    first = state = folder.run("prefill", feeds)
    logits = [first["logits"]]
    table = llava.get_input_embeddings().weight.detach().numpy()
    for step in range(STEPS):
        caches = {name.replace("present", "past_key_values"): value for name, value in state.items() if name.startswith("present")}
        token, row = tokens[:, step : step + 1], lengths + step
        given = {"input_ids": token, "inputs_embeds": table[token], "position_ids": row[:, None], "cache_row": row}
        state = folder.run("decode", {**given, **caches})
        logits.append(state["logits"])
    worst = 0.0
    for number, row in enumerate(ids):
        expected, arrays, traces = reference.prefill(ReferenceInputs(row, pixels[number]), plan)
        for stage, trace in enumerate(traces):
            assert np.array_equal(first[f"kept_index.{stage}"][number], trace.kept), f"kept rows of stage {stage}, prompt {number}"
        steps = [expected.logits, *(reference.decode(expected, int(token)) for token in tokens[number])]
        worst = max(worst, assert_close(np.stack([step[number] for step in logits]), np.stack(steps), f"logits of prompt {number}"))
        for name, cache in arrays.items():
            if name.startswith("present."):
                assert_close(first[name][number][:, : cache.shape[1]], cache, f"{name} of prompt {number}")
    return worst
