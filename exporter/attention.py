"""Attention of our own in the place of the one that a model's configuration names, for the length of a trace."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def attending_by(name: str, attend: Callable[..., Any], configs: Iterable[PreTrainedConfig]) -> Iterator[None]:
    """Modules of these configurations go through ``attend``, which transformers knows as ``name``; all is put back at the end."""
    before = [(config, config._attn_implementation) for config in configs]
    ALL_ATTENTION_FUNCTIONS.register(name, attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, sdpa_mask)
    try:
        for config, _ in before:  # not by the property, which would set the parts' too
            config._attn_implementation_internal = name
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation
        for registry in (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS):
            registry._global_mapping.pop(name)
