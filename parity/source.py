"""A pruned foreign decoder against the graph it was made from, both in ONNX Runtime: where everything is kept they say the same.

The source is run alone on each prompt, unpadded and in one piece, the answer's tokens behind the prompt; ours padded and batched, token by
token through its caches. So padding, batching, the caches and the splice are what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from sievert.bundle.errors import EngineError, InputError
from sievert.bundle.profile import Profile
from sievert.engines.run.base import ModelFile, Session
from sievert.engines.run.ort import OnnxRuntime, failures
from sievert.graph_passes.expose import expose, to_bytes
from sievert.graph_passes.foreign.normalise import ForeignDecoder

Array = NDArray[Any]
TOLERANCES: Final = {"float32": 1e-5, "float16": 1e-2}
"""Of max(1, max |source|). 16 bit is emulated on the CPU and rounds in another order."""
STEPS: Final = 4


@dataclass(frozen=True)
class SourceCheck:
    """The largest difference of logits between the source and ours, what was allowed, and how many rows of logits were compared."""

    rows: int
    worst: float
    allowed: float
    largest: float

    @property
    def passed(self) -> bool:
        """A NaN on either side is no PASS."""
        return self.rows > 0 and bool(self.worst <= self.allowed)


def compare_with_source(
    source: Path, foreign: ForeignDecoder, graphs: Mapping[str, ir.Model], weights: Path, profile: Profile, *, seed: int = 0
) -> SourceCheck:
    """Run both on random prompts. ``graphs`` keep every token; their weights lie beside ``weights``.

    Raises:
        InputError: a dtype that ONNX Runtime does not compute in.
        EngineError: it refused a graph.
    """
    dtype = np.dtype(foreign.decoder.dtype.numpy()).name
    if dtype not in TOLERANCES:
        raise InputError(f"the source computes in {dtype}, for which ONNX Runtime has no kernels on the CPU: leave out --check")
    random = np.random.default_rng(seed)
    ours = _Ours(foreign, graphs, weights, profile)
    theirs = _Source(source, foreign)
    steps = min(STEPS, profile.max_new_tokens)
    lengths = [profile.sequence - row % profile.max_text for row in range(profile.batch)]
    content = ours.make(random, max(lengths) + steps)
    expected = []
    for row, length in enumerate(lengths):
        logits = theirs.run({name: array[row : row + 1, : length + steps] for name, array in content.items()})[0]
        expected.append(logits[length - 1 :])  # [steps + 1, V]
    got = ours.answer(content, lengths, steps)
    reference = np.stack(expected).astype(np.float64)
    largest = float(np.abs(reference).max())
    return SourceCheck(
        rows=reference.shape[0] * reference.shape[1],
        worst=float(np.abs(got - reference).max()),
        allowed=TOLERANCES[dtype] * max(1.0, largest),
        largest=largest,
    )


class _Source:
    """The tool's own graph."""

    def __init__(self, path: Path, foreign: ForeignDecoder) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except failures() as error:
            raise EngineError(f"{path.name}: ONNX Runtime refused the source: {error}") from error
        self._path, self._foreign = path, foreign
        self._types = {value.name: np.dtype(_NUMPY[value.type]) for value in self._session.get_inputs()}
        named = [value.name for value in self._session.get_outputs()]
        self._logits = "logits" if "logits" in named else named[0]

    def run(self, content: Mapping[str, Array]) -> Array:
        """Logits ``[1, n, V]`` of one prompt of ``n`` tokens."""
        roles, length = self._foreign.roles, next(iter(content.values())).shape[1]
        feeds: dict[str | None, Array] = {
            roles.ids: content.get("ids", np.zeros(0)),
            roles.embeds: content.get("embeds", np.zeros(0)),
            roles.mask: np.ones((1, length)),
            roles.positions: np.arange(length)[None],
        }
        feeds |= {past.name: np.zeros((1, past.heads, 0, past.size)) for past in self._foreign.past}
        try:
            logits: Array = self._session.run(
                [self._logits], {name: np.asarray(feeds[name], dtype) for name, dtype in self._types.items() if name in feeds}
            )[0]
        except failures() as error:
            raise EngineError(f"{self._path.name}: ONNX Runtime could not run the source on {length} tokens: {error}") from error
        return logits


class _Ours:
    """The static graphs that keep every token."""

    def __init__(self, foreign: ForeignDecoder, graphs: Mapping[str, ir.Model], weights: Path, profile: Profile) -> None:
        self._profile, self._foreign = profile, foreign
        self._text = ""
        loaded = dict(graphs)
        if "embed_tokens" in loaded:
            merge = next(node for node in loaded["embed_tokens"].graph if node.op_type == "ScatterND")
            self._text = str(merge.inputs[0].name) if merge.inputs[0] is not None else ""
            loaded["embed_tokens"] = expose(loaded["embed_tokens"], [self._text])
        runtime = OnnxRuntime()
        self._sessions: dict[str, Session] = {
            name: runtime.load(ModelFile(weights.with_name(f"{name}.onnx"), "", to_bytes(model))) for name, model in loaded.items()
        }
        self._dtype = np.dtype(foreign.decoder.dtype.numpy())
        self._vocabulary = next(int(spec.shape[1]) for spec in self._sessions["prefill"].outputs if spec.name == "logits")

    def make(self, random: np.random.Generator, length: int) -> dict[str, Array]:
        """Random ``ids[B, n]`` or ``embeds[B, n, D]``."""
        decoder, rows = self._foreign.decoder, (self._profile.batch, length)
        if self._text:
            return {"ids": random.integers(0, self._vocabulary, rows)}
        return {"embeds": random.standard_normal((*rows, decoder.width)).astype(self._dtype)}

    def answer(self, content: Mapping[str, Array], lengths: Sequence[int], steps: int) -> NDArray[np.float64]:
        """Logits ``[B, steps + 1, V]`` after each prompt of ``lengths`` and after each of the ``steps`` tokens that follow it."""
        profile = self._profile
        rows, places = np.arange(profile.batch)[:, None], np.array(lengths)[:, None] + np.arange(steps)
        visual = np.broadcast_to(np.arange(profile.visual_tokens), (profile.batch, profile.visual_tokens)).copy()
        mask = (np.arange(profile.sequence) < np.array(lengths)[:, None]).astype(np.int64)
        first = {name: array[:, : profile.sequence] for name, array in content.items()}
        embeds = first["embeds"] if not self._text else self._embed(np.where(mask > 0, first["ids"], 0), visual)
        positions = np.broadcast_to(np.arange(profile.sequence), mask.shape).copy()
        feeds = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": positions, "visual_index": visual}
        state = self._run("prefill", feeds)
        logits = [state["logits"]]
        for step in range(steps):
            row = np.array(lengths) + step
            following = {name: array[rows, places[:, step : step + 1]] for name, array in content.items()}
            named = {"input_ids" if name == "ids" else "inputs_embeds": array for name, array in following.items()}
            state = self._run("decode", {**named, "position_ids": row[:, None], "cache_row": row}, state)
            logits.append(state["logits"])
        return np.stack(logits, 1).astype(np.float64)

    def _embed(self, ids: Array, visual: Array) -> Array:
        """The source's own embeddings of all rows, through the graph that merges image features: theirs are those of the ids."""
        session = self._sessions["embed_tokens"]
        shape = (*visual.shape, self._foreign.decoder.width)
        feeds = {"input_ids": ids, "visual_index": visual, "image_features": np.zeros(shape, self._dtype)}
        text = session.run(feeds, [self._text])[self._text]
        feeds["image_features"] = np.take_along_axis(text, visual[..., None], 1)
        return session.run(feeds, ["inputs_embeds"])["inputs_embeds"]

    def _run(self, graph: str, feeds: Mapping[str, Array], state: Mapping[str, Array] | None = None) -> dict[str, Array]:
        """One graph; what its caches hold before prefill does not matter."""
        session, given = self._sessions[graph], dict(feeds)
        for spec in session.inputs:
            if spec.name.startswith("past_key_values."):
                past = np.full([int(axis) for axis in spec.shape], 7, self._dtype)
                given[spec.name] = past if state is None else state[spec.name.replace("past_key_values", "present")]
        return session.run(given)


_NUMPY: Final = {
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
}
