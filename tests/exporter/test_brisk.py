"""Tracing in a hurry: settings last for the block, and rules of several output nodes find what they find without it, in fewer looks."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import pytest
import torch
from onnxscript import rewriter
from onnxscript.rewriter import _matcher

from sievert.exporter.brisk import brisk

MATCHER: Any = _matcher.SimplePatternMatcher


def settings() -> tuple[object, ...]:
    config: Any = torch.fx.config
    return gc.isenabled(), config.do_not_emit_stack_traces, MATCHER.match


@pytest.fixture
def halves() -> ir.Model:
    """The two halves of one input, two slices of another that are no halves, and much else."""
    chain = "\n".join(f"c{i} = Neg(c{i - 1})" for i in range(1, 40))
    return ir.from_onnx_text(
        f"""<ir_version: 10, opset_import: ["": 23]>
        halves (float[2, 8] a, float[2, 8] b) => (float[2, 4] low, float[2, 4] high, float[2, 4] some, float[2, 3] rest, float[2, 8] c39)
        <int64[1] zero = {{0}}, int64[1] middle = {{4}}, int64[1] later = {{5}}, int64[1] end = {{8}}, int64[1] last = {{-1}}> {{
            c0 = Neg(a)
            {chain}
            high = Slice(a, middle, end, last)
            low = Slice(a, zero, middle, last)
            some = Slice(b, zero, middle, last)
            rest = Slice(b, later, end, last)
        }}"""
    )


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many combinations of nodes are tried."""
    counted, original = [0], MATCHER._multi_match

    def count(self: Any, candidate: Any, check_removable: bool) -> Any:
        counted[0] += 1
        return original(self, candidate, check_removable)

    monkeypatch.setattr(MATCHER, "_multi_match", count)
    yield counted


def rewritten(model: ir.Model) -> str:
    rewriter.rewrite(model)
    return str(ir.to_proto(model))


def test_settings_last_for_the_block():
    before = settings()
    assert before[:2] == (True, False)
    with brisk():
        assert settings()[:2] == (False, True)
        assert settings()[2] is not before[2]
    assert settings() == before


def test_settings_come_back_after_an_error():
    before = settings()
    with pytest.raises(ZeroDivisionError), brisk():
        1 / 0  # noqa: B018
    assert settings() == before


def test_a_collector_that_is_off_stays_off():
    gc.disable()
    try:
        with brisk():
            pass
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_rules_of_several_nodes_find_the_same_in_fewer_looks(halves: ir.Model, looks: list[int]):
    expected, before = rewritten(halves.clone()), looks[0]
    assert expected.count('op_type: "Split"') == 1
    with brisk():
        found = rewritten(halves.clone())
    assert found == expected
    assert 0 < looks[0] - before < before / 2


def test_a_matcher_of_another_form_is_left_as_it_is(halves: ir.Model, monkeypatch: pytest.MonkeyPatch):
    original = MATCHER.match
    monkeypatch.setattr("sievert.exporter.brisk._NEEDED", ("match", "_no_such_method"))
    with brisk():
        assert MATCHER.match is original
        assert 'op_type: "Split"' in rewritten(halves)
