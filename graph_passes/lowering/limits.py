"""Lint rules about single operators other than Attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Final

import onnx_ir as ir

from sievert.graph_passes.lowering.rules import Rule, get_input, static_shape, walk_nodes, where

LARGEST_TOPK: Final = 3840
LARGEST_RANK: Final = 8
_INTEGERS: Final = frozenset({ir.DataType.INT8, ir.DataType.INT32, ir.DataType.INT64, ir.DataType.UINT8})

# What OnnxParser.supports_operator of TensorRT for RTX 1.7.1 answers no to, of the standard operators up to opset 24, and NonZero, which
# it says yes to but has no implementation of.
_NAMES: Final = """
AffineGrid Bernoulli BitCast BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
ConcatFromSequence ConvInteger CumProd DFT DeformConv Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool
MaxUnpool MelWeightMatrix Multinomial NegativeLogLikelihoodLoss NonZero Optional OptionalGetElement OptionalHasElement
QLinearConv QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert
SequenceLength SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit SwiGLU
TfIdfVectorizer Unique
"""
NOT_IN_TENSORRT: Final = frozenset(_NAMES.split())


def _find_unsupported(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        if node.domain == "" and node.op_type in NOT_IN_TENSORRT:
            yield where(node), f"the operator {node.op_type}"
        elif node.domain != "" and node.op_identifier() not in model.functions:
            yield where(node), f"the operator {node.domain}::{node.op_type}"


def _find_control_flow(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "If", "Loop", "Scan"):
        yield where(node), f"control flow ({node.op_type})"


def _find_large_topk(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "TopK"):
        count, shape = get_input(node, 1), static_shape(node.outputs[0])
        constant = None if count is None else ir.convenience.get_const_tensor(count)
        axis = node.attributes.get_int("axis", -1)
        taken = int(constant.numpy().item()) if constant is not None else shape[axis] if shape else 0
        if taken > LARGEST_TOPK:
            yield where(node), f"K={taken}"


def _find_long_scatter(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "ScatterElements"):
        data, indices = static_shape(get_input(node, 0)), static_shape(get_input(node, 1))
        if data is not None and indices is not None and any(i > d for i, d in zip(indices, data, strict=True)):
            yield where(node), f"indices {indices} on data {data}"


def _find_reductions(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "ScatterElements", "ScatterND"):
        if (reduction := node.attributes.get_string("reduction", "none")) != "none":
            yield where(node), f"reduction={reduction!r}"


def _find_caches(model: ir.Model) -> Iterator[tuple[str, str]]:
    nodes = list(walk_nodes(model, "TensorScatter"))
    used = Counter(get_input(node, 0) for node in nodes)
    for node in nodes:
        cache, shape = get_input(node, 0), static_shape(get_input(node, 0))
        rank = 4 if shape is None else len(shape)
        if cache is None or not cache.is_graph_input():
            yield where(node), "a cache that is no graph input"
        elif used[cache] > 1:
            yield where(node), f"the cache {cache.name!r}, which {used[cache]} nodes write to"
        if not node.outputs[0].is_graph_output():
            yield where(node), "an updated cache that is no graph output"
        if rank != 4 or node.attributes.get_int("axis", -2) not in (-2, rank - 2):
            yield where(node), f"axis {node.attributes.get_int('axis', -2)} of a cache of {rank} axes"
        if (mode := node.attributes.get_string("mode", "linear")) != "linear":
            yield where(node), f"mode={mode!r}"


def _find_integer_products(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "MatMul", "Gemm"):
        if node.outputs[0].dtype in _INTEGERS:
            yield where(node), f"a product of {node.outputs[0].dtype}"


def _find_high_rank(model: ir.Model) -> Iterator[tuple[str, str]]:
    for value in _all_values(model):
        if value.shape is not None and len(value.shape) > LARGEST_RANK:
            yield str(value.name), f"{len(value.shape)} axes"


def _find_integer_sums(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "CumSum"):
        if node.outputs[0].dtype in _INTEGERS:
            yield where(node), f"CumSum of {node.outputs[0].dtype}"


def _find_undocumented(model: ir.Model) -> Iterator[tuple[str, str]]:
    for node in walk_nodes(model, "Clip", "ScatterElements", "TopK"):
        dtype = node.outputs[0].dtype
        if node.op_type == "Clip" and dtype in _INTEGERS:
            yield where(node), f"Clip of {dtype}"
        elif node.op_type == "ScatterElements" and dtype == ir.DataType.BOOL:
            yield where(node), "ScatterElements of booleans"
        elif node.op_type == "TopK" and not node.attributes.get_int("sorted", 1):
            yield where(node), "TopK with sorted=0"


def _all_values(model: ir.Model) -> Iterator[ir.Value]:
    yield from model.graph.inputs
    for node in ir.traversal.RecursiveGraphIterator(model.graph):
        yield from node.outputs


OPERATOR_RULES: Final = (
    Rule(
        "unsupported-operator",
        seen="NonZero: 'creator version 1 was not found in plugin registry'; Compress, Unique and others: no importer; another domain: "
        "'Plugin not found'",
        fix="use operators of fixed output shapes: Gather and TopK with constant sizes instead of NonZero or Compress",
        find=_find_unsupported,
    ),
    Rule(
        "control-flow",
        seen="small If, Loop and Scan bodies build in RTX 1.7, but each costs a synchronisation with the host, and merged decoders were "
        "refused elsewhere",
        fix="write one static graph per stage, as the graph contract does",
        find=_find_control_flow,
        severity="warning",
    ),
    Rule(
        "topk-limit",
        seen="K=3840 builds, 3841: 'K exceeds the maximum value allowed (3840)'",
        fix="take fewer at a time, or order by a scattered permutation as the splice does",
        find=_find_large_topk,
    ),
    Rule(
        "scatter-length",
        seen="9 indices on 9 columns build, 10: 'Indices dimensions must be less than data dimensions'",
        fix="scatter into data at least as long as the indices and slice afterwards",
        find=_find_long_scatter,
    ),
    Rule(
        "scatter-reduction",
        seen="ScatterElements: 'Unsupported reduction type'; ScatterND: 'ScatterND with reduction is not supported'; reduction none builds",
        fix="compute the new value first and scatter it, or multiply by a one-hot matrix",
        find=_find_reductions,
    ),
    Rule(
        "cache-update",
        seen="'The cache tensor must be a network input', 'The output tensor must be a network output', 'required to be 4D', 'Sequence "
        "dimension must be -2', 'Only linear mode is supported', and two updates of one cache: 'Input index already mapped'; the update "
        "of a 4-D graph input into a graph output builds",
        fix="let TensorScatter (axis 2 of [B, G, C, d]) stand between a graph input and a graph output, one per cache",
        find=_find_caches,
    ),
    Rule(
        "integer-product",
        seen="MatMul of int64: 'Found unsupported input type of INT64'; of float32 it builds",
        fix="cast to float32 and back where the numbers stay below 2**24, or write it as Mul and ReduceSum",
        find=_find_integer_products,
    ),
    Rule(
        "rank",
        seen="8 axes build, 9: 'Failed to convert ONNX dimensions to TensorRT dimensions'",
        fix="merge axes with Reshape",
        find=_find_high_rank,
    ),
    Rule(
        "integer-cumsum",
        seen="documented for float types only by full TensorRT (TensorRT for RTX builds it); not tried",
        fix="lower the graph for this target: a pass counts in float32",
        find=_find_integer_sums,
        targets=frozenset({"tensorrt"}),
    ),
    Rule(
        "undocumented-type",
        seen="Clip of integers, ScatterElements of booleans and unsorted TopK are not in full TensorRT's documented list (TensorRT for RTX "
        "builds them); not tried",
        fix="use Min and Max, a cast to int64, or sorted=1",
        find=_find_undocumented,
        targets=frozenset({"tensorrt"}),
        severity="warning",
    ),
)
