"""FLOPs by hand against the count."""

from __future__ import annotations

import pytest

from sievert.bundle.errors import GraphError
from sievert.graph_passes.flops import count_flops
from tests.graph_passes.test_lower import parse


@pytest.mark.parametrize(
    ("body", "flops"),
    [
        ("g (float[2,3,5] x, float[5,7] w) => (float[2,3,7] y) { y = MatMul(x, w) }", 2 * 2 * 3 * 5 * 7),
        ("g (float[3,5] x, float[2,5,7] w) => (float[2,3,7] y) { y = MatMul(x, w) }", 2 * 2 * 3 * 5 * 7),
        ("g (float[3,5] x, float[7,5] w) => (float[3,7] y) { y = Gemm<transB=1>(x, w) }", 2 * 3 * 5 * 7),
        ("g (float[5,3] x, float[5,7] w) => (float[3,7] y) { y = Gemm<transA=1>(x, w) }", 2 * 3 * 5 * 7),
        ("g (float[1,3,8,8] x, float[6,3,4,4] w) => (float[1,6,2,2] y) { y = Conv<strides=[4,4]>(x, w) }", 2 * 6 * 2 * 2 * 3 * 16),
        (
            "g (float[2,4,6,8] q, float[2,2,9,8] k, float[2,2,9,16] v) => (float[2,4,6,16] y) { y = Attention(q, k, v) }",
            2 * 2 * 4 * 6 * 9 * (8 + 16),
        ),
        ("g (float[2,3] x) => (float[2,3] y) { y = Relu(x) }", 0),
    ],
)
def test_each_operator(body: str, flops: int) -> None:
    assert count_flops(parse(body)) == flops


def test_a_dynamic_graph_is_refused() -> None:
    with pytest.raises(GraphError, match="static graphs only"):
        count_flops(parse("g (float[N,5] x, float[5,7] w) => (float[N,7] y) { y = MatMul(x, w) }"))
