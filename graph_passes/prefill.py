"""Prefill: the front at full length, and after each cut the tail entered at its layer with the kept rows.

Before::

    inputs_embeds[B, S, D] -> layers 0..depth-1 at one length -> logits of every row, fresh keys and values

After::

    inputs_embeds[B, S, D] -> layers 0..l-1 -> selector -> kept rows -> layers l.. -> last layer's last real row -> logits[B, V]
                                  |                                       |
                          present.{i} [B, G, C_0, d]              present.{i} [B, G, C_1, d]

Of the last layer only keys and values are needed of every row; everything else is computed of the last real row alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnxscript import GraphBuilder

from sievert.bundle.errors import PlanError
from sievert.bundle.plan import Plan
from sievert.bundle.profile import Profile
from sievert.graph_passes.decoder import Decoder, Layer
from sievert.graph_passes.groups import Cutting, select_by_image
from sievert.graph_passes.instance import Instance
from sievert.graph_passes.lengths import Length, sizes
from sievert.graph_passes.op import Op, gather_rows
from sievert.graph_passes.planes import Planes
from sievert.graph_passes.rows import cut_rows, describe_rows, gather_positions
from sievert.graph_passes.selectors.base import StageGeometry, StageInputs, Tap
from sievert.graph_passes.sight import ALL_CAUSAL, Places, Sight, Sights, find_displaced, name_original_row, see
from sievert.graph_passes.vision_scores import VISUAL_SCORES


def build_prefill(
    decoder: Decoder,
    profile: Profile,
    plan: Plan,
    cuttings: Sequence[Cutting],
    grid: tuple[int, int],
    *,
    planes: int = 0,
    sights: Sights = ALL_CAUSAL,
    first_position: int = 0,
) -> ir.Model:
    """The static prefill graph of the contract (DESIGN.md), pruned by ``cuttings`` in order; none gives the unpruned graph.

    It takes ``visual_scores[B, Nv]`` where a selector has a vision tap, and ``deepstack.{i}[B, Nv, D]`` for each of ``planes``. It gives
    ``original_row.{s}[B, C_s]`` for each cut with a layer behind it whose sight has a window. Row 0 has the position ``first_position``.

    Inner values ``stage.{s}.residual``, ``stage.{s}.scores`` and ``stage.{s}.order`` keep these names for ``expose``.
    """
    scored = any(cutting.selector.vision_tap is not None for cutting in cuttings)
    splice = _Splice(decoder, profile, plan, grid, sights, scored=scored, planes=planes, first_position=first_position)
    cuts = {cutting.layer: (number, cutting) for number, cutting in enumerate(cuttings)}
    for layer in decoder.layers:
        if layer.index in cuts:
            splice.cut(layer, *cuts[layer.index])
        splice.attend(layer)
    return splice.finish()


class _Splice:
    """The prefill graph while it is put together: the sequence as it stands, and the instance of the decoder that runs on it."""

    def __init__(
        self,
        decoder: Decoder,
        profile: Profile,
        plan: Plan,
        grid: tuple[int, int],
        sights: Sights,
        *,
        scored: bool,
        planes: int,
        first_position: int,
    ) -> None:
        self._decoder, self._profile, self._plan, self._grid = decoder, profile, plan, grid
        self._sights, self._displaced = sights, find_displaced(plan, sights)
        self._masks: dict[Sight, ir.Value] = {}
        self._build = build = GraphBuilder(ir.Graph([], [], nodes=[], opset_imports={"": 24}, name="prefill"))
        batch, length, visual = profile.batch, profile.sequence_axis, profile.visual_tokens
        self._embeds = build.input("inputs_embeds", decoder.dtype, [batch, length, decoder.width])
        position_ids = build.input("position_ids", ir.DataType.INT64, decoder.position_shape(batch, length))
        self._attention_mask = build.input("attention_mask", ir.DataType.INT64, [batch, length])
        visual_index = build.input("visual_index", ir.DataType.INT64, [batch, visual])
        self._scores = build.input(VISUAL_SCORES, ir.DataType.FLOAT, [batch, visual]) if scored else None
        dropped = [plan.dropped_at(index, visual) for index in range(decoder.depth)]
        self._caches = [add_cache_inputs(build, decoder, index, batch, profile.capacity(lost)) for index, lost in enumerate(dropped)]
        self._weights: dict[str, ir.Value] = {}
        self._presents: list[tuple[str, ir.Value]] = []
        self._kept: list[tuple[str, ir.Value]] = []
        build.push_module("rows")
        self._rows = describe_rows(
            build.op,
            batch=batch,
            length=_measure(build, profile, self._attention_mask),
            visual=visual,
            attention_mask=self._attention_mask,
            visual_index=visual_index,
            position_ids=position_ids,
            position_axes=decoder.position_axes,
            first_position=first_position,
            two_way=sights.two_way,
        )
        self._planes = Planes(build, planes, self._rows, dtype=decoder.dtype, width=decoder.width)
        build.pop_module()
        self._enter(0, self._embeds, "front")

    def _enter(self, layer: int, stream: ir.Value, scope: str) -> None:
        """Go on from ``layer`` with ``stream[B, n, D]``."""
        decoder, self._start = self._decoder, layer
        self._segment = enter_decoder(self._build, decoder, layer, stream, self._rows.position_ids, scope=scope, weights=self._weights)

    def cut(self, layer: Layer, number: int, cutting: Cutting) -> None:
        """Let the selector rank the visual tokens before ``layer``, and go on with the kept rows."""
        build, compact = self._build, self._plan.positions == "compact"
        stream = _name_value(build, self._segment.get(layer.residual), f"stage.{number}.residual")
        self._state_shape(stream, self._decoder.width)
        inputs = self._stage_inputs(cutting)
        build.push_module(f"select.{number}", cutting.selector.name)
        selection = select_by_image(build, cutting, inputs)
        _name_value(build, selection.scores, f"stage.{number}.scores")
        order = _name_value(build, selection.order, f"stage.{number}.order")
        cut = cut_rows(build.op, self._rows, order, cutting.keep, compact=compact, carried=selection.carried)
        build.pop_module()
        self._rows, self._masks = cut.rows, {}
        self._embeds = gather_rows(build.op, self._embeds, cut.source)
        self._kept.append((f"kept_index.{number}", cut.kept_index))
        if number in self._displaced:
            self._kept.append((name_original_row(number), self._describe_cache_rows()))
        self._enter(layer.index, self._state_shape(gather_rows(build.op, stream, cut.source), self._decoder.width), f"tail.{number}")

    def _state_shape(self, value: ir.Value, *inner: int) -> ir.Value:
        """Say that ``value`` is ``[B, S', D]``, or ``[B, H, S', d]``: where S varies, inference does not follow it through reshapes."""
        *heads, size = inner
        value.shape = ir.Shape([self._rows.batch, *heads, self._rows.length.axis, size])
        return value

    def _describe_cache_rows(self) -> ir.Value:
        """The row of the unpruned sequence that each row of the caches from here on is: ``[B, C_s]``. New tokens come behind all S."""
        profile, length = self._profile, self._rows.length
        op: Op = self._build.op
        shape = [profile.batch, profile.capacity(length.dropped)]
        new = op.Expand(op.Unsqueeze(op.Range(length.dropped, profile.capacity(), 1), [0]), shape)
        places = op.Expand(op.Unsqueeze(op.Range(0, length.count(op), 1), [0]), sizes(op, profile.batch, length))
        return op.ScatterElements(new, places, self._rows.original_row, axis=1)

    def _stage_inputs(self, cutting: Cutting) -> StageInputs:
        rows, decoder, profile = self._rows, self._decoder, self._profile
        geometry = StageGeometry(
            layer=cutting.layer,
            depth=decoder.depth,
            batch=rows.batch,
            sequence=rows.length.most,
            visual=rows.visual,
            keep=cutting.keep,
            heads=decoder.heads,
            kv_heads=decoder.kv_heads,
            head_size=decoder.head_size,
            attention_scale=decoder.layers[cutting.layer].scale,
            grid=self._grid,
            original_visual=profile.visual_tokens,
            since=self._start,
            softcap=decoder.layers[cutting.layer].softcap,
            varying=rows.length if profile.dynamic_text else None,
        )
        return StageInputs(
            geometry=geometry,
            visual_index=rows.visual_index,
            original_index=rows.original_visual,
            text=rows.text,
            all_text=rows.all_text,
            real=rows.real,
            inputs_embeds=self._embeds,
            taps={tap: self._tap(tap) for tap in cutting.selector.taps(cutting.layer, decoder.depth, self._start)},
            carried=rows.carried,
            visual_scores=self._scores if cutting.layer == 0 else None,
            sights=self._sights,
            places=Places(rows.original_row, rows.block),
        )

    def _tap(self, tap: Tap) -> ir.Value:
        if tap.layer < self._start:
            raise PlanError(
                f"a selector reads {tap.kind} of layer {tap.layer}, which ran before the previous cut at layer {self._start}: "
                "carry it along"
            )
        layer = self._decoder.layers[tap.layer]
        if tap.kind == "final_normed":
            return norm_finally(self._build, self._decoder, self._segment.get(layer.residual), self._weights)
        value: ir.Value = getattr(layer, tap.kind)
        return self._segment.get(value)

    def attend(self, layer: Layer) -> None:
        """Attention over the fresh keys and values, which are also written to rows 0..n-1 of the caches."""
        if self._needs_one_row(layer):
            self._attend_last(layer)
            return
        op, segment, sight = self._build.op, self._segment, self._sights.of(layer.index)
        heads, kv_heads, size = self._decoder.heads, self._decoder.kv_heads, self._decoder.head_size
        query = self._state_shape(segment.get(layer.q_rotary), heads, size)
        key, value = (self._state_shape(segment.get(each), kv_heads, size) for each in (layer.k_rotary, layer.v))
        mask = [] if sight.causal else [self._mask(sight)]
        options = {"is_causal": 1} if sight.causal else {}
        segment.bind(layer.attended, op.Attention(query, key, value, *mask, **options, **attention_options(layer)))
        self._store(layer, key, value)
        self._planes.add(segment, layer, self._rows)

    def _needs_one_row(self, layer: Layer) -> bool:
        """Whether only the last real row of this layer's output is read, and that row sees all rows up to itself."""
        return layer is self._decoder.layers[-1] and self._sights.of(layer.index).causal and not self._planes.has(layer)

    def _attend_last(self, layer: Layer) -> None:
        """As :meth:`attend`, but go on with the last real row alone: ``[B, 1, D]``."""
        build, op, rows = self._build, self._build.op, self._rows
        inner = self._decoder.kv_heads, self._decoder.head_size
        key, value = (self._state_shape(self._segment.get(each), *inner) for each in (layer.k_rotary, layer.v))
        self._store(layer, key, value)
        last = self._find_last()
        stream = gather_rows(op, self._segment.get(layer.residual), last)  # [B, 1, D]
        positions = gather_positions(op, rows, last, (rows.batch, 1))
        self._segment = row = enter_decoder(build, self._decoder, layer.index, stream, positions, scope="last", weights=self._weights)
        seen = op.LessOrEqual(op.Unsqueeze(op.Range(0, rows.length.count(op), 1), [0, 1, 2]), op.Unsqueeze(last, [1, 2]))
        seen.shape = ir.Shape([rows.batch, 1, 1, rows.length.axis])
        row.bind(layer.attended, op.Attention(row.get(layer.q_rotary), key, value, seen, **attention_options(layer)))

    def _store(self, layer: Layer, key: ir.Value, value: ir.Value) -> None:
        """Write a layer's keys and values to its caches."""
        op, caches = self._build.op, self._caches[layer.index]
        self._presents.append((f"present.{layer.index}.key", op.TensorScatter(caches[0], key, axis=2)))
        self._presents.append((f"present.{layer.index}.value", op.TensorScatter(caches[1], value, axis=2)))

    def _find_last(self) -> ir.Value:
        """The row of the last real token among those that are left: ``[B, 1]``."""
        op: Op = self._build.op
        return op.Sub(op.ReduceSum(self._attention_mask, [1], keepdims=1), self._rows.length.dropped + 1)

    def _mask(self, sight: Sight) -> ir.Value:
        """``[B, 1, S, S]`` bool over the rows that are left, made once for all layers of a stage that see alike."""
        if sight not in self._masks:
            self._build.push_module("sight")
            places = Places(self._rows.original_row, self._rows.block)
            self._masks[sight] = self._build.op.Unsqueeze(see(self._build.op, sight, places, places), [1])
            self._masks[sight].shape = ir.Shape([self._rows.batch, 1, self._rows.length.axis, self._rows.length.axis])
            self._build.pop_module()
        return self._masks[sight]

    def finish(self) -> ir.Model:
        """Logits of the last real row, and all outputs."""
        build, layer = self._build, self._decoder.layers[-1]
        hidden = self._segment.get(layer.residual_out)
        if not self._needs_one_row(layer):
            hidden = gather_rows(build.op, hidden, self._find_last())  # [B, 1, D]
        logits = emit_logits(build, self._decoder, hidden, self._weights)
        for name, value in [("logits", logits), *self._presents, *self._kept]:
            add_named_output(build, value, name)
        return ir.Model(build.graph, ir_version=11, producer_name="sievert")


def _measure(build: GraphBuilder, profile: Profile, attention_mask: ir.Value) -> Length:
    """S, read off ``attention_mask[B, S]`` where text is dynamic."""
    if not profile.dynamic_text:
        return Length(profile.sequence)
    return Length(profile.sequence, build.op.Squeeze(build.op.Shape(attention_mask, start=1), [0]))


def attention_options(layer: Layer) -> dict[str, float | int]:
    """Attributes of an Attention that computes what ``layer`` does; a softcap bounds scores before they are masked."""
    options: dict[str, float | int] = {"scale": layer.scale, "softmax_precision": int(ir.DataType.FLOAT)}
    return options | ({"softcap": layer.softcap} if layer.softcap else {})


def enter_decoder(
    build: GraphBuilder,
    decoder: Decoder,
    layer: int,
    stream: ir.Value,
    position_ids: ir.Value,
    *,
    scope: str,
    weights: dict[str, ir.Value],
) -> Instance:
    """The decoder entered at ``layer`` with ``stream[B, n, D]`` and its position ids: lengths and rotary tables follow these."""
    bound = {decoder.inputs_embeds: stream, decoder.position_ids: position_ids, decoder.layers[layer].residual: stream}
    one_axis = position_ids if decoder.position_axes == 1 else build.op.Squeeze(build.op.Slice(position_ids, [0], [1], [0]), [0])
    shapes = dict.fromkeys(filter(None, (decoder.attention_mask, decoder.two_way)), one_axis)  # [B, n]
    return Instance(build, decoder.model.graph, scope=scope, bound=bound, weights=weights, shapes=shapes)


def add_cache_inputs(build: GraphBuilder, decoder: Decoder, index: int, batch: int, capacity: int) -> tuple[ir.Value, ir.Value]:
    """Inputs ``past_key_values.{i}.key/.value[B, G, C_i, d]``."""
    shape = [batch, decoder.kv_heads, capacity, decoder.head_size]
    key = build.input(f"past_key_values.{index}.key", decoder.dtype, shape)
    return key, build.input(f"past_key_values.{index}.value", decoder.dtype, shape)


def emit_logits(build: GraphBuilder, decoder: Decoder, hidden: ir.Value, weights: dict[str, ir.Value]) -> ir.Value:
    """Final norm and lm_head on one row ``hidden[B, 1, D]``: float32 ``[B, V]``.

    The head is a Gemm on the checkpoint's own ``[V, D]``, so that a tied embedding needs no transposed second copy.
    """
    op = build.op
    end = _enter_head(build, decoder, hidden, weights)
    normed = op.Squeeze(end.get(decoder.head_input), [1])  # [B, D]
    end.bind(decoder.head, op.Gemm(normed, end.get(decoder.head_weight), transB=1))
    logits = end.get(decoder.logits)
    return logits if logits.dtype == ir.DataType.FLOAT else op.Cast(logits, to=ir.DataType.FLOAT)


def norm_finally(build: GraphBuilder, decoder: Decoder, stream: ir.Value, weights: dict[str, ir.Value]) -> ir.Value:
    """The decoder's final norm of any ``stream[B, n, D]``."""
    return _enter_head(build, decoder, stream, weights).get(decoder.head_input)


def _enter_head(build: GraphBuilder, decoder: Decoder, stream: ir.Value, weights: dict[str, ir.Value]) -> Instance:
    bound = {decoder.inputs_embeds: stream, decoder.layers[-1].residual_out: stream}
    return Instance(build, decoder.model.graph, scope="head", bound=bound, weights=weights)


def _name_value(build: GraphBuilder, value: ir.Value, name: str) -> ir.Value:
    """Give an inner value a name that users and ``expose`` rely on; a graph input or constant gets an Identity to carry it."""
    if value.producer() is None:
        value = build.op.Identity(value)
    value.name = name
    return value


def add_named_output(build: GraphBuilder, value: ir.Value, name: str) -> None:
    """Make ``value`` the graph output ``name``."""
    build.add_output(build.op.Identity(value) if value.is_graph_input() or value.is_graph_output() else value, name)
