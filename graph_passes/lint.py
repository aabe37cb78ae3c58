"""Say before any engine is built what a target would refuse, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import onnx_ir as ir

from sievert.bundle.errors import GraphError
from sievert.graph_passes.lowering.attention_rules import ATTENTION_RULES
from sievert.graph_passes.lowering.graph_rules import GRAPH_RULES
from sievert.graph_passes.lowering.limits import OPERATOR_RULES
from sievert.graph_passes.lowering.rules import Rule, Severity
from sievert.graph_passes.lowering.targets import TARGETS, Target

__all__ = ["RULES", "Finding", "Rule", "lint"]

RULES: Final[tuple[Rule, ...]] = (*GRAPH_RULES, *ATTENTION_RULES, *OPERATOR_RULES)


@dataclass(frozen=True)
class Finding:
    """One thing a target refuses (``error``) or does worse than it could (``warning``).

    ``node`` names the node or value, ``message`` what is there and what was seen of it, ``fix`` what to do.
    """

    rule: str
    severity: Severity
    node: str
    message: str
    fix: str

    def __str__(self) -> str:
        return f"{self.severity} {self.rule}: {self.node}: {self.message}. To do: {self.fix}"


def lint(model: ir.Model, target: Target) -> list[Finding]:
    """Everything the rules for ``target`` find in ``model``, in the order of :data:`RULES`. Reads no weights.

    Lint the lowered graph to know whether an engine will build; linting the graph as it is shows what lowering has to do.

    Raises:
        GraphError: an unknown target.
    """
    if target not in TARGETS:
        raise GraphError(f"unknown target {target!r}: choose one of {', '.join(TARGETS)}")
    return [
        Finding(rule.name, rule.severity, node, f"{what} ({rule.seen})", rule.fix)
        for rule in RULES
        if target in rule.targets
        for node, what in rule.find(model)
    ]
