"""A checkpoint to dynamic graphs in memory."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from onnx_ir.passes import InPlacePass
from onnx_ir.passes import common as common_passes
from transformers import PreTrainedConfig, PreTrainedModel

from sievert.bundle.manifest import Source
from sievert.bundle.specs import Geometry
from sievert.exporter.architectures import Architecture
from sievert.exporter.axes import GatherPositions
from sievert.exporter.checkpoint import Checkpoint, open_checkpoint
from sievert.exporter.confirm import confirm_decoder, confirm_interface
from sievert.exporter.embed import build_embed_tokens
from sievert.exporter.geometry import read_geometry
from sievert.exporter.load import DType, load_config, load_model, take_sliding_window, torch_dtype
from sievert.exporter.modules import decoder, vision_encoder
from sievert.exporter.names import BATCH, DECODER, EMBED_TOKENS, PRODUCER, SEQUENCE, VISION_ENCODER, decoder_outputs
from sievert.exporter.passes import Float32Islands, Float32Output, HeadInCheckpointLayout, KeepScopes, NameInterface, RaiseOpset
from sievert.exporter.rotary import FuseRotary
from sievert.exporter.structure import check_decoder
from sievert.exporter.trace import trace
from sievert.exporter.weights import Weight, WeightBinder, parameter_tensor

logger = logging.getLogger(__name__)

DOWNLOADS = Path("~/.cache/sievert/checkpoints")
"""Where hub ids are downloaded to, each into a folder of its own."""


@dataclass(frozen=True)
class Exported:
    """A model as dynamic graphs in memory.

    ``graphs`` are ``vision_encoder``, ``embed_tokens`` and ``decoder``; their large initializers are ``weights``, by name, and refer
    to the loaded parameters. ``parameters`` are the names of all parameters of the checkpoint. ``files`` lie in ``folder`` and belong
    into a bundle: configuration, generation configuration, tokenizer, processor, chat template.
    """

    graphs: dict[str, ir.Model]
    weights: tuple[Weight, ...]
    geometry: Geometry
    source: Source
    parameters: tuple[str, ...]
    folder: Path
    files: tuple[str, ...]


@dataclass(frozen=True)
class Examined:
    """A checkpoint that can be exported as far as its small files tell; ``config`` is what its model will be built from."""

    checkpoint: Checkpoint
    config: PreTrainedConfig
    geometry: Geometry


def examine_checkpoint(model: str | Path, *, downloads: Path = DOWNLOADS) -> Examined:
    """Everything that can be said of a checkpoint before its weights are read, in about a second; a hub id is downloaded.

    Raises:
        CheckpointError: no checkpoint, or one that is incomplete or unsafe to read.
        UnsupportedModelError: a model that is not exported; the message names the reason.
    """
    checkpoint = open_checkpoint(model, downloads=downloads)
    config = load_config(checkpoint)
    text = config.get_text_config()
    check_decoder(text, checkpoint.architecture, given=checkpoint.given)
    return Examined(checkpoint, config, read_geometry(checkpoint, config, window=take_sliding_window(text)))


def export_model(model: str | Path, *, dtype: DType = "float32", downloads: Path = DOWNLOADS) -> Exported:
    """Trace a checkpoint: a local folder, or a hub id that is downloaded below ``downloads`` first.

    Graphs have symbolic ``batch``, ``sequence`` and ``visual``: ``vision_encoder`` pixel_values[B, C, H, W] to the image_features[B, n, D]
    of one image each; ``embed_tokens`` input_ids[B, S], image_features[B, Nv, D] of any number of images, visual_index[B, Nv] to
    inputs_embeds[B, S, D]; ``decoder`` inputs_embeds,
    attention_mask[B, S], position_ids[B, S] to logits[B, S, V] (float32) and present.{i}.key/.value[B, G, S, d]. All else is of
    ``dtype``, ids and masks int64; with 16 bit norms, softmax and rotary tables compute in float32.

    Raises:
        CheckpointError: no checkpoint, or one that is incomplete or unsafe to read.
        UnsupportedModelError: a model that is not exported; the message names the reason.
        InputError: an unknown dtype.
        GraphError: tracing gave a graph without the structure the passes need.
    """
    precision = torch_dtype(dtype)
    examined = examine_checkpoint(model, downloads=downloads)
    checkpoint, config, geometry = examined.checkpoint, examined.config, examined.geometry
    logger.info("loading %s as %s", checkpoint.given, dtype)
    loaded = load_model(checkpoint, config, precision)
    graphs, binder = {}, WeightBinder(loaded.state_dict())
    for name, build in ((VISION_ENCODER, _vision_encoder), (EMBED_TOKENS, _embed_tokens), (DECODER, _decoder)):
        logger.info("building %s", name)
        graphs[name] = build(loaded, checkpoint.architecture, geometry, precision)
        # At once: until then the graph holds transposed copies of its weights.
        binder.bind(name, graphs[name])
        confirm_interface(name, graphs[name], geometry)
    source = Source(
        model=checkpoint.given,
        architecture=checkpoint.architecture.model_class,
        family=checkpoint.architecture.name,
        vision=config.vision_config.model_type,
        text=config.get_text_config().model_type,
        dtype=dtype,
    )
    return Exported(graphs, binder.weights, geometry, source, tuple(loaded.state_dict()), checkpoint.folder, checkpoint.files)


def _vision_encoder(loaded: PreTrainedModel, architecture: Architecture, geometry: Geometry, dtype: torch.dtype) -> ir.Model:
    pixels = torch.zeros(2, geometry.channels, geometry.image_height, geometry.image_width, dtype=dtype)
    axes = {"pixel_values": (BATCH,)}
    model = trace(vision_encoder(loaded, architecture), {"pixel_values": pixels}, axes, what="the vision encoder")
    _run(model, VISION_ENCODER, [NameInterface(axes, ("image_features",)), Float32Islands(), KeepScopes(), RaiseOpset()])
    return model


def _embed_tokens(loaded: PreTrainedModel, architecture: Architecture, _: Geometry, __: torch.dtype) -> ir.Model:
    table = loaded.get_submodule(architecture.embedding).get_parameter("weight")
    return build_embed_tokens(parameter_tensor(table, "table"), name="table")


def _decoder(loaded: PreTrainedModel, architecture: Architecture, geometry: Geometry, dtype: torch.dtype) -> ir.Model:
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
    model = trace(decoder(loaded, architecture), inputs, axes, what="the decoder")
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
