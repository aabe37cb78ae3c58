"""Decoders as other tools write them: exported directly with transformers, and put together as compact three-axis graphs.

All hold the text model of a tiny LLaVA, so that the same checkpoint is the reference.
"""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnxscript import GraphBuilder
from transformers import AutoModelForCausalLM, DynamicCache, LlavaForConditionalGeneration

from sievert.exporter.quiet import quiet
from tests.tiny_llava import make_tiny_llava

Form = Literal["ids", "embeds", "past"]
SHAPES: Mapping[str, Mapping[str, Any]] = {
    "llama": {"tower": "clip", "decoder": "llama", "layers": 3},
    "biases": {"tower": "siglip", "decoder": "qwen2", "layers": 3, "heads": 6, "kv_heads": 2, "tied": True},
    "head norms": {"tower": "clip", "decoder": "qwen3", "layers": 3, "head_size": 24},
}
"""Decoders with grouped heads: plain; with biases and a tied head; with norms of queries and keys."""


@cache
def scratch() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="foreign-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


@cache
def load_llava(shape: str) -> Any:
    folder = make_tiny_llava(scratch() / shape, **SHAPES[shape])
    return LlavaForConditionalGeneration.from_pretrained(folder, attn_implementation="sdpa").eval()


@cache
def text_model(shape: str) -> Any:
    """The decoder of the LLaVA as a model of its own, with the same weights."""
    llava = load_llava(shape)
    auto: Any = AutoModelForCausalLM
    model = auto.from_config(llava.config.text_config)
    model.model.load_state_dict(llava.model.language_model.state_dict())
    model.lm_head.load_state_dict(llava.lm_head.state_dict())
    return model.eval()


@cache
def export_directly(shape: str, form: Form, opset: int | None, dtype: torch.dtype = torch.float32) -> Path:
    """The file that transformers' exporter saves; ``opset`` None is its default, weights are external."""
    from transformers import exporters

    library: Any = exporters
    model = text_model(shape)
    config = model.config
    batch, length, before = 2, 7, 5
    mask = torch.ones(batch, length + (before if form == "past" else 0), dtype=torch.int64)
    inputs: dict[str, Any] = {"attention_mask": mask}
    if form == "embeds":
        inputs["inputs_embeds"] = torch.zeros(batch, length, config.hidden_size, dtype=dtype)
        inputs["position_ids"] = torch.arange(length).expand(batch, length).contiguous()
    else:
        inputs = {"input_ids": torch.ones(batch, length, dtype=torch.int64), **inputs}
    if form == "past":
        past = DynamicCache(config=config)
        rows = torch.zeros(batch, config.num_key_value_heads, before, config.head_dim, dtype=dtype)
        for layer in range(config.num_hidden_layers):
            past.update(rows.clone(), rows.clone(), layer)
        inputs["past_key_values"] = past
    with quiet("exporting a decoder as a user would"):
        exported = library.OnnxExporter().export(model.to(dtype), inputs, config=library.OnnxConfig(dynamic=True, opset_version=opset))
    path = scratch() / f"{shape}-{form}-{opset}-{dtype}" / "model.onnx"
    path.parent.mkdir()
    library.OnnxExporter.save_program(exported.program, path)
    model.to(torch.float32)  # after saving: the program holds the parameters themselves
    return path


@dataclass(frozen=True)
class Sizes:
    """The numbers of a decoder."""

    layers: int
    heads: int
    kv_heads: int
    head_size: int
    width: int
    vocabulary: int
    epsilon: float
    theta: float


def sizes_of(shape: str) -> Sizes:
    config = text_model(shape).config
    return Sizes(
        config.num_hidden_layers,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
        config.hidden_size,
        config.vocab_size,
        config.rms_norm_eps,
        config.rope_parameters["rope_theta"],
    )


def state_of(shape: str) -> dict[str, NDArray[np.float32]]:
    return {name: tensor.numpy() for name, tensor in text_model(shape).state_dict().items()}


TINY = Sizes(layers=3, heads=4, kv_heads=2, head_size=8, width=32, vocabulary=40, epsilon=1e-6, theta=1000.0)


def random_state(sizes: Sizes, seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Parameters under the names of transformers, without biases and head norms."""
    random = np.random.default_rng(seed)
    q, kv, D = sizes.heads * sizes.head_size, sizes.kv_heads * sizes.head_size, sizes.width
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (sizes.vocabulary, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (sizes.vocabulary, D),
    }
    for i in range(sizes.layers):
        at = f"model.layers.{i}."
        shapes |= {f"{at}self_attn.{n}_proj.weight": s for n, s in (("q", (q, D)), ("k", (kv, D)), ("v", (kv, D)), ("o", (D, q)))}
        shapes |= {f"{at}mlp.{n}_proj.weight": s for n, s in (("gate", (2 * D, D)), ("up", (2 * D, D)), ("down", (D, 2 * D)))}
        shapes |= {f"{at}{n}_layernorm.weight": (D,) for n in ("input", "post_attention")}
    return {
        name: (random.standard_normal(s) / np.sqrt(s[-1]) if len(s) == 2 else 1 + random.standard_normal(s) / 5).astype(np.float32)
        for name, s in shapes.items()
    }


class Compact:
    """A decoder of few operators a layer: MatMul, RMSNormalization, RotaryEmbedding and Attention on ``[B, S, heads * size]``.

    Attention takes the cache and gives the longer one; rotary tables are looked up at ``position_ids``, inside the operator or before it.
    """

    def __init__(self, sizes: Sizes, state: Mapping[str, NDArray[np.float32]], *, inside: bool = False, rows: int = 512, **attention: Any):
        self.sizes, self.state, self.attention = sizes, state, attention
        self.build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="compact"))
        op = self.op = self.build.op
        self.ids = self.build.input("input_ids", ir.DataType.INT64, ["batch", "sequence"])
        mask = self.build.input("attention_mask", ir.DataType.INT64, ["batch", "total"])
        self.positions = self.build.input("position_ids", ir.DataType.INT64, ["batch", "sequence"])
        shape: list[int | str | None] = ["batch", sizes.kv_heads, "past", sizes.head_size]
        self.past = [
            [self.build.input(f"past_key_values.{i}.{part}", ir.DataType.FLOAT, shape) for part in ("key", "value")]
            for i in range(sizes.layers)
        ]
        angles = np.outer(np.arange(rows), sizes.theta ** (-np.arange(0, sizes.head_size, 2) / sizes.head_size))
        tables = [
            self.build.initializer(ir.tensor(table.astype(np.float32)), name=f"rotary.{name}")
            for name, table in (("cos", np.cos(angles)), ("sin", np.sin(angles)))
        ]
        self.tables = [*tables, self.positions] if inside else [op.Gather(table, self.positions) for table in tables]
        allowed = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), [1])
        lengths = op.Concat(op.Shape(self.ids, start=0, end=1), op.Shape(self.ids, start=1, end=2), op.Shape(mask, start=1, end=2), axis=0)
        self.mask = op.Unsqueeze(op.Expand(allowed, lengths), [1])  # [B, 1, S, T]: padding only
        self.presents: list[ir.Value] = []

    def weight(self, name: str, *, turned: bool = True) -> ir.Value:
        array = self.state[name]
        tensor = ir.tensor(np.ascontiguousarray(array.T if turned else array))
        return self.build.initializer(tensor, name=name + ("_t" if turned else ""))

    def project(self, value: ir.Value, name: str) -> Any:
        product = self.op.MatMul(value, self.weight(f"{name}.weight"))
        return self.op.Add(product, self.weight(f"{name}.bias", turned=False)) if f"{name}.bias" in self.state else product

    def norm(self, value: ir.Value, name: str) -> Any:
        return self.op.RMSNormalization(value, self.weight(f"{name}.weight", turned=False), axis=-1, epsilon=self.sizes.epsilon)

    def rotate(self, value: ir.Value, heads: int, norm: str) -> Any:
        if f"{norm}.weight" in self.state:
            split = self.op.Reshape(value, [0, 0, -1, self.sizes.head_size])
            value = self.op.Reshape(self.norm(split, norm), [0, 0, -1])
        return self.op.RotaryEmbedding(value, *self.tables, num_heads=heads, interleaved=0, rotary_embedding_dim=0)

    def layer(self, stream: ir.Value, index: int) -> Any:
        s, op, at = self.sizes, self.op, f"model.layers.{index}"
        normed = self.norm(stream, f"{at}.input_layernorm")
        q, k, v = (self.project(normed, f"{at}.self_attn.{name}_proj") for name in "qkv")
        q, k = self.rotate(q, s.heads, f"{at}.self_attn.q_norm"), self.rotate(k, s.kv_heads, f"{at}.self_attn.k_norm")
        options = {"is_causal": 1, "q_num_heads": s.heads, "kv_num_heads": s.kv_heads, "scale": s.head_size**-0.5} | self.attention
        attended, *presents = op.Attention(q, k, v, self.mask, *self.past[index], _outputs=3, **options)
        for present, part in zip(presents, ("key", "value"), strict=True):
            present.name = f"present.{index}.{part}"
            present.type, present.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", s.kv_heads, "total", s.head_size])
            self.presents.append(present)
        stream = op.Add(stream, self.project(attended, f"{at}.self_attn.o_proj"))
        normed = self.norm(stream, f"{at}.post_attention_layernorm")
        gate = self.project(normed, f"{at}.mlp.gate_proj")
        hidden = op.Mul(op.Mul(gate, op.Sigmoid(gate)), self.project(normed, f"{at}.mlp.up_proj"))
        return op.Add(stream, self.project(hidden, f"{at}.mlp.down_proj"))

    def finish(self) -> ir.Model:
        stream = self.op.Gather(self.weight("model.embed_tokens.weight", turned=False), self.ids)
        for index in range(self.sizes.layers):
            stream = self.layer(stream, index)
        logits = self.op.MatMul(self.norm(stream, "model.norm"), self.weight("lm_head.weight"))
        logits.type, logits.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape(["batch", "sequence", self.sizes.vocabulary])
        self.build.add_output(logits, "logits")
        for present in self.presents:
            self.build.graph.outputs.append(present)
        return ir.Model(self.build.graph, ir_version=10)


def save(model: ir.Model, name: str) -> Path:
    """As a file with its weights inside."""
    path = scratch() / f"{name}.onnx"
    ir.save(model, path)
    return path
