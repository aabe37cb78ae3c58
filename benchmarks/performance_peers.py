"""What the performance benchmark compares with: transformers in PyTorch, its own ONNX export, and bare products in ONNX Runtime."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import torch
from onnx import TensorProto, helper, numpy_helper

_FLOAT: Final = TensorProto.FLOAT
Run = Callable[[], object]


def load_torch(checkpoint: Path, threads: int, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    """The model as transformers loads it, with scaled dot product attention."""
    from transformers import LlavaForConditionalGeneration

    torch.set_num_threads(threads)
    models: Any = LlavaForConditionalGeneration  # it has no types
    return models.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa").to(device).eval()


def run_torch(model: Any, rows: int) -> Run:
    """Prefill of ``rows`` rows with a cache, one row of logits, which the host gets, as from our engines."""
    embeds = _noise(model, 1, rows, model.config.text_config.hidden_size)

    def run() -> object:
        with torch.inference_mode():
            hidden = model.model.language_model(inputs_embeds=embeds, use_cache=True).last_hidden_state
            return model.lm_head(hidden[:, -1]).float().cpu()

    return run


def run_torch_vision(model: Any, picture: tuple[int, ...]) -> Run:
    """The features of one picture ``[C, H, W]``, which the host gets."""
    pixels = _noise(model, 1, *picture)

    def run() -> object:
        with torch.inference_mode():
            return [each.cpu() for each in model.model.get_image_features(pixel_values=pixels).pooler_output]

    return run


def _noise(model: Any, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(model.device, model.dtype)


@contextmanager
def pruning_hooks(model: Any, layer: int, kept: torch.Tensor) -> Iterator[None]:
    """Let ``layer`` and all behind it run on the rows ``kept`` only, which are given: the rival chooses for free."""

    def narrow(number: int) -> Callable[..., Any]:
        def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            cos, sin = kwargs["position_embeddings"]
            kwargs = {**kwargs, "position_embeddings": (cos[:, kept], sin[:, kept]), "attention_mask": None}
            return ((args[0][:, kept], *args[1:]) if number == layer else args), kwargs

        return hook

    layers = model.model.language_model.layers
    handles = [layers[number].register_forward_pre_hook(narrow(number), with_kwargs=True) for number in range(layer, len(layers))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def run_torch_pruned(model: Any, rows: int, layer: int, visual: int, keep: int) -> Run:
    """:func:`run_torch` with hooks that drop all but ``keep`` of the ``visual`` rows from row 4 on."""
    kept = torch.cat([torch.arange(4), 4 + torch.linspace(0, visual - 1, keep).long(), torch.arange(4 + visual, rows)]).to(model.device)
    plain = run_torch(model, rows)

    def run() -> object:
        with pruning_hooks(model, layer, kept):
            return plain()

    return run


def run_torch_decode(model: Any, rows: int, room: int, tokens: int) -> Run:
    """``tokens`` steps after a prompt of ``rows``, with a static cache of ``room`` more."""
    from transformers import StaticCache

    language = model.model.language_model
    cache: Any = StaticCache(config=model.config.text_config, max_cache_len=rows + room)
    token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    with torch.inference_mode():
        language(inputs_embeds=_noise(model, 1, rows, language.config.hidden_size), past_key_values=cache, use_cache=True)

    def run() -> object:
        for layer in cache.layers:  # what is behind the prompt is masked: only the counter matters
            layer.cumulative_length.fill_(rows)
        logits = None
        with torch.inference_mode():
            for step in range(tokens):
                position = torch.full((1, 1), rows + step, device=model.device)
                hidden = language(input_ids=token, past_key_values=cache, position_ids=position, use_cache=True).last_hidden_state
                logits = model.lm_head(hidden[:, -1]).float().cpu()
        return logits

    return run


def export_own(model: Any, rows: int, folder: Path, threads: int) -> Run:
    """Prefill as transformers exports it to ONNX itself, fused for ONNX Runtime's CPU, one row of logits."""
    embeds = torch.randn(1, rows, model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(0))
    inputs = {"inputs_embeds": embeds, "attention_mask": torch.ones(1, rows, dtype=torch.long), "use_cache": True, "logits_to_keep": 1}
    return _run_export(_as_text_model(model), inputs, folder, threads, 1)


def export_own_decode(model: Any, rows: int, room: int, folder: Path, threads: int, tokens: int) -> Run:
    """One step of decode as transformers exports it to ONNX itself, with a static cache of ``rows + room``; ``tokens`` times."""
    from transformers import StaticCache

    text = _as_text_model(model)
    cache = StaticCache(config=model.config.text_config, max_cache_len=rows + room)
    with torch.inference_mode():
        text(inputs_embeds=torch.randn(1, rows, text.config.hidden_size), past_key_values=cache, use_cache=True, logits_to_keep=1)
    mask = torch.zeros(1, rows + room, dtype=torch.long)
    mask[:, : rows + 1] = 1
    inputs = {"input_ids": torch.zeros(1, 1, dtype=torch.long), "attention_mask": mask, "past_key_values": cache, "use_cache": True}
    return _run_export(text, inputs, folder, threads, tokens)


def _as_text_model(model: Any) -> Any:
    """The same weights as a text model of transformers, which its exporter takes."""
    from transformers import AutoModelForCausalLM

    models: Any = AutoModelForCausalLM  # it has no types
    with torch.device("meta"):
        text = models.from_config(model.config.text_config)
    text.model = model.model.language_model
    text.lm_head = model.lm_head
    return text.eval()


def _run_export(text: Any, inputs: dict[str, Any], folder: Path, threads: int, times: int) -> Run:
    from transformers.exporters import configs, exporter_onnx

    folder.mkdir(parents=True, exist_ok=True)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        exporter: Any = exporter_onnx.OnnxExporter  # it has no types
        exported = exporter().export(text, dict(inputs), config=configs.OnnxConfig(ort_fusions="cpu"))
    path = folder / "model.onnx"
    ir.save(exported.program, str(path), external_data="model.onnx.data")
    session = ort.InferenceSession(str(path), _options(threads), providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    values = {spec.name: ort.OrtValue.ortvalue_from_numpy(_example(spec, inputs)) for spec in session.get_inputs()}
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
    for spec in session.get_outputs():
        # Caches in place, as a runtime of one's own would bind them; what counts the rows must not move on.
        past = spec.name.replace("output.", "input.", 1)
        if past in values and spec.type == "tensor(float)":
            binding.bind_ortvalue_output(spec.name, values[past])
        else:
            binding.bind_output(spec.name, "cpu")

    def run() -> object:
        for _ in range(times):
            session.run_with_iobinding(binding)
        return values

    return run


def _example(spec: Any, inputs: dict[str, Any]) -> np.ndarray[Any, Any]:
    """What was traced with, where it is a tensor of that name; of caches zeros, and as many rows as the mask has but the new one."""
    given = inputs.get(spec.name)
    if isinstance(given, torch.Tensor):
        return given.numpy()
    if spec.name.endswith("cumulative_length"):
        return np.array(int(inputs["attention_mask"].sum()) - 1)
    return np.zeros([int(axis) for axis in spec.shape], np.float32)


def run_products(shapes: list[tuple[int, int]], rows: int, threads: int) -> tuple[Run, int]:
    """A chain of nothing but products ``[rows, k] x [k, n]`` in ONNX Runtime, in this order, and their FLOPs.

    Weights of equal shape are distinct, as in the model. Each product reads the last result of the width it needs; of what nothing reads
    one row goes to the output, so that it is computed.
    """
    rng = np.random.default_rng(0)
    latest: dict[int, str] = {}
    nodes, weights, ends = [], [], []
    for number, (inner, outer) in enumerate(shapes):
        weights.append(numpy_helper.from_array(rng.standard_normal((inner, outer), np.float32) / np.float32(inner**0.5), f"w{number}"))
        nodes.append(helper.make_node("MatMul", [latest.get(inner, f"x{inner}"), f"w{number}"], [f"y{number}"]))
        nodes.append(helper.make_node("Slice", [f"y{number}", "zero", "one", "axis"], [f"r{number}"]))
        nodes.append(helper.make_node("ReduceMax", [f"r{number}"], [f"m{number}"], keepdims=0))
        latest[outer] = f"y{number}"
        ends.append(f"m{number}")
    nodes.append(helper.make_node("Sum", ends, ["end"]))
    widths = sorted({inner for inner, _ in shapes})
    inputs = [helper.make_tensor_value_info(f"x{width}", _FLOAT, [1, rows, width]) for width in widths]
    constants = [numpy_helper.from_array(np.array([value]), name) for name, value in (("zero", 0), ("one", 1), ("axis", 1))]
    output = helper.make_tensor_value_info("end", _FLOAT, [])
    graph = helper.make_graph(nodes, "products", inputs, [output], initializer=[*weights, *constants])
    session = _session(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11), threads)
    feeds = {f"x{width}": rng.standard_normal((1, rows, width), np.float32) for width in widths}
    return (lambda: session.run(None, feeds)), sum(2 * rows * inner * outer for inner, outer in shapes)


def _session(model: onnx.ModelProto, threads: int) -> ort.InferenceSession:
    """A session of a model that may be larger than what fits a message: weights are handed over beside it."""
    options = _options(threads)
    values = [tensor for tensor in model.graph.initializer if len(tensor.raw_data) > 1 << 16]
    arrays = {tensor.name: ort.OrtValue.ortvalue_from_numpy(numpy_helper.to_array(tensor).copy()) for tensor in values}
    for tensor in values:
        size = len(tensor.raw_data)
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "in-memory"), ("offset", "0"), ("length", str(size))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    options.add_external_initializers(list(arrays), list(arrays.values()))
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def measure_stream(threads: int) -> tuple[Run, int]:
    """Reads a gibibyte once, and how many bytes that are: what memory gives to ``threads`` threads."""
    torch.set_num_threads(threads)
    data = torch.ones(1 << 28)
    return data.sum, data.nbytes


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return options
