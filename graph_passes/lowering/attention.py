"""What an Attention operator asks for, and which of these TensorRT has a kernel for.

Every limit was found with the TensorRT for RTX 1.7 builder, without a GPU, by building both sides of it; the same for each compute
capability it offers. Full TensorRT shares the parser and the kernels' documentation but was not tried.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.graph_passes.op import FLOAT

_CARRIED: Final = ("scale", "softmax_precision", "softcap")
_HALF: Final = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_LARGEST_HEAD: Final = 256
# One query row: its keys' scores and the row itself must fit the shared memory of a block (exact for every head size tried).
_ROW_BYTES: Final = 48 << 10


@dataclass(frozen=True)
class AttentionForm:
    """One Attention operator: q ``[B, H, S, d]``, k ``[B, G, T, d]``, v ``[B, G, T, dv]``; the same numbers when q, k, v are 3-D.

    S and T (``query``, ``keys``) are names where they vary with the prompts; equal names are equal sizes. ``flat``: q, k, v are 3-D.
    ``scale`` is None where the operator leaves it at ``1/sqrt(d)``. ``mask`` broadcasts to ``[B, H, S, T]``.
    """

    dtype: ir.DataType
    batch: int
    heads: int
    kv_heads: int
    query: int | str
    keys: int | str
    head_size: int
    value_size: int
    flat: bool
    causal: bool
    scale: float | None
    softcap: float
    mask: ir.Value | None

    @property
    def mask_shape(self) -> tuple[int | str, ...]:
        """Shape of the mask, ``()`` where there is none."""
        return () if self.mask is None else _named_shape(self.mask) or ()

    @property
    def fixed(self) -> tuple[int, int] | None:
        """S and T, where neither varies."""
        return (self.query, self.keys) if isinstance(self.query, int) and isinstance(self.keys, int) else None

    @property
    def boolean_mask(self) -> bool:
        """Whether the mask says which keys may be seen, rather than being added to the scores."""
        return self.mask is not None and self.mask.dtype == ir.DataType.BOOL


def read_attention(node: ir.Node) -> AttentionForm | None:
    """The form of an Attention node; None for any other, and where a shape or type it needs is not known."""
    if node.domain or node.op_type != "Attention":
        return None
    values = [node.inputs[index] if index < len(node.inputs) else None for index in range(4)]
    query, key, value, mask = values
    if query is None or key is None or value is None or query.dtype is None:
        return None
    shapes = [_named_shape(operand) for operand in (query, key, value)]
    if mask is not None and _named_shape(mask) is None:
        return None
    heads, kv_heads = node.attributes.get_int("q_num_heads", 0), node.attributes.get_int("kv_num_heads", 0)
    split = [_split_heads(shape, count) for shape, count in zip(shapes, (heads, kv_heads, kv_heads), strict=True)]
    q, k, v = split
    if q is None or k is None or v is None:
        return None
    attribute = node.attributes.get("scale")
    return AttentionForm(
        dtype=query.dtype,
        batch=q[0],
        heads=q[1],
        kv_heads=k[1],
        query=q[2],
        keys=k[2],
        head_size=q[3],
        value_size=v[3],
        flat=len(shapes[0] or ()) == 3,
        causal=bool(node.attributes.get_int("is_causal", 0)),
        scale=None if attribute is None else attribute.as_float(),
        softcap=node.attributes.get_float("softcap", 0.0),
        mask=mask,
    )


def read_options(node: ir.Node) -> dict[str, float | int]:
    """What an Attention node has by its attributes that one over other rows and heads, with a mask of its own, must have too."""
    return {name: node.attributes[name].value for name in _CARRIED if name in node.attributes}


def refuse_kernel(form: AttentionForm) -> str | None:
    """Why TensorRT has no fused kernel for this form, or None. It builds no other kind of attention from this operator."""
    head = form.head_size
    if form.dtype != FLOAT and form.dtype not in _HALF:
        return f"no kernel for {form.dtype.name.lower()}"
    if form.value_size != head:
        return f"values of head size {form.value_size} with keys of head size {head}"
    if head > _LARGEST_HEAD:
        return f"head size {head} above {_LARGEST_HEAD}"
    if form.query == 1:
        if form.batch * form.heads < 4:
            return f"a single query row in {form.batch * form.heads} heads, counted over the batch: needs 4"
        if head % 8:
            return f"head size {head} with a single query row is no multiple of 8"
        if isinstance(form.keys, str):
            return "a single query row over keys whose number varies: the most there may be decides, and no graph says that"
        if (form.keys + head) * form.dtype.itemsize > _ROW_BYTES:
            longest = _ROW_BYTES // int(form.dtype.itemsize) - head
            return f"{form.keys} keys with a single query row, above {longest} for head size {head} in {form.dtype.name.lower()}"
        return None
    if (form.heads if form.mask is not None else form.batch * form.heads) == 1:
        return "a single head"
    if form.dtype == FLOAT:
        return f"float32 with {form.query} query rows: only one row has a kernel"
    if form.boolean_mask and (head < 16 or head % 8):
        return f"head size {head} with a boolean mask: needs a multiple of 8 from 16 on"
    return f"head size {head} below 9" if head < 9 else None


def refuse_request(form: AttentionForm) -> str | None:
    """Why TensorRT's parser refuses what is asked of the kernel, or None; writing the operator out gets rid of these too."""
    if form.softcap:
        return f"capped scores (softcap {form.softcap:g})"
    if form.causal and form.mask is not None:
        return "is_causal together with a mask"
    if form.mask is not None and not form.boolean_mask and form.mask.dtype != form.dtype:
        return f"a mask of another type ({form.mask.dtype}) than the query ({form.dtype})"
    if len(form.mask_shape) == 3:
        return f"a mask of three axes {form.mask_shape}: the engine reads them as batch, query and key"
    return None


def refuse_decomposition(node: ir.Node, form: AttentionForm) -> str | None:
    """Why this operator cannot be written out as products and a softmax, or None."""
    if len(node.outputs) != 1 or any(value is not None for value in node.inputs[4:]):
        return "it holds a cache, or gives more than one output"
    if form.flat:
        return "its queries, keys and values have three axes instead of four"
    if form.causal and form.query != form.keys:
        return f"is_causal with {form.query} queries and {form.keys} keys means different things to different engines"
    if form.mask is not None and (form.mask_shape[-1] != form.keys or not 2 <= len(form.mask_shape) <= 4):
        return f"its mask {form.mask_shape} does not cover the {form.keys} keys"
    return None


def _split_heads(shape: tuple[int | str, ...] | None, heads: int) -> tuple[int, int, int | str, int] | None:
    """(batch, heads, rows, head size) of a 4-D shape, or of a 3-D one whose last axis holds ``heads`` heads; rows alone may vary."""
    if shape is None or len(shape) not in (3, 4) or (len(shape) == 3 and not heads):
        return None
    batch, *middle, size = shape
    rows = middle[-1]
    count = middle[0] if len(middle) == 2 else heads
    if not (isinstance(batch, int) and isinstance(count, int) and isinstance(size, int)):
        return None
    return batch, count, rows, size if len(middle) == 2 else size // heads


def _named_shape(value: ir.Value) -> tuple[int | str, ...] | None:
    """The shape with axes that vary by name; None where one has none."""
    if value.shape is None:
        return None
    axes = [axis if isinstance(axis, int) else axis.value for axis in value.shape]
    named = tuple(axis if isinstance(axis, int) else str(axis) for axis in axes if axis is not None)
    return named if len(named) == len(axes) else None
