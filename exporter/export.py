"""A checkpoint to dynamic graphs in memory."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.passes import InPlacePass
from onnx_ir.passes import common as common_passes
from transformers import PreTrainedConfig, PreTrainedModel

from sievert.bundle.manifest import Source
from sievert.bundle.names import DOWNLOADS
from sievert.bundle.specs import Geometry
from sievert.exporter.architectures.base import TwoWay
from sievert.exporter.axes import GatherPositions
from sievert.exporter.checkpoint import Checkpoint, open_checkpoint
from sievert.exporter.confirm import confirm_decoder, confirm_interface
from sievert.exporter.embed import build_embed_tokens
from sievert.exporter.geometry import image_size as choose_size
from sievert.exporter.geometry import read_geometry
from sievert.exporter.load import DType, load_config, load_to_trace, take_sliding_window, torch_dtype
from sievert.exporter.modules import decoder, embedding_scale, one_attention, two_way_decoder, vision_encoder
from sievert.exporter.names import BATCH, DECODER, EMBED_TOKENS, PRODUCER, SEQUENCE, VISION_ENCODER, decoder_outputs, vision_outputs
from sievert.exporter.passes import Float32Islands, Float32Output, HeadInCheckpointLayout, KeepScopes, NameInterface, RaiseOpset
from sievert.exporter.pictures import picture_encoder
from sievert.exporter.rotary import FuseRotary
from sievert.exporter.structure import check_decoder
from sievert.exporter.trace import trace
from sievert.exporter.trial import try_processor
from sievert.exporter.weights import Weight, WeightBinder, parameter_tensor

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exported:
    """A model as dynamic graphs in memory.

    ``graphs`` are ``vision_encoder``, ``embed_tokens`` and ``decoder``; their large initializers are ``weights``, by name, and read the
    checkpoint's files, which must stay, when they are asked for bytes. ``parameters`` are the names of all parameters of the checkpoint.
    ``files`` lie in ``folder`` and belong into a bundle: configuration, generation configuration, tokenizer, processor, chat template.
    ``processor`` is the class to load the last with, if not the one they name.
    """

    graphs: dict[str, ir.Model]
    weights: tuple[Weight, ...]
    geometry: Geometry
    source: Source
    parameters: tuple[str, ...]
    folder: Path
    files: tuple[str, ...]
    processor: str = ""


@dataclass(frozen=True)
class Examined:
    """A checkpoint that can be exported as far as its small files tell; ``config`` is what its model will be built from.

    ``processed`` are its processor's arrays for one picture; ``processor`` is the class to load that with, if not the one its files name.
    """

    checkpoint: Checkpoint
    config: PreTrainedConfig
    geometry: Geometry
    processed: Mapping[str, NDArray[Any]]
    processor: str


def examine_checkpoint(
    model: str | Path,
    *,
    image_size: tuple[int, int] | None = None,
    sample_size: tuple[int, int] | None = None,
    images: int = 1,
    frames: int = 0,
    downloads: Path = DOWNLOADS,
) -> Examined:
    """Everything that can be said of a checkpoint before its weights are read, in about a second; a hub id is downloaded.

    ``image_size`` is (height, width) of the pictures to export for, in pixels; by default ``sample_size`` where the model takes
    several, else the model's own. ``images`` are those of a prompt: some models encode a picture otherwise where there are several. With
    ``frames`` a prompt has one video of so many in place of a picture.

    Raises:
        CheckpointError: no checkpoint, or one that is incomplete or unsafe to read.
        UnsupportedModelError: a model that is not exported; the message names the reason.
        InputError: a model of pictures of any size, and no ``image_size``.
    """
    checkpoint = open_checkpoint(model, downloads=downloads)
    config = load_config(checkpoint)
    text = config.get_text_config()
    check_decoder(text, checkpoint.architecture, given=checkpoint.given)
    size = choose_size(checkpoint, config, image_size, sample_size)
    trial = try_processor(checkpoint, config, size, images=images, frames=frames)
    window = take_sliding_window(text) if checkpoint.architecture.two_way is None else None
    geometry = read_geometry(checkpoint, config, trial, size, window=window)
    return Examined(checkpoint, config, geometry, trial.arrays, "" if geometry.film else checkpoint.architecture.processor)


def export_model(
    model: str | Path,
    *,
    dtype: DType = "float32",
    image_size: tuple[int, int] | None = None,
    images: int = 1,
    frames: int = 0,
    downloads: Path = DOWNLOADS,
) -> Exported:
    """Trace a checkpoint: a local folder, or a hub id that is downloaded below ``downloads`` first, for prompts of ``images`` pictures, or
    of a video of ``frames``.

    Graphs have symbolic ``batch``, ``sequence`` and ``visual``: ``vision_encoder`` pixel_values[B, C, H, W] to the image_features[B, n, D]
    of one image each, or pixel_values[1, *picture] of a single one of ``image_size`` to these and the planes deepstack.{i} of the same
    shape that layers add; ``embed_tokens`` input_ids[B, S], image_features[B, Nv, D] of any number of images, visual_index[B, Nv] to
    inputs_embeds[B, S, D]; ``decoder`` inputs_embeds, attention_mask[B, S], position_ids[B, S] (or [axes, B, S]) to logits[B, S, V]
    (float32) and present.{i}.key/.value[B, G, S, d]; where the geometry has tokens that see one another both ways, also two_way[B, S], 1
    for these. All else is of ``dtype``, ids and masks int64; with 16 bit norms, softmax and rotary tables compute in float32.

    Raises:
        CheckpointError: no checkpoint, or one that is incomplete or unsafe to read.
        UnsupportedModelError: a model that is not exported; the message names the reason.
        InputError: an unknown dtype.
        GraphError: tracing gave a graph without the structure the passes need.
    """
    precision = torch_dtype(dtype)
    examined = examine_checkpoint(model, image_size=image_size, images=images, frames=frames, downloads=downloads)
    checkpoint, config, geometry = examined.checkpoint, examined.config, examined.geometry
    logger.info("loading %s as %s", checkpoint.given, dtype)
    to_trace = load_to_trace(checkpoint, config, precision)
    loaded = to_trace.model
    graphs, binder = {}, WeightBinder(loaded.state_dict(), to_trace.values)
    builders: dict[str, Callable[[], ir.Model]] = {
        VISION_ENCODER: partial(_vision_encoder, loaded, examined, precision),
        EMBED_TOKENS: partial(_embed_tokens, loaded),
        DECODER: partial(_decoder, loaded, geometry, precision, checkpoint.architecture.two_way),
    }
    for name, build in builders.items():
        logger.info("building %s", name)
        graphs[name] = build()
        binder.bind(name, graphs[name])
        confirm_interface(name, graphs[name], geometry)
    source = Source(
        model=checkpoint.given,
        architecture=checkpoint.architecture.model_class,
        family=checkpoint.architecture.name,
        vision=config.vision_config.model_type,
        text=config.get_text_config().model_type,
        dtype=dtype,
        remote_code=checkpoint.code,
    )
    return Exported(
        graphs,
        binder.weights,
        geometry,
        source,
        tuple(loaded.state_dict()),
        checkpoint.folder,
        checkpoint.files,
        examined.processor,
    )


def _vision_encoder(loaded: PreTrainedModel, examined: Examined, dtype: torch.dtype) -> ir.Model:
    module: torch.nn.Module
    pictures, axes, outputs = 1, dict[str, tuple[str, ...]](pixel_values=()), vision_outputs(examined.geometry.visual_planes)
    if examined.checkpoint.architecture.tower is None:
        video = examined.checkpoint.architecture.video if examined.geometry.film else None
        names = {} if video is None else {"method": video.features, "pixels": video.pixels}
        module = picture_encoder(loaded, processed=examined.processed, **names)
    else:
        module, pictures, axes = vision_encoder(loaded, examined.checkpoint.architecture.tower), 2, {"pixel_values": (BATCH,)}
    pixels = torch.zeros(pictures, *examined.geometry.picture_shape, dtype=dtype)
    model = trace(module, {"pixel_values": pixels}, axes, what="the vision encoder")
    _run(model, VISION_ENCODER, [NameInterface(axes, outputs), Float32Islands(), KeepScopes(), RaiseOpset()])
    return model


def _embed_tokens(loaded: PreTrainedModel) -> ir.Model:
    table = loaded.get_input_embeddings().get_parameter("weight")
    return build_embed_tokens(parameter_tensor(table, "table"), name="table", scale=embedding_scale(loaded))


def _decoder(loaded: PreTrainedModel, geometry: Geometry, dtype: torch.dtype, two_way: TwoWay | None = None) -> ir.Model:
    batch, length = 2, 7  # any sizes from 2, different from each other; the graph keeps neither
    several = (geometry.position_axes,) if geometry.position_axes > 1 else ()
    axes = {
        "inputs_embeds": (BATCH, SEQUENCE),
        "attention_mask": (BATCH, SEQUENCE),
        "position_ids": (*(None for _ in several), BATCH, SEQUENCE),
    }
    inputs = {
        "inputs_embeds": torch.zeros(batch, length, geometry.width, dtype=dtype),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        "position_ids": torch.arange(length).expand(*several, batch, length).contiguous(),
    }
    module = decoder(loaded) if two_way is None else two_way_decoder(loaded, two_way)
    if two_way is not None:
        axes["two_way"], inputs["two_way"] = (BATCH, SEQUENCE), torch.zeros(batch, length, dtype=torch.int64)
    with one_attention(loaded):
        model = trace(module, inputs, axes, what="the decoder")
    passes: list[InPlacePass] = [
        NameInterface(axes, decoder_outputs(geometry.depth)),
        GatherPositions(),  # before fusing, which knows tables of one axis
        FuseRotary(),  # before merging: it takes each layer's own spelled-out embedding apart
        common_passes.CommonSubexpressionEliminationPass(),  # each layer computes the same rotary tables
        common_passes.RemoveUnusedNodesPass(),
        Float32Islands(),
        Float32Output("logits"),
        HeadInCheckpointLayout("logits"),
        KeepScopes(),
        RaiseOpset(),
    ]
    _run(model, DECODER, passes)
    confirm_decoder(model, geometry)
    return model


def _run(model: ir.Model, name: str, passes: Sequence[InPlacePass]) -> None:
    for each in passes:
        logger.debug("%s: %s", name, each)
        each(model)
    model.graph.name = name
    model.producer_name, model.producer_version = PRODUCER, None
