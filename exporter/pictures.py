"""The vision part of any model for one picture of a fixed size, as a module that traces to a straight line of operators."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from sievert.bundle.errors import GraphError, UnsupportedModelError
from sievert.exporter.attention import attending_by

PIXELS: Final = "pixel_values"
FEATURES: Final = "image_features"

_ATTENTION: Final = "sievert_flash"
"""Towers say where packed segments begin and end only to an attention whose name has "flash" in it; to others they loop."""


class PictureEncoder(nn.Module):
    """Pixels of one picture to its features: ``pixel_values[1, *picture]`` to ``image_features[1, n, D]``.

    Towers that also feed planes to inner layers of the decoder give ``deepstack.{i}[1, n, D]`` as well. Whatever depends only on the
    picture's size is a constant of the trace. Not in a trace, the module computes what the model's ``method`` does. A video counts as a
    picture.
    """

    def __init__(
        self, vision: PreTrainedModel, pixels: torch.Tensor, layout: Mapping[str, torch.Tensor], method: str = "get_image_features"
    ) -> None:
        super().__init__()
        self.model = vision
        self._method = method
        # In containers: the tracer makes placeholders of tensors that are attributes, and these must stay numbers.
        self._pixels = (pixels,)
        self._layout = dict(layout)
        self._packed = _find_packed_attention(vision)
        with torch.no_grad():
            made = self(pixels.reshape(1, *self.picture))
        self.outputs = tuple(made)
        """Names of what :meth:`forward` returns, in order."""
        self.tokens: int = made[FEATURES].shape[1]
        """Features of the picture, the ``n`` above."""

    @property
    def picture(self) -> tuple[int, ...]:
        """Shape of one picture: what the processor gives, without a leading axis of 1."""
        shape = self._pixels[0].shape
        return tuple(shape[1:] if shape[0] == 1 else shape)

    def blank(self) -> torch.Tensor:
        """A picture to trace with, all zeros: ``[1, *picture]``."""
        return torch.zeros(1, *self.picture, dtype=self._pixels[0].dtype)

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return ``image_features`` and the planes, by name."""
        (pixels,) = self._pixels
        with _segment_attention(self.model, self._packed), _Evaluator() as evaluator:
            given = pixel_values.reshape(pixels.shape)
            evaluator.know(given, pixels)
            layout = {name: value.clone() for name, value in self._layout.items()}
            see: Any = getattr(self.model, self._method)
            result = see(given, **layout)
            outputs = {FEATURES: _join(result.pooler_output)}
            for index, plane in enumerate(getattr(result, "deepstack_features", None) or ()):
                outputs[f"deepstack.{index}"] = _join(plane)
        return outputs


def picture_encoder(
    model: PreTrainedModel, *, processed: Mapping[str, np.ndarray], method: str = "get_image_features", pixels: str = PIXELS
) -> PictureEncoder:
    """The model's vision part for pictures like the one that its processor turned into ``processed``; parameters are shared.

    Of ``processed``, the layout tensors that ``method`` takes by name beside ``pixels`` become constants: the encoder's pictures all have
    this one's size and tiles. It should be no blank one: towers that tell padding tiles by their zeros are taken to mean this picture's.

    Raises:
        UnsupportedModelError: the model has no such ``method``, or it requires what the processor does not give.
    """
    base: Any = model.base_model
    if not hasattr(base, method):
        raise UnsupportedModelError(f"{type(base).__name__} has no {method}: its vision part cannot be told from the rest")
    accepted = inspect.signature(getattr(base, method)).parameters
    layout = {name: torch.as_tensor(processed[name]) for name in accepted if name in processed and name != pixels}
    required = {name for name, each in accepted.items() if each.default is each.empty and each.kind is not each.VAR_KEYWORD}
    if missing := sorted(required - layout.keys() - {pixels}) + [pixels] * (pixels not in processed):
        raise UnsupportedModelError(f"{type(base).__name__} needs {', '.join(missing)}, but its processor gave {', '.join(processed)}")
    example = torch.as_tensor(processed[pixels]).to(model.dtype)
    return PictureEncoder(_without_decoder(base), example, layout, method).eval()


def _without_decoder(base: Any) -> PreTrainedModel:
    """A second handle on the model that shares all its parts but the decoder, whose parameters the tracer would carry along."""
    decoder = base.get_decoder()
    vision: PreTrainedModel = copy.copy(base)
    vision._parameters = dict(base._parameters)
    vision._modules = {name: child for name, child in base._modules.items() if child is not decoder}
    return vision


def _join(features: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """Features of all tiles in a row: [1, n, D]."""
    parts = [features] if isinstance(features, torch.Tensor) else list(features)
    rows = [part.reshape(-1, part.shape[-1]) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)).unsqueeze(0)


class _Evaluator(TorchFunctionMode):
    """Evaluates, in the middle of a trace, every operation whose operands are all known numbers.

    Tensors made inside the trace from sizes and layout stay ordinary tensors, so that Python may read them, loop over them and split by
    them; only what touches a traced tensor (pixels, parameters) is recorded. What is computed from the pixels alone is also computed on
    the example's (``know``): where such a result is no float but a choice, as which tiles are real, the example's is taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self._examples: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def know(self, traced: torch.Tensor, example: torch.Tensor) -> None:
        """Let ``example`` decide where ``traced`` would have to."""
        if _is_traced(traced):
            self._examples[id(traced)] = (traced, example)  # both: an id is only unique among living objects

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        tensors: list[torch.Tensor] = []
        _map_tensors((args, kwargs), tensors.append)
        traced = [tensor for tensor in tensors if _is_traced(tensor)]
        if not traced:
            return _evaluate(func, args, kwargs)
        example = None
        if all(id(tensor) in self._examples for tensor in traced):
            example = _evaluate(func, *_map_tensors((args, kwargs), self._example))
            if not _has_floats(example):
                return example
        if len(traced) < len(tensors):
            args, kwargs = _spell_out(func, args, kwargs)
        result = args[0] if _leaves_alone(func, args) else func(*args, **kwargs)
        if example is not None:
            self._know_all(result, example)
        return result

    def _example(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._examples[id(tensor)][1] if _is_traced(tensor) else tensor

    def _know_all(self, result: Any, example: Any) -> None:
        if isinstance(result, torch.Tensor):
            self.know(result, example)
        elif isinstance(result, (tuple, list)):
            for each, its in zip(result, example, strict=True):
                self._know_all(each, its)


def _is_traced(tensor: torch.Tensor) -> bool:
    """Whether the tensor stands for a value of the graph: the tracer's tensors are of classes of its own."""
    return type(tensor) not in (torch.Tensor, nn.Parameter)


def _evaluate(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    with torch._C.DisableTorchFunction(), _disable_current_modes():
        return func(*args, **kwargs)


def _has_floats(result: Any) -> bool:
    if isinstance(result, torch.Tensor):
        return result.is_floating_point()
    return isinstance(result, (tuple, list)) and any(map(_has_floats, result))


def _spell_out(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Known numbers beside traced operands in the form that traces to static operators: sizes as ints, masks as indices.

    Raises:
        GraphError: a traced value is written into a known tensor.
    """
    name = getattr(func, "__name__", "")
    writes = name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))
    if writes and isinstance(args[0], torch.Tensor) and not _is_traced(args[0]):
        raise GraphError(f"{name} writes what depends on the picture's content into a constant of its size: this cannot be traced")
    if name in ("__getitem__", "__setitem__"):
        args = (args[0], _index(args[1]), *args[2:])
    return _map_tensors((args, kwargs), _as_int)


def _leaves_alone(func: Callable[..., Any], args: tuple[Any, ...]) -> bool:
    """A squeeze of an axis longer than 1 does nothing in PyTorch, but the tracer writes a Squeeze that no engine takes."""
    return getattr(func, "__name__", "") == "squeeze" and len(args) == 2 and isinstance(args[1], int) and args[0].shape[args[1]] != 1


def _index(index: Any) -> Any:
    """Known masks among the indices as the positions where they are true."""
    parts: list[Any] = []
    for part in index if isinstance(index, tuple) else (index,):
        mask = isinstance(part, torch.Tensor) and part.dtype == torch.bool and not _is_traced(part)
        parts += _evaluate(torch.nonzero, (part,), {"as_tuple": True}) if mask else [part]
    return tuple(parts)


def _as_int(tensor: torch.Tensor) -> Any:
    known = not _is_traced(tensor) and tensor.ndim == 0 and not (tensor.is_floating_point() or tensor.is_complex())
    return _evaluate(torch.Tensor.item, (tensor,), {}) if known else tensor


def _map_tensors(value: Any, change: Callable[[torch.Tensor], Any]) -> Any:
    """``value`` with each tensor inside, also of slices, replaced by ``change`` of it."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, slice):
        return slice(*(_map_tensors(each, change) for each in (value.start, value.stop, value.step)))
    if type(value) in (tuple, list):
        return type(value)(_map_tensors(each, change) for each in value)
    if type(value) is dict:
        return {key: _map_tensors(each, change) for key, each in value.items()}
    return value


def _find_packed_attention(vision: nn.Module) -> dict[type[nn.Module], Callable[..., Any]]:
    """Classes of attention over packed segments, with their forward as transformers has it."""
    classes = {type(module) for module in vision.modules()}
    return {each: each.forward for each in classes if "cu_seqlens" in inspect.signature(each.forward).parameters}


@contextmanager
def _segment_attention(vision: nn.Module, packed: Mapping[type[nn.Module], Callable[..., Any]]) -> Iterator[None]:
    """Every attention below ``vision`` goes through :func:`_attend`; all is put back at the end."""
    configs: dict[int, PreTrainedConfig] = {}
    for module in vision.modules():
        if isinstance(config := getattr(module, "config", None), PreTrainedConfig):
            configs[id(config)] = config
    # The exporter replaces these for the length of a trace, by one that refuses segments of different lengths.
    replaced = {each: each.forward for each, forward in packed.items() if each.forward is not forward}
    with attending_by(_ATTENTION, _attend, configs.values()):
        try:
            for each in replaced:
                each.forward = packed[each]
            yield
        finally:
            for each, forward in replaced.items():
                each.forward = forward


def _attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    cu_seq_lens_q: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of q, k, v ``[B, H, N, d]`` to ``[B, N, H, d]``, of each segment to itself where N is cut into several.

    Segments of the same length are one batch, so that there is one operator for each length that occurs.
    """
    if attention_mask is not None and not _is_traced(attention_mask) and _hides_nothing(attention_mask):
        attention_mask = None
    if attention_mask is not None and attention_mask.ndim == 2:  # of keys, as flash attention takes it
        attention_mask = attention_mask[:, None, None, :].bool()
    starts = [0, query.shape[2]] if cu_seq_lens_q is None else cu_seq_lens_q.tolist()
    if len(starts) == 2:
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return output, None
    rows: dict[int, list[int]] = {}
    for start, stop in itertools.pairwise(starts):
        rows.setdefault(stop - start, []).extend(range(start, stop))
    outputs = []
    for length, places in rows.items():
        index = None if len(rows) == 1 else torch.tensor(places)
        q, k, v = (_cut(each, index, length) for each in (query, key, value))
        output, _ = sdpa_attention_forward(module, q, k, v, None, **options)  # [n, L, H, d]
        outputs.append(output.reshape(1, -1, *output.shape[2:]))
    if len(rows) == 1:
        return outputs[0], None
    order = np.argsort([place for places in rows.values() for place in places])
    return torch.cat(outputs, dim=1).index_select(1, torch.tensor(order.tolist())), None


def _hides_nothing(mask: torch.Tensor) -> bool:
    """Of a mask of keys (2 axes, 1 where seen), a boolean mask (true where seen) or one that is added."""
    return bool(mask.all()) if mask.dtype == torch.bool or mask.ndim == 2 else not bool(mask.any())


def _cut(tensor: torch.Tensor, index: torch.Tensor | None, length: int) -> torch.Tensor:
    """Rows ``index`` of ``[1, H, N, d]``, in segments of ``length``: ``[n, H, L, d]``."""
    rows = tensor if index is None else tensor.index_select(2, index)
    _, H, _, d = rows.shape
    return rows.reshape(H, -1, length, d).transpose(0, 1)
