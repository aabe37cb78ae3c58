"""Each rule says what the TensorRT for RTX builder does: a graph it names is refused, the one just on this side of the line builds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest

from sievert.bundle.errors import EngineError, GraphError
from sievert.engines.build.process import build_engine
from sievert.graph_passes.lint import RULES, Finding, lint
from sievert.graph_passes.lower import TARGETS, lower
from sievert.graph_passes.lowering.limits import NOT_IN_TENSORRT
from tests.graph_passes.static_graphs import MAKERS, Weights
from tests.graph_passes.test_lower import parse

trt: Any = pytest.importorskip("tensorrt_rtx")


class _Log(trt.ILogger):  # type: ignore[misc]
    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.errors: list[str] = []

    def log(self, severity: Any, message: str) -> None:
        if severity <= trt.ILogger.Severity.ERROR:
            self.errors.append(message)


def refuse(model: ir.Model) -> str:
    """What the parser or builder says against a graph; empty where it builds."""
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(ir.to_proto(model).SerializeToString()):
        return " ".join(parser.get_error(index).desc() for index in range(parser.num_errors))
    if builder.build_serialized_network(network, builder.create_builder_config()) is None:
        return " ".join(log.errors)
    return ""


def named(model: ir.Model, target: Any = "tensorrt-rtx", severity: str = "error") -> set[str]:
    return {finding.rule for finding in lint(model, target) if finding.severity == severity}


def attend(
    query: int, keys: int = 0, *, dtype: str = "float16", heads: int = 4, kv_heads: int = 2, head: int = 16, mask: str = "",
    causal: int = 0, value: int = 0, extra: str = "", batch: int = 2,
) -> str:  # fmt: skip
    """An Attention over computed queries, keys and values."""
    keys, value = keys or query, value or head
    operands = (("q", heads, query, head), ("k", kv_heads, keys, head), ("v", kv_heads, keys, value))
    inputs = ", ".join(f"{dtype}[{batch},{count},{rows},{size}] {name}" for name, count, rows, size in operands)
    operator = f"y = Attention<is_causal={causal}{extra}>(q, k, v{', m' if mask else ''})"
    return f"g ({inputs}{f', {mask} m' if mask else ''}) => ({dtype}[{batch},{heads},{query},{value}] y) {{ {operator} }}"


def topk(count: int) -> str:
    return f"g (float[1,5000] x) => (float[1,{count}] y, int64[1,{count}] i) {{ k = Constant<value_ints=[{count}]>() y, i = TopK(x, k) }}"


def scatter(count: int, extra: str = "") -> str:
    return f"g (float[2,9] x, int64[2,{count}] i, float[2,{count}] u) => (float[2,9] y) {{ y = ScatterElements<axis=1{extra}>(x, i, u) }}"


def update(extra: str = "axis=2", *, shape: str = "2,2,9,16", new: str = "2,2,1,16", body: str = "") -> str:
    body = body or f"y = TensorScatter<{extra}>(x, u, i)"
    return f"g (float16[{shape}] x, float16[{new}] u, int64[2] i) => (float16[{shape}] y) {{ {body} }}"


def elementwise(body: str, x: str = "float[2,9]", y: str = "float[2,9]", more: str = "") -> str:
    return f"g ({x} x{more}) => ({y} y) {{ {body} }}"


SIZE = "s = Constant<value_ints=[2,9]>() y = Expand(x, s)"
BOTH_SIDES = [
    # rule, refused, builds, words of the builder
    ("topk-limit", topk(3841), topk(3840), "K exceeds the maximum value allowed (3840)"),
    ("scatter-length", scatter(10), scatter(9), "Indices dimensions must be less than data dimensions"),
    ("scatter-reduction", scatter(9, ', reduction="add"'), scatter(9, ', reduction="none"'), "Unsupported reduction type"),
    (
        "scatter-reduction",
        'g (float[9,4] x, int64[5,1] i, float[5,4] u) => (float[9,4] y) { y = ScatterND<reduction="max">(x, i, u) }',
        "g (float[9,4] x, int64[5,1] i, float[5,4] u) => (float[9,4] y) { y = ScatterND(x, i, u) }",
        "ScatterND with reduction is not supported",
    ),
    ("attention-kernel", attend(2, dtype="float"), attend(1, dtype="float"), "not supported by a dedicated kernel"),
    ("attention-kernel", attend(9, dtype="float", causal=1), attend(9, causal=1), "not supported by a dedicated kernel"),
    ("attention-kernel", attend(9, head=8), attend(9, head=9), "not supported by a dedicated kernel"),
    ("attention-kernel", attend(9, head=257), attend(9, head=256), "not supported by a dedicated kernel"),
    ("attention-kernel", attend(9, head=12, mask="bool[2,1,9,9]"), attend(9, head=16, mask="bool[2,1,9,9]"), "CHECK(op->input_layouts"),
    ("attention-kernel", attend(9, head=20, mask="bool[2,1,9,9]"), attend(9, head=20, mask="float16[2,1,9,9]"), "CHECK(op->input_layouts"),
    ("attention-kernel", attend(1, 9, heads=3, kv_heads=3, batch=1), attend(1, 9, heads=2, kv_heads=1, batch=2), "dedicated kernel"),
    ("attention-kernel", attend(9, heads=1, kv_heads=1, batch=1), attend(9, heads=1, kv_heads=1, batch=2), "dedicated kernel"),
    ("attention-kernel", attend(9, heads=1, kv_heads=1, mask="bool[9,9]"), attend(9, heads=1, kv_heads=1), "dedicated kernel"),
    ("attention-kernel", attend(1, 9, head=12), attend(1, 9, head=8), "not supported by a dedicated kernel"),
    ("attention-kernel", attend(1, 12225, head=64, dtype="float"), attend(1, 12224, head=64, dtype="float"), "dedicated kernel"),
    ("attention-kernel", attend(1, 24449, head=128), attend(1, 24448, head=128, dtype="bfloat16"), "dedicated kernel"),
    ("attention-kernel", attend(9, value=32), attend(9), "Key and Value must have the same shape"),
    ("attention-mask", attend(9, causal=1, mask="bool[9,9]"), attend(9, mask="bool[9,9]"), "Option mask cannot be used"),
    ("attention-mask", attend(9, mask="float[2,1,9,9]"), attend(9, mask="float16[2,1,9,9]"), "element type"),
    ("attention-mask", attend(9, mask="bool[2,9,9]"), attend(9, mask="bool[2,1,9,9]"), "mask must be broadcastable"),
    ("attention-softmax-precision", attend(9, extra=", softmax_precision=1"), attend(9), "Setting softmax precision"),
    ("attention-softcap", attend(9, extra=", softcap=30.0"), attend(9, extra=", softcap=0.0"), "Setting softcap"),
    (
        "attention-cache",
        "g (float16[2,4,1,16] q, float16[2,2,1,16] k, float16[2,2,1,16] v, float16[2,2,8,16] a, float16[2,2,8,16] b) => "
        "(float16[2,4,1,16] y, float16[2,2,9,16] c, float16[2,2,9,16] d) { y, c, d = Attention(q, k, v, , a, b) }",
        attend(1, 9),
        "one output",
    ),
    ("cache-update", update(body="c = Exp(x) y = TensorScatter<axis=2>(c, u, i)"), update(), "cache tensor must be a network input"),
    ("cache-update", update(body="c = TensorScatter<axis=2>(x, u, i) y = Exp(c)"), update(), "output tensor must be a network output"),
    ("cache-update", update("axis=1", shape="2,9,16", new="2,1,16"), update("axis=-2"), "required to be 4D"),
    ("cache-update", update("axis=3", shape="2,2,16,9", new="2,2,16,1"), update(), "Sequence dimension must be -2"),
    ("cache-update", update('axis=2, mode="circular"'), update('axis=2, mode="linear"'), "Only linear mode is supported"),
    (
        "cache-update",
        "g (float16[2,2,9,16] x, float16[2,2,1,16] u, int64[2] i) => (float16[2,2,9,16] y, float16[2,2,9,16] z) "
        "{ y = TensorScatter<axis=2>(x, u, i) z = TensorScatter<axis=2>(x, u, i) }",
        "g (float16[2,2,9,16] x, float16[2,2,1,16] u, int64[2] i, float16[2,2,9,16] w) => (float16[2,2,9,16] y, float16[2,2,9,16] z) "
        "{ y = TensorScatter<axis=2>(x, u, i) z = TensorScatter<axis=2>(w, u, i) }",
        "Input index already mapped",
    ),
    (
        "integer-product",
        elementwise("y = MatMul(x, z)", "int64[2,3]", "int64[2,2]", ", int64[3,2] z"),
        elementwise("y = MatMul(x, z)", "float[2,3]", "float[2,2]", ", float[3,2] z"),
        "unsupported input type of INT64",
    ),
    ("rank", elementwise("y = Exp(x)", f"float{[1] * 9}", f"float{[1] * 9}"),
     elementwise("y = Exp(x)", f"float{[1] * 8}", f"float{[1] * 8}"), "Failed to convert ONNX dimensions"),
    ("symbolic-shape", elementwise("y = Exp(x)", "float[N,9]", "float[N,9]"), elementwise("y = Exp(x)"), "no optimization profile"),
    ("data-dependent-shape", elementwise("y = Expand(x, s)", "float[1,9]", "float[M,N]", ", int64[2] s"),
     elementwise(SIZE, "float[1,9]"), "no optimization profile"),
    ("mixed-types", elementwise("y = Add(x, z)", "float16[2,9]", "float16[2,9]", ", float[2,9] z"),
     elementwise("h = Cast<to=10>(z) y = Add(x, h)", "float16[2,9]", "float16[2,9]", ", float[2,9] z"), "must have same input types"),
    ("unsupported-operator", elementwise("y = NonZero(x)", "bool[9]", "int64[1,N]"),
     elementwise("y = Not(x)", "bool[9]", "bool[9]"), "NonZero"),
    ("unsupported-operator", elementwise("y = Compress(x, c)", "float[9]", "float[N]", ", bool[9] c"),
     elementwise("y = Where(c, x, x)", "float[9]", "float[9]", ", bool[9] c"), "false"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "refused", "builds", "words"), BOTH_SIDES)
def test_the_builder_refuses_what_the_rule_names_and_builds_what_it_does_not(rule: str, refused: str, builds: str, words: str):
    beyond, within = _read(refused), _read(builds)
    assert rule in named(beyond)
    assert words in refuse(beyond)
    assert named(within) == set()
    assert refuse(within) == ""


def _read(text: str) -> ir.Model:
    try:
        return parse(text)
    except onnx.shape_inference.InferenceError:  # what one rule is about
        return ir.from_proto(onnx.parser.parse_model('<ir_version: 11, opset_import: ["": 24]>\n' + text))


def test_one_graph_input_as_two_keys_crashes_the_builder_and_computed_ones_do_not(tmp_path: Path):
    t = "float16[1,2,9,16]"
    head = f"g ({t} a, {t} b, {t} k, {t} v) => ({t} y, {t} z) "
    crashing = parse(head + "{ y = Attention(a, k, v) z = Attention(b, k, v) }")
    assert named(crashing) == {"attention-shared-input"}
    assert "attention-shared-input" in named(parse("g (float16[1,2,9,16] x) => (float16[1,2,9,16] y) { y = Attention(x, x, x) }"))
    graph = tmp_path / "crashing.onnx"
    onnx.save(ir.to_proto(crashing), graph)
    with pytest.raises(EngineError, match=r"killed by SIGSEGV"):
        build_engine("tensorrt_rtx", graph, tmp_path / "out.engine")
    computed = parse(head + "{ h = Exp(k) y = Attention(a, h, v) z = Attention(b, h, v) }")
    assert named(computed) == set()
    assert refuse(computed) == ""


def test_the_list_of_operators_without_an_importer_is_the_parsers_own():
    log = _Log()
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    standard = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == "" and not schema.deprecated}
    assert {name for name in standard if not parser.supports_operator(name)} == NOT_IN_TENSORRT - {"NonZero"}


def test_operators_of_other_domains_are_named():
    proto = onnx.parser.parse_model(
        '<ir_version: 11, opset_import: ["": 24, "com.microsoft": 1]> g (float[2,4] x) => (float[2,4] y) { y = com.microsoft.FastGelu(x) }'
    )
    model = ir.from_proto(proto)
    assert named(model) == {"unsupported-operator"}
    assert "Plugin not found" in refuse(model)


def test_causal_attention_of_unequal_lengths_builds_and_is_an_error_for_every_target():
    model, equal = parse(attend(5, 9, causal=1)), parse(attend(9, causal=1))
    assert refuse(model) == "", "it builds: that is the danger"
    for target in TARGETS:
        assert named(model, target) == {"attention-causal-lengths"}
        assert named(equal, target) == set()


def test_a_mask_shared_by_query_rows_is_refused_by_onnx_runtime_only():
    shared, full = parse(attend(9, mask="bool[2,1,1,9]")), parse(attend(9, mask="bool[2,1,9,9]"))
    assert named(shared, "onnxruntime") == {"attention-mask-rows"}
    assert named(shared) == named(full) == named(full, "onnxruntime") == set()
    feeds = {value.name: _zeros(value) for value in shared.graph.inputs}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="inconsistent q_sequence_length"):
        _open(shared).run(None, feeds)
    assert _open(full).run(None, {**feeds, "m": _zeros(full.graph.inputs[3])})[0].shape == (2, 4, 9, 16)


def test_bfloat16_on_the_cpu_is_a_warning_that_names_the_operators():
    product = parse("g (bfloat16[2,3] x, bfloat16[3,2] z) => (bfloat16[2,2] y) { y = MatMul(x, z) }")
    moved = parse("g (bfloat16[2,3] x) => (bfloat16[3,2] y) { y = Transpose(x) }")
    assert named(product, "onnxruntime", "warning") == {"cpu-bfloat16"}
    assert named(moved, "onnxruntime", "warning") == set()
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.NotImplemented, match="MatMul"):
        _open(product)
    assert _open(moved).get_outputs()[0].shape == [3, 2]


def test_what_only_full_tensorrt_documents_differently():
    for text, rule, severity in (
        (elementwise("a = Constant<value_int=1>() y = CumSum(x, a)", "int64[2,9]", "int64[2,9]"), "integer-cumsum", "error"),
        (elementwise("y = ScatterElements<axis=1>(x, i, x)", "bool[2,9]", "bool[2,9]", ", int64[2,9] i"), "undocumented-type", "warning"),
        (elementwise("a = Constant<value_int=1>() y = Clip(x, a)", "int64[2,9]", "int64[2,9]"), "undocumented-type", "warning"),
    ):
        model = parse(text)
        assert named(model, "tensorrt", severity) == {rule}
        assert named(model, "tensorrt-rtx", severity) == set()
        assert refuse(model) == ""
        assert named(lower(model, "tensorrt"), "tensorrt") == set()


def test_control_flow_and_doubles_build_and_are_warnings():
    branch = "then_branch = t () => (float[2] a) { a = Exp(x) }, else_branch = e () => (float[2] b) { b = Log(x) }"
    for text, rule in (
        (f"g (bool c, float[2] x) => (float[2] y) {{ y = If(c)<{branch}> }}", "control-flow"),
        (elementwise("h = Cast<to=11>(x) y = Cast<to=1>(h)"), "float64"),
    ):
        model = parse(text)
        assert (named(model), named(model, severity="warning")) == (set(), {rule})
        assert refuse(model) == ""


def test_operators_inside_branches_are_seen():
    branch = "then_branch = t () => (float[N] a) { a = Compress(x, m) }, else_branch = e () => (float[2] b) { b = Log(x) }"
    model = parse(f"g (bool c, bool[2] m, float[2] x) => (float[N] y) {{ y = If(c)<{branch}> }}")
    assert "unsupported-operator" in named(model)


def test_large_constants_and_missing_weights_are_found(tmp_path: Path):
    model = MAKERS["decode"](Weights(tmp_path, "float32"))
    assert lint(lower(model, "tensorrt-rtx"), "tensorrt-rtx") == []
    (tmp_path / "weights.data").write_bytes(b"short")
    assert named(model, "onnxruntime") == {"missing-weights"}
    assert "which has 5" in next(finding.message for finding in lint(model, "onnxruntime"))
    (tmp_path / "weights.data").unlink()
    assert "which is not there" in next(finding.message for finding in lint(model, "onnxruntime"))
    large = parse("g (float[1] x) => (float[1] y) { y = Add(x, x) }")
    large.graph.register_initializer(ir.Value(name="table", const_value=ir.tensor([0.0] * (1 << 18), name="table")))
    assert named(large, severity="warning") == set(), "1 MiB is the limit"
    large.graph.register_initializer(ir.Value(name="larger", const_value=ir.tensor([0.0] * ((1 << 18) + 1), name="larger")))
    assert [finding.node for finding in lint(large, "onnxruntime")] == ["larger"]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_contract_graph_is_clean_once_lowered_and_says_before_what_lowering_is_for(tmp_path: Path, dtype: str):
    for graph, make in MAKERS.items():
        model = make(Weights(tmp_path, dtype))
        assert lint(lower(model, "tensorrt-rtx"), "tensorrt-rtx") == [], graph
        if graph in {"prefill", "decode"}:
            assert "attention-softmax-precision" in named(model)


def test_a_finding_reads_as_a_sentence_with_its_remedy():
    (finding,) = lint(parse(topk(4000)), "tensorrt-rtx")
    assert isinstance(finding, Finding)
    assert str(finding).startswith("error topk-limit: TopK y: K=4000 (K=3840 builds, 3841: ")
    assert "To do: take fewer at a time" in str(finding)
    with pytest.raises(GraphError, match="unknown target"):
        lint(parse(topk(1)), "cuda")  # type: ignore[arg-type]


def test_rules_have_names_of_their_own_and_say_where_they_were_seen():
    assert len({rule.name for rule in RULES}) == len(RULES)
    assert all(rule.seen and rule.fix and rule.targets for rule in RULES)
    assert {rule for rule, *_ in BOTH_SIDES} <= {rule.name for rule in RULES}


def _open(model: ir.Model) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options, providers=["CPUExecutionProvider"])


def _zeros(value: ir.Value) -> Any:
    return np.zeros(tuple(value.shape.numpy()), value.dtype.numpy())  # type: ignore[union-attr]


def test_one_row_over_keys_whose_number_varies_is_written_out() -> None:
    """The builder takes it up to a number of keys, which the range it is given decides and the graph does not say."""
    operands = "float16[2,4,1,16] q, float16[2,2,sequence,16] k, float16[2,2,sequence,16] v, bool[2,1,1,sequence] m"
    model = parse(f"g ({operands}) => (float16[2,4,1,16] y) {{ y = Attention(q, k, v, m) }}")
    assert named(model) == {"attention-kernel"}
    lowered = lower(model, "tensorrt-rtx")
    assert named(lowered) == set() and all(node.op_type != "Attention" for node in lowered.graph)
    rows = "float16[2,4,sequence,16] q, float16[2,2,sequence,16] k, float16[2,2,sequence,16] v"
    assert named(parse(f"g ({rows}) => (float16[2,4,sequence,16] y) {{ y = Attention<is_causal=1>(q, k, v) }}")) == set(), "it has a kernel"
