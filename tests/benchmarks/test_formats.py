"""What is refused is a row of the table, not the end of the benchmark; weights are counted once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import sievert
from benchmarks import formats
from benchmarks.formats import BASE, FLOAT32, GRAPHS, Model, Row, build, measure, read_weights, render
from sievert.bundle.errors import CalibrationError, EngineError
from sievert.bundle.store import Bundle


def test_what_is_refused_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def quantise(bundle: Path, **options: Any) -> None:
        assert bundle == tmp_path / "bundle" and options["random"] and options["variant"] == BASE
        if options["format"] == "fp8":
            raise CalibrationError(f"{tmp_path}/collected is of\nanother | model")
        made.append(options["name"])

    monkeypatch.setattr(sievert, "quantise", quantise)
    monkeypatch.setattr(Bundle, "open", lambda path: path)
    monkeypatch.setattr(
        formats, "build", lambda _, variant, graph, form, __: Row(form, graph, 50, 60, 1.0, "" if graph in made else variant)
    )
    model = Model("any", lambda work, _: work / "bundle", random=True)
    rows = measure(model, tmp_path, 2, [FLOAT32, "int8", "fp8 (E4M3)", "int4, weights, block 128"])
    assert [(row.form, row.graph) for row in rows] == [
        (form, graph) for form in dict.fromkeys(row.form for row in rows) for graph in GRAPHS
    ]
    assert [row.refused for row in rows[::2]] == [BASE, made[0], "no such variant: collected is of another / model", made[1]]


def test_a_failed_build_is_a_row_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = ir.Value(name="w", const_value=ir.tensor(np.ones((64, 64), np.float32), name="w"))
    again = ir.Value(name="again", const_value=ir.tensor(np.ones((64, 32), np.float32), name="again"))
    graph = ir.Graph([], [], nodes=[], initializers=[weight, again], opset_imports={"": 24})
    path = tmp_path / "graph.onnx"
    ir.save(ir.Model(graph, ir_version=11), path, external_data="graph.data")
    model = ir.load(path)
    stored = model.graph.initializers["w"].const_value
    assert isinstance(stored, ir.ExternalTensor) and read_weights(path) == 64 * 96 * 4
    shared = ir.Value(
        name="shared",
        const_value=ir.ExternalTensor("graph.data", stored.offset, 64 * 64 * 4, ir.DataType.FLOAT, shape=ir.Shape([64, 64]), name="shared"),
    )
    model.graph.initializers.add(shared)
    path.write_bytes(ir.to_proto(model).SerializeToString())
    assert read_weights(path) == 64 * 96 * 4

    def refuse(_: str, source: Path, engine: Path) -> None:
        assert source.read_bytes() == b"lowered"
        engine.write_bytes(b"half")
        raise EngineError(f"tensorrt_rtx: {tmp_path}/graph.onnx: no")

    bundle: Any = SimpleNamespace(
        path=tmp_path, graph=lambda *_, **__: SimpleNamespace(file="graph.onnx"), file=lambda name: tmp_path / name
    )
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr(formats, "lower_graph", lambda *_: SimpleNamespace(name="graph.onnx", content=b"lowered"))
    monkeypatch.setattr(formats, "build_engine", refuse)
    row = build(bundle, BASE, "prefill", "int8", tmp_path)
    assert (row.refused, row.engine, row.weights) == ("tensorrt_rtx: graph.onnx: no", 0, 64 * 96 * 4)
    assert sorted(tmp_path.iterdir()) == before


def test_the_page_says_what_is_refused_and_what_is_random() -> None:
    plain = [Row(FLOAT32, graph, 8 << 20, 16 << 20, 2.0) for graph in GRAPHS]
    page = render(
        {
            "shipped": plain,
            "half-billion": [*plain, Row("int8", "prefill", 2 << 20, 4 << 20, 3.0), Row("int8", "decode", refused="no kernel")],
        },
        "123",
    )
    assert (
        "| int8 | prefill | 2.0 | 25% | 4.0 | 25% | 3.0 | built |" in page
        and "| int8 | decode | - |  | - |  | - | refused: no kernel |" in page
    )
    shipped, random = page.split("## Half a billion")
    assert "random data" in random and "random data" not in shipped and "Code measured: `123`" in page
