"""Hooks that look and never touch: each is a context manager, gone on exit even after an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def watch_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    """Collect what ``modules`` return while the block runs, under the given names; a module called twice keeps its last output.

    Of a module that returns several values it is the first.
    """
    seen: dict[str, torch.Tensor] = {}

    def look_at(name: str, module: nn.Module) -> Any:
        def look(_module: nn.Module, _inputs: Any, output: Any) -> None:
            seen[name] = output[0] if isinstance(output, tuple) else output

        return module.register_forward_hook(look)

    handles = [look_at(name, module) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_arguments(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Collect the keyword arguments ``module`` is called with while the block runs."""
    seen: dict[str, Any] = {}

    def look(_module: nn.Module, _inputs: Any, arguments: dict[str, Any]) -> None:
        seen.update(arguments)

    handle = module.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


class _Reached(Exception):  # noqa: N818 - a signal, not an error
    pass


@contextmanager
def stop_before(module: nn.Module) -> Iterator[dict[str, Any]]:
    """Run the block until ``module`` would be called, and collect its keyword arguments; what it would compute is not computed."""

    def stop(_module: nn.Module, _inputs: Any) -> None:
        raise _Reached

    with watch_arguments(module) as seen:
        handle = module.register_forward_pre_hook(stop)  # after the one that looks: hooks run in the order they were added
        try:
            yield seen
        except _Reached:
            pass
        finally:
            handle.remove()
