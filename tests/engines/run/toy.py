"""A two-layer toy that keeps the graphs' contract, in a real bundle, and a numpy model of it that knows no cache.

Layer 0 sees everything, layer 1 the kept visual tokens: every other one, from the first. Weights stand in one external file.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import parser

from sievert.bundle.manifest import GraphEntry, Manifest, Source, Variant
from sievert.bundle.plan import Plan, Stage
from sievert.bundle.profile import Profile
from sievert.bundle.specs import Geometry, TensorSpec
from sievert.bundle.store import Bundle, NewBundle
from sievert.engines.run.prompt import PromptBatch

D, H, G, d, V, NV, PATCH = 8, 4, 2, 4, 40, 4, 3 * 4 * 4 // 4
IMAGE, PAD, EOS = 4, 0, (2, 3)
GEOMETRY = Geometry(
    depth=2, width=D, heads=H, kv_heads=G, head_size=d, vocabulary=V, attention_scale=d**-0.5, max_positions=64, image_token_id=IMAGE,
    pad_token_id=PAD, eos_token_ids=EOS, image_height=4, image_width=4, channels=3, grid=(2, 2), visual_tokens=NV,
)  # fmt: skip
SOURCE = Source(model="toy", architecture="Toy", family="toy", vision="toy", text="toy", dtype="float32")
THIRD = "third_f = Constant <value = float {0.3}> ()\nthird = CastLike(third_f, embed)\n"
CODES = {"float32": "float", "float16": "float16", "int64": "int64"}


@dataclass(frozen=True)
class Toy:
    """A toy's sizes and weights. ``keep`` = NV means no cut."""

    batch: int = 1
    decode_batch: int = 1
    max_text: int = 6
    max_new: int = 5
    keep: int = 2
    dtype: str = "float32"
    seed: int = 0

    @property
    def profile(self) -> Profile:
        return Profile(
            batch=self.batch, decode_batch=self.decode_batch, visual_tokens=NV, max_text=self.max_text, max_new_tokens=self.max_new
        )

    @property
    def plan(self) -> Plan:
        return Plan(stages=(Stage(selector="uniform", layer=1, keep=self.keep, requested=str(self.keep)),) if self.keep < NV else ())

    @property
    def kept(self) -> np.ndarray:
        """Numbers of the kept visual tokens."""
        return np.arange(NV)[:: NV // self.keep]

    def weights(self) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(self.seed)
        shapes = {"embed": (V, D), "pos": (64, D), "vis": (PATCH, D), "head": (D, V)}
        for layer in range(2):
            shapes |= {f"q{layer}": (D, H * d), f"k{layer}": (D, G * d), f"v{layer}": (D, G * d), f"o{layer}": (H * d, D)}
        weights = {name: (0.4 * rng.standard_normal(shape)).astype(self.dtype) for name, shape in shapes.items()}
        weights["head"][:, list(EOS)] *= 0.1  # stop tokens are rare, not impossible
        return weights

    def reference(self, tokens: np.ndarray, features: np.ndarray, visual: np.ndarray) -> np.ndarray:
        """Logits ``[V]`` after all ``tokens[L]`` of one row, computed from scratch."""
        w = {name: value.astype(np.float64) for name, value in self.weights().items()}
        x = w["embed"][tokens]
        x[visual] = features
        x = x + w["pos"][np.arange(len(tokens))]
        dropped = np.delete(visual, self.kept)
        x = _layer(x, w, 0)
        x = _layer(np.delete(x, dropped, axis=0), w, 1)
        logits: np.ndarray = x[-1] @ w["head"]
        return logits


def _layer(x: np.ndarray, w: dict[str, np.ndarray], layer: int) -> np.ndarray:
    L = len(x)
    q = (x @ w[f"q{layer}"]).reshape(L, H, d)
    k, v = ((x @ w[f"{name}{layer}"]).reshape(L, G, d).repeat(H // G, axis=1) for name in "kv")
    scores = np.einsum("ihd,jhd->hij", q, k) * d**-0.5
    scores[:, np.triu(np.ones((L, L), bool), 1)] = -np.inf
    p = np.exp(scores - scores.max(-1, keepdims=True))
    mixed = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(L, H * d)
    stream: np.ndarray = x + 0.3 * (mixed @ w[f"o{layer}"])
    return stream


def _heads(x: str, layer: int) -> str:
    return "".join(
        f"{n}{layer}_r = MatMul({x}, {n}{layer})\n"
        f"{n}{layer}_s = Reshape <allowzero=0> ({n}{layer}_r, shape_{n})\n"
        f"{n}{layer}_h = Transpose <perm=[0, 2, 1, 3]> ({n}{layer}_s)\n"
        for n in "qkv"
    )  # [B, heads, S, d]


def _mix(x: str, layer: int, attention: str, y: str) -> str:
    return f"""{_heads(x, layer)}
{attention}
a{layer}_t = Transpose <perm=[0, 2, 1, 3]> (a{layer})
a{layer}_r = Reshape (a{layer}_t, shape_o)
a{layer}_o = MatMul(a{layer}_r, o{layer})
a{layer}_m = Mul(a{layer}_o, third)
{y} = Add({x}, a{layer}_m)"""


def _shape_consts(B: int) -> str:
    return (
        f"shape_q = Constant <value = int64[4] {{{B}, -1, {H}, {d}}}> ()\n"
        f"shape_k = Constant <value = int64[4] {{{B}, -1, {G}, {d}}}> ()\n"
        f"shape_v = Constant <value = int64[4] {{{B}, -1, {G}, {d}}}> ()\n"
        f"shape_o = Constant <value = int64[3] {{{B}, -1, {H * d}}}> ()\n"
    )


def _caches(toy: Toy, B: int) -> tuple[str, str]:
    """The cache inputs and outputs of a graph of batch B, as ONNX text."""
    capacities = (toy.profile.capacity(), toy.profile.capacity(NV - toy.keep))
    shapes = {
        f"{layer}_{part}": f"{CODES[toy.dtype]}[{B},{G},{capacity},{d}]"
        for layer, capacity in enumerate(capacities)
        for part in ("key", "value")
    }
    past = ", ".join(f"{shape} past_key_values_{name}" for name, shape in shapes.items())
    return past, ", ".join(f"{shape} present_{name}" for name, shape in shapes.items())


def _store(layer: int, row: str) -> str:
    return "".join(
        f'present_{layer}_{part} = TensorScatter <axis=-2, mode="linear"> (past_key_values_{layer}_{part}, {n}{layer}_h, {row})\n'
        for n, part in (("k", "key"), ("v", "value"))
    )


def _vision(toy: Toy) -> tuple[str, str]:
    f, B = CODES[toy.dtype], toy.batch
    return (
        f"({f}[{B},3,4,4] pixel_values) => ({f}[{B},{NV},{D}] image_features)",
        f"shape = Constant <value = int64[3] {{{B}, {NV}, {PATCH}}}> ()\nflat = Reshape(pixel_values, shape)\n"
        "image_features = MatMul(flat, vis)",
    )


def _embed(toy: Toy) -> tuple[str, str]:
    f, B, S = CODES[toy.dtype], toy.batch, toy.profile.sequence
    return (
        f"(int64[{B},{S}] input_ids, {f}[{B},{NV},{D}] image_features, int64[{B},{NV}] visual_index) => ({f}[{B},{S},{D}] inputs_embeds)",
        "words = Gather(embed, input_ids)\ntwo = Constant <value = int64[1] {2}> ()\nindex3 = Unsqueeze(visual_index, two)\n"
        f"wide = Constant <value = int64[3] {{{B}, {NV}, {D}}}> ()\nindex = Expand(index3, wide)\n"
        "inputs_embeds = ScatterElements <axis=1> (words, index, image_features)",
    )


def _cut(toy: Toy) -> str:
    """The rows of layer 0's output that layer 1 sees, without NonZero: the largest of a falling score that is 0 where dropped."""
    B, S, drop = toy.batch, toy.profile.sequence, NV - toy.keep
    if not drop:
        return "\nx1 = Identity(y0)\nlength1 = Identity(length)\n"
    return f"""
dropped_no = Constant <value = int64[{drop}] {{{", ".join(map(str, np.delete(np.arange(NV), toy.kept)))}}}> ()
kept_no = Constant <value = int64[{toy.keep}] {{{", ".join(map(str, toy.kept))}}}> ()
kept_index_0 = Gather <axis=1> (visual_index, kept_no)
dropped_at = Gather <axis=1> (visual_index, dropped_no)
ones_shape = Constant <value = int64[2] {{{B}, {S}}}> ()
ones = ConstantOfShape <value = float[1] {{1}}> (ones_shape)
zero_shape = Constant <value = int64[2] {{{B}, {drop}}}> ()
zeros = ConstantOfShape <value = float[1] {{0}}> (zero_shape)
alive = ScatterElements <axis=1> (ones, dropped_at, zeros)
falling = Constant <value = float[{S}] {{{", ".join(str(float(S - i)) for i in range(S))}}}> ()
score = Mul(alive, falling)
count = Constant <value = int64[1] {{{S - drop}}}> ()
top, rows = TopK <axis=1> (score, count)
two = Constant <value = int64[1] {{2}}> ()
rows3 = Unsqueeze(rows, two)
x1 = GatherND <batch_dims=1> (y0, rows3)
dropped_count = Constant <value = int64[1] {{{drop}}}> ()
length1 = Sub(length, dropped_count)
"""


def _prefill(toy: Toy) -> tuple[str, str]:
    f, B, S = CODES[toy.dtype], toy.batch, toy.profile.sequence
    past, present = _caches(toy, B)
    kept = f", int64[{B},{toy.keep}] kept_index_0" if toy.keep < NV else ""
    causal = "a{0} = Attention <is_causal=1> (q{0}_h, k{0}_h, v{0}_h)\n"
    return (
        f"({f}[{B},{S},{D}] inputs_embeds, int64[{B},{S}] position_ids, int64[{B},{S}] attention_mask, int64[{B},{NV}] visual_index, "
        f"{past}) => (float[{B},{V}] logits, {present}{kept})",
        THIRD + _shape_consts(B) + f"where = Constant <value = int64[{B}] {{{', '.join('0' * B)}}}> ()\n"
        "p = Gather(pos, position_ids)\nx0 = Add(inputs_embeds, p)\n"
        "one = Constant <value = int64[1] {1}> ()\nlength = ReduceSum <keepdims=0> (attention_mask, one)\n"
        + _mix("x0", 0, _store(0, "where") + causal.format(0), "y0")
        + _cut(toy)
        + _mix("x1", 1, _store(1, "where") + causal.format(1), "y1")
        + "\nlast = Sub(length1, one)\nlast2 = Unsqueeze(last, one)\nh = GatherND <batch_dims=1> (y1, last2)\n"
        "logits_m = MatMul(h, head)\nlogits = Cast <to=1> (logits_m)",
    )


def _decode(toy: Toy) -> tuple[str, str]:
    B, drop = toy.decode_batch, NV - toy.keep
    past, present = _caches(toy, B)
    layers = ""
    for i in range(2):
        places = ", ".join(map(str, range(toy.profile.capacity(drop * i))))
        layers += f"""
drop{i} = Constant <value = int64[1] {{{drop * i}}}> ()
row{i} = Sub(cache_row, drop{i})
places{i} = Constant <value = int64[{toy.profile.capacity(drop * i)}] {{{places}}}> ()
row{i}_4 = Unsqueeze(row{i}, axes)
mask{i} = LessOrEqual(places{i}, row{i}_4)
"""
        attention = f"a{i} = Attention (q{i}_h, present_{i}_key, present_{i}_value, mask{i})\n"
        layers += _mix(f"x{i}", i, _store(i, f"row{i}") + attention, f"x{i + 1}")
    return (
        f"(int64[{B},1] input_ids, int64[{B},1] position_ids, int64[{B}] cache_row, {past}) => (float[{B},{V}] logits, {present})",
        THIRD + _shape_consts(B) + "e = Gather(embed, input_ids)\np = Gather(pos, position_ids)\nx0 = Add(e, p)\n"
        "axes = Constant <value = int64[3] {1, 2, 3}> ()\n"
        + layers
        + "\none = Constant <value = int64[1] {1}> ()\nh = Squeeze(x2, one)\nlogits_m = MatMul(h, head)\nlogits = Cast <to=1> (logits_m)",
    )


def graphs(toy: Toy) -> dict[str, tuple[str, str]]:
    """``{name: (signature, body)}`` in ONNX text."""
    return {"vision_encoder": _vision(toy), "embed_tokens": _embed(toy), "prefill": _prefill(toy), "decode": _decode(toy)}


def _dotted(name: str) -> str:
    """ONNX text knows no dots in names; the contract's names have them."""
    return re.sub(r"^(past_key_values|present|kept_index)_(\d)(?:_(key|value))?$", lambda m: ".".join(filter(None, m.groups())), name)


def build_model(
    name: str, signature: str, body: str, weights: dict[str, np.ndarray], *, location: str = "", offsets: dict[str, int] | None = None
) -> onnx.ModelProto:
    model = parser.parse_model(f'<ir_version: 11, opset_import: ["" : 24]>\n{name} {signature}\n{{\n{body}\n}}')
    for node in model.graph.node:
        node.input[:], node.output[:] = [_dotted(name) for name in node.input], [_dotted(name) for name in node.output]
    for value in (*model.graph.input, *model.graph.output):
        value.name = _dotted(value.name)
    used = {value for node in model.graph.node for value in node.input}
    for weight, array in weights.items():
        if weight not in used:
            continue
        tensor = onnx.numpy_helper.from_array(array, weight)
        if location and offsets is not None:
            tensor.ClearField("raw_data")
            tensor.data_location = onnx.TensorProto.EXTERNAL
            for key, value in (("location", location), ("offset", offsets[weight]), ("length", array.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
        model.graph.initializer.append(tensor)
    return model


def specs(values: list[onnx.ValueInfoProto]) -> tuple[TensorSpec, ...]:
    names = {1: "float32", 7: "int64", 10: "float16"}
    return tuple(
        TensorSpec(
            name=value.name,
            dtype=names[value.type.tensor_type.elem_type],
            shape=tuple(axis.dim_value for axis in value.type.tensor_type.shape.dim),
        )
        for value in values
    )


def add_graphs(new: NewBundle, toy: Toy, location: str, offsets: dict[str, int], tag: str) -> dict[str, GraphEntry]:
    entries = {}
    for name, (signature, body) in graphs(toy).items():
        model = build_model(name, signature, body, toy.weights(), location=location, offsets=offsets)
        file = new.add_bytes(f"{tag}-{name}", ".onnx", model.SerializeToString())
        entries[name] = GraphEntry(file=file, inputs=specs(list(model.graph.input)), outputs=specs(list(model.graph.output)))
    return entries


def make_bundle(path: Path, **toys: Toy) -> Bundle:
    """A bundle with one variant per toy; toys of one bundle share their weights."""
    weights = next(iter(toys.values())).weights()
    offsets, data = {}, b""
    for name, array in weights.items():
        offsets[name] = len(data)
        data += array.tobytes() + b"\0" * (-array.nbytes % 64)
    with Bundle.create(path) as new:
        location = new.add_bytes("weights", ".data", data)
        variants = {
            tag: Variant(
                plan=toy.plan,
                profile=toy.profile,
                capacities=(toy.profile.capacity(), toy.profile.capacity(NV - toy.keep)),
                graphs=add_graphs(new, toy, location, offsets, tag),
            )
            for tag, toy in toys.items()
        }
        new.finish(Manifest(source=SOURCE, geometry=GEOMETRY, weights_file=location, weights=(), files={}, graphs={}, variants=variants))
    return Bundle.open(path)


def make_batch(toy: Toy, prompts: list[list[int]], places: list[int], *, seed: int = 1) -> PromptBatch:
    """Prompts of text tokens with the picture at a place of their own, one picture per row, padded as Prompter does."""
    B, S = toy.batch, toy.profile.sequence
    filled = [(*pair,) for pair in zip(prompts, places, strict=True)]
    rows = len(filled)
    filled += [filled[-1]] * (B - rows)
    ids, lengths = np.full((B, S), PAD), []
    for row, (words, place) in enumerate(filled):
        tokens = [*words[:place], *[IMAGE] * NV, *words[place:]]
        ids[row, : len(tokens)] = tokens
        lengths.append(len(tokens))
    mask = np.arange(S) < np.array(lengths)[:, None]
    pixels = np.random.default_rng(seed).standard_normal((rows, 3, 4, 4)).astype(np.float32)
    return PromptBatch(
        pixel_values=np.concatenate([pixels, *[pixels[-1:]] * (B - rows)]),
        input_ids=ids,
        attention_mask=mask.astype(np.int64),
        position_ids=np.minimum(np.arange(S), np.array(lengths)[:, None] - 1),
        visual_index=np.stack([np.arange(place, place + NV) for _, place in filled]),
        lengths=tuple(lengths),
        rows=rows,
    )
