"""Lint rules about Attention."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from sievert.graph_passes.lowering.attention import AttentionForm, read_attention, refuse_kernel, refuse_request
from sievert.graph_passes.lowering.rules import Rule, get_input, walk_nodes, where
from sievert.graph_passes.lowering.targets import TARGETS

_LOWER: Final = "lower the graph for this target: a pass writes the operator out"


def _read_forms(model: ir.Model) -> Iterator[tuple[ir.Node, AttentionForm]]:
    for node in walk_nodes(model, "Attention"):
        if (form := read_attention(node)) is not None:
            yield node, form


def _find_unequal_causal(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node, form in _read_forms(model):
        if form.causal and form.query != form.keys:
            yield where(node), f"is_causal with {form.query} query rows and {form.keys} keys"


def _find_without_kernel(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node, form in _read_forms(model):
        if reason := refuse_kernel(form):
            yield where(node), reason


def _find_refused_request(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node, form in _read_forms(model):
        if reason := refuse_request(form):
            yield where(node), reason


def _find_short_masks(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node, form in _read_forms(model):
        if len(form.mask_shape) > 1 and form.mask_shape[-2] != form.query:
            yield where(node), f"a mask {form.mask_shape} over {form.query} query rows"


def _find_attributes(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "Attention"):
        if "softmax_precision" in node.attributes:
            yield where(node), "the attribute softmax_precision"


def _find_softcap(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "Attention"):
        if softcap := node.attributes.get_float("softcap", 0.0):
            yield where(node), f"softcap={softcap:g}"


def _find_caches(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "Attention"):
        if len(node.outputs) > 1 or any(value is not None for value in node.inputs[4:]):
            yield where(node), f"{len(node.outputs)} outputs and {sum(v is not None for v in node.inputs[4:])} cache inputs"


def _find_unknown(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "Attention"):
        if read_attention(node) is None:
            yield where(node), "operands whose types or shapes are not known"


def _find_shared_inputs(model: ir.Model) -> Iterator[tuple[str, str]]:
    read: dict[ir.Value, ir.Node] = {}
    for node in walk_nodes(model, "Attention"):
        for value in (get_input(node, 0), get_input(node, 1)):
            while value is not None and (producer := value.producer()) is not None and producer.op_type == "Identity":
                value = producer.inputs[0]
            if value is not None and value.is_graph_input():
                if value in read:
                    yield where(node), f"graph input {value.name!r} as query or key, like {where(read[value])}"
                read[value] = node


ATTENTION_RULES: Final = (
    Rule(
        "attention-causal-lengths",
        seen="with is_causal and other than as many queries as keys, TensorRT builds and aligns the rows its own way, ONNX Runtime lets "
        "row 0 see key 0 only: the two disagree in silence",
        fix="give the operator a mask made in the graph, or keys of the query's length",
        find=_find_unequal_causal,
        targets=frozenset(TARGETS),
    ),
    Rule(
        "attention-kernel",
        seen="float32: 1 query row builds, 2 do not; 16 bit: head sizes 9..256 build, 8 and 257 do not (with a boolean mask: multiples of "
        "8 from 16), nor does a single head; one query row: at least 4 heads over the whole batch, head size a multiple of 8 up to 256, "
        "(keys + head size) x bytes per element <= 48 KiB, for the most "
        "keys of the range where their number varies. 'Attention operation was not supported by a dedicated kernel'",
        fix=_LOWER,
        find=_find_without_kernel,
    ),
    Rule(
        "attention-mask",
        seen="'Option mask cannot be used together with CausalMaskKind', 'mask must be broadcastable to [batchSize, numHeadsQuery, ...]', "
        "and a float32 mask on float16 queries fails in shape inference; without is_causal, with 2 or 4 axes and the query's type they "
        "build",
        fix=_LOWER,
        find=_find_refused_request,
    ),
    Rule(
        "attention-mask-rows",
        seen="a mask that is the same for all of several query rows: 'inconsistent q_sequence_length (between attn_mask and Q)' when ONNX "
        "Runtime 1.31 runs it; with a row for each query it runs",
        fix="expand the mask to every query row",
        find=_find_short_masks,
        targets=frozenset({"onnxruntime", "onnxruntime-cuda"}),
    ),
    Rule(
        "attention-softmax-precision",
        seen="the attribute at any value: 'Setting softmax precision is not supported in TensorRT Attention'; without it the graph builds",
        fix="lower the graph for this target: a pass drops the attribute",
        find=_find_attributes,
    ),
    Rule(
        "attention-softcap",
        seen="softcap 30: 'Setting softcap is not supported in TensorRT Attention'; 0 builds",
        fix=_LOWER,
        find=_find_softcap,
    ),
    Rule(
        "attention-cache",
        seen="past keys and values, present outputs: 'TensorRT only supports Attention nodes with one output'",
        fix="write the caches with TensorScatter and hand the whole of them to the operator, as the graph contract does",
        find=_find_caches,
    ),
    Rule(
        "attention-shapes",
        seen="an operand of unknown type or shape leaves open whether there is a kernel",
        fix="infer shapes before lowering",
        find=_find_unknown,
        severity="warning",
    ),
    Rule(
        "attention-shared-input",
        seen="one graph input as query or key twice (of two operators, or of one): the builder crashes with a segmentation fault; "
        "computed values may be shared, and so may values",
        fix="compute the query and key in the graph, as a decoder layer does",
        find=_find_shared_inputs,
    ),
)
