"""Let the vision encoder say how much attention its patches receive: what selectors that prune before layer 0 rank by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import GraphError, PlanError
from sievert.bundle.specs import Geometry
from sievert.graph_passes.decoder import confirm_scope
from sievert.graph_passes.lowering.attention import AttentionForm, read_attention, refuse_decomposition
from sievert.graph_passes.op import FLOAT, Op, cast_float, take_outputs
from sievert.graph_passes.selectors.base import VisionTap

VISUAL_SCORES: Final = "visual_scores"
_SCOPE: Final = "vision_scores"
LARGEST_MAP: Final = 2048 * 2048
"""Elements of an attention map, per head, that are computed at once. Beyond 2,048 patches the query rows come in blocks."""


@dataclass(frozen=True)
class AddVisionScores(ir.passes.InPlacePass):
    """Add the output ``visual_scores[B, Nv]`` float32 to a static vision encoder.

    Before::

        pixel_values -> ... -> q, k[B, H, N, d] -> Attention -> ... -> image_features[B, Nv, D]

    After::

        pixel_values -> ... -> q, k[B, H, N, d] -> Attention -> ... -> image_features[B, Nv, D]
                                 |
                                 +-> softmax over all N keys -> mean over heads and query rows -> visual_scores[B, Nv]

    The probabilities are computed a second time, in float32: no operator gives both them and a fused attention. Columns of leading tokens
    that the features drop are left out after the softmax, so the scores of an image need not sum to 1.
    """

    tap: VisionTap
    geometry: Geometry
    largest_map: int = LARGEST_MAP

    def requires(self, model: ir.Model) -> None:
        """No scores yet.

        Raises:
            PreconditionError: there are.
        """
        if any(value.name == VISUAL_SCORES for value in model.graph.outputs):
            raise ir.passes.PreconditionError(f"{model.graph.name} gives {VISUAL_SCORES} already")

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        """Append the subgraph.

        Raises:
            PlanError: the encoder exposes no attention, or not that of the layer the selector reads.
            GraphError: its attention has another structure than the one the scores are defined for.
        """
        graph = model.graph
        node = self._find_attention(graph)
        form = self._read_form(node)
        # In a graph of their own first: there the builder's names for constants cannot meet those of an earlier builder.
        added = ir.Graph([], [], nodes=[], opset_imports={"": graph.opset_imports[""]}, name=_SCOPE)
        build = GraphBuilder(added)
        build.push_module(_SCOPE)
        scores = self._score_columns(build.op, node, form)  # [B, N]
        assert form.fixed is not None  # noqa: S101 - or it would have been refused
        keys = form.fixed[1]
        if dropped := keys - self.geometry.visual_tokens:
            scores = build.op.Slice(scores, [dropped], [keys], [1])
        for value in list(added.initializers.values()):
            del added.initializers[str(value.name)]
            value.name = f"{_SCOPE}.{value.name}"
            graph.register_initializer(value)
        nodes = list(added)
        added.remove(nodes)
        graph.extend(nodes)
        scores.name = VISUAL_SCORES
        graph.outputs.append(scores)
        return ir.passes.PassResult(model, modified=True)

    def ensures(self, model: ir.Model) -> None:
        """One score for each visual token.

        Raises:
            PostconditionError: the output has another shape or dtype.
        """
        scores, features = model.graph.outputs[-1], model.graph.outputs[0]
        if scores.dtype != FLOAT or scores.shape is None or features.shape is None or scores.shape != features.shape[:2]:
            raise ir.passes.PostconditionError(f"{scores.name} is {scores.dtype}{scores.shape} beside features of shape {features.shape}")

    def _find_attention(self, graph: ir.Graph) -> ir.Node:
        """The Attention operator of the layer that is read; the graph ends with the last layer the features use."""
        nodes = [node for node in graph if node.domain == "" and node.op_type == "Attention"]
        if not nodes:
            raise PlanError(
                f"{graph.name} has no Attention operator to read scores from (the features may leave before its first layer): use a "
                "selector that reads the embeddings or the decoder"
            )
        for index, node in enumerate(nodes):
            confirm_scope(node, index)
        depth = self.geometry.vision_layers
        if depth and len(nodes) > depth:
            raise GraphError(f"{graph.name} has {len(nodes)} Attention operators but {depth} layers: one of them is no layer's")
        if self.tap.layer == "feature":
            return nodes[-1]
        if depth < 2:
            raise PlanError(f"{graph.name} has {depth or 'an unknown number of'} layers: there is no second-last one to read")
        if len(nodes) < depth - 1:
            raise PlanError(
                f"the selector reads layer {depth - 2}, the second-last of the vision encoder, but the features leave after layer "
                f"{len(nodes) - 1} and nothing later is computed: use a selector that reads the layer the features come from, such as fopru"
            )
        return nodes[depth - 2]

    def _read_form(self, node: ir.Node) -> AttentionForm:
        """The numbers of an operator that is plain attention of all patches to all patches, one column per patch or class token."""
        form, what = read_attention(node), f"Attention node {node.name!r} of the vision encoder"
        if form is None or form.fixed is None:
            raise GraphError(f"{what} has operands of unknown shape or dtype")
        if reason := refuse_decomposition(node, form) or ("it caps its scores (softcap)" if form.softcap else None):
            raise GraphError(f"{what} cannot be read: {reason}")
        if form.mask is not None or form.causal or form.heads != form.kv_heads:
            raise GraphError(f"{what} has a mask or grouped heads: expected every patch to see every patch, in {form.kv_heads} heads")
        g, (query, keys) = self.geometry, form.fixed
        rows, columns = g.grid or (0, 0)
        patches, visual = rows * columns, g.visual_tokens
        leading = keys - patches
        # A bundle made before class tokens were recorded may have one.
        expected = {g.class_tokens} if g.vision_layers else {0, 1}
        if query != keys or leading not in expected or not 0 <= keys - visual <= max(1, leading):
            raise GraphError(
                f"{what} has {query} rows and {keys} columns; expected the {patches} patches of the grid and "
                f"{' or '.join(map(str, sorted(expected)))} class tokens, for {visual} visual tokens (merged or windowed patches?)"
            )
        return form

    def _score_columns(self, op: Op, node: ir.Node, form: AttentionForm) -> ir.Value:
        """Mean attention that each key receives, over heads and the query rows that count: [B, N]."""
        query, key = node.inputs[0], node.inputs[1]
        assert query is not None and key is not None and form.fixed is not None  # noqa: S101 - or there would be no form
        keys = op.Transpose(cast_float(op, key), perm=[0, 1, 3, 2])  # [B, H, d, N]
        scale = form.head_size**-0.5 if form.scale is None else form.scale
        (queries, columns), blocks = form.fixed, [query]
        count = queries
        if self.tap.reads_class_token(self.geometry):
            count, blocks = 1, [op.Slice(query, [0], [1], [2])]
        elif (rows := max(1, self.largest_map // columns)) < queries:
            sizes = [min(rows, queries - start) for start in range(0, queries, rows)]
            blocks = list(take_outputs(op.Split(query, sizes, axis=2, _outputs=len(sizes))))
        received: list[ir.Value] = []
        for block in blocks:
            logits = op.MatMul(op.Mul(cast_float(op, block), scale), keys)  # [B, H, rows, N]
            received.append(op.ReduceSum(op.Softmax(logits, axis=-1), [1, 2], keepdims=0))
        total = received[0]
        for part in received[1:]:
            total = op.Add(total, part)
        return op.Mul(total, 1.0 / (form.heads * count))
