"""How many rows a sequence of prefill has: a number, or what the prompts at hand need where a variant's text is dynamic."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from sievert.bundle.specs import SEQUENCE, name_axis
from sievert.graph_passes.op import Op


@dataclass(frozen=True)
class Length:
    """``most`` rows; where ``whole`` (int64 scalar) is given, the prompt's rows at run time, ``dropped`` fewer: then ``most`` at most."""

    most: int
    whole: ir.Value | None = None
    dropped: int = 0

    def less(self, count: int) -> Length:
        """``count`` rows fewer."""
        return replace(self, most=self.most - count, dropped=self.dropped + count)

    @property
    def axis(self) -> int | str:
        """The size as shapes have it: the number, or a name that counts from the whole prompt's."""
        return self.most if self.whole is None else name_axis(self.dropped)

    def count(self, op: Op) -> int | ir.Value:
        """The number of rows, for arithmetic: an int64 scalar where it is not fixed."""
        if self.whole is None:
            return self.most
        return op.Sub(self.whole, self.dropped) if self.dropped else self.whole


def sizes(op: Op, *axes: int | Length) -> list[int] | ir.Value:
    """A shape, or bounds of a slice: plain numbers, or int64 ``[n]`` where a length is not fixed."""
    counts = [axis.count(op) if isinstance(axis, Length) else axis for axis in axes]
    fixed = [count for count in counts if isinstance(count, int)]
    if len(fixed) == len(counts):
        return fixed
    parts = [[count] if isinstance(count, int) else op.Reshape(count, [1]) for count in counts]
    return op.Concat(*parts, axis=0)


def name_axes(value: ir.Value) -> set[str]:
    """The axes of a value that have a name for a size."""
    return {str(axis.value) for axis in value.shape or () if not isinstance(axis, int)}


def varies_with_prompts(model: ir.Model) -> bool:
    """Whether the graph takes prompts of more than one length."""
    return any(SEQUENCE in name_axes(value) for value in model.graph.inputs)
