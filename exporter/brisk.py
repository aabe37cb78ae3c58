"""What tracing does for nothing, left out for the length of a block: the graphs that come of it are the same, byte for byte."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

_NEEDED = ("match", "_init_match", "_match_node")


@contextlib.contextmanager
def brisk() -> Iterator[None]:
    """Trace in the block without walks of the garbage collector, stack traces of nodes and hopeless searches; every setting is put back,
    also after an error.
    """
    with no_collector(), _no_stack_traces(), _no_hopeless_search():
        yield


@contextlib.contextmanager
def no_collector() -> Iterator[None]:
    """Work in the block without the garbage collector, if it is on.

    Tracing and passes make millions of objects that live as long as they do, and few that do not: a walk over them frees next to nothing.
    Not for blocks that read weights: what a cycle holds stays until the end.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@contextlib.contextmanager
def _no_stack_traces() -> Iterator[None]:
    """The tracer notes for each node where in Python it was made, and KeepScopes would throw it away."""
    import torch.fx  # here: lint does without torch

    config: Any = torch.fx.config
    before = config.do_not_emit_stack_traces
    config.do_not_emit_stack_traces = True
    try:
        yield
    finally:
        config.do_not_emit_stack_traces = before


@contextlib.contextmanager
def _no_hopeless_search() -> Iterator[None]:
    """Rules of several output nodes are tried only at nodes that their first one matches.

    onnxscript lists all nodes of the graph for each node and rule, then tries all combinations, and every one of them starts by matching
    this one node: the time goes with the square of a graph's length, and more than that with its slices.
    """
    from onnxscript.rewriter import _matcher  # here, as all that takes seconds to import

    matcher: Any = _matcher.SimplePatternMatcher
    if missing := [name for name in _NEEDED if not hasattr(matcher, name)]:
        logger.debug("this onnxscript's matcher has no %s: it is left as it is", ", ".join(missing))
        yield
        return
    original = matcher.match

    def match(self: Any, model: Any, graph: Any, node: Any, *, verbose: int = 0, **options: Any) -> Any:
        if not self.pattern.has_single_output_node:
            self._tracer, self._graph = options.get("tracer"), getattr(graph, "graph", graph)  # of a function, or itself
            self._init_match(verbose)
            if not self._match_node(self.pattern.output_nodes[0], node):
                return self._match
        return original(self, model, graph, node, verbose=verbose, **options)

    matcher.match = match
    try:
        yield
    finally:
        matcher.match = original
