"""Arguments and options of the commands, with their help."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


class NarrowDTypeName(StrEnum):
    """Floating point type that ranges are judged for."""

    float16 = "float16"
    bfloat16 = "bfloat16"


class FormatName(StrEnum):
    """Number format that a variant is quantised to; float32: none, its caches alone are narrowed."""

    float32 = "float32"
    int8 = "int8"
    fp8 = "fp8"
    int4 = "int4"
    int8_weights = "int8-weights"
    float16 = "float16"
    bfloat16 = "bfloat16"


class CalibrationName(StrEnum):
    """How the scales of activations are chosen."""

    max = "max"
    percentile = "percentile"


class PositionName(StrEnum):
    """Which position kept tokens have after a cut."""

    keep = "keep"
    compact = "compact"


_CUT, SIZES, _SAMPLES, _CHOICE = "What to drop", "Sizes the graphs are made for", "What to compare", "How to answer"
_DATA = "What goes through the graphs"

BundlePath = Annotated[Path, Argument(metavar="BUNDLE", help="The bundle's folder.", show_default=False)]
Force = Annotated[bool, Option("--force", help="Replace what has that name.")]
SomeVariants = Annotated[list[str] | None, Option("--variant", metavar="NAME", help="May be repeated. Default: all.")]
SomeEngines = Annotated[list[str] | None, Option("--engine", metavar="NAME", help="May be repeated. Default: onnxruntime.")]
RawPrompt = Annotated[bool, Option("--raw-prompt", help="Prompts are the model's whole input: no chat template.")]

# export and prune-onnx
MaxNewTokens = Annotated[int, Option("--max-new-tokens", metavar="N", help="Tokens of an answer.", rich_help_panel=SIZES)]
Batch = Annotated[int, Option("--batch", metavar="N", help="Prompts read at once.", rich_help_panel=SIZES)]
DecodeBatch = Annotated[
    int | None, Option("--decode-batch", metavar="N", help="Answers written at once. Default: as --batch.", rich_help_panel=SIZES)
]

# export and prune
Layers = Annotated[
    list[int] | None,
    Option("--layer", metavar="L", help="First layer that runs on the kept tokens. Default: the paper's, scaled.", rich_help_panel=_CUT),
]
Keeps = Annotated[
    list[str] | None,
    Option("--keep", metavar="KEEP", help="A share (22%) or a count (64). Default: 22%, or the paper's schedule.", rich_help_panel=_CUT),
]
Selectors = Annotated[
    list[str] | None, Option("--selector", metavar="NAME", help="What chooses; see `sievert list`. Default: iwp.", rich_help_panel=_CUT)
]
SelectorOptions = Annotated[
    list[str] | None, Option("--option", metavar="KEY=VALUE", help="An option of the selector; may be repeated.", rich_help_panel=_CUT)
]
Positions = Annotated[
    PositionName | None,
    Option(
        "--positions",
        help="Kept tokens keep their positions, or are numbered anew. Default: keep, or as in the schedule.",
        show_default=False,
        rich_help_panel=_CUT,
    ),
]
PlanFile = Annotated[
    str,
    Option("--plan", metavar="FILE", help="A plan as YAML, in place of the options above.", show_default=False, rich_help_panel=_CUT),
]
VariantName = Annotated[
    str,
    Option("--name", metavar="NAME", help="Name of the variant. Default: iwp-22 and the like.", show_default=False, rich_help_panel=_CUT),
]

# check
BuiltEngines = Annotated[list[str] | None, Option("--engine", metavar="NAME", help="May be repeated. Default: those built.")]
Samples = Annotated[
    int | None, Option("--samples", metavar="N", help="How many. Default: all of --data, or 8 made-up ones.", rich_help_panel=_SAMPLES)
]
Data = Annotated[
    str,
    Option(
        "--data",
        metavar="FILE",
        help='Lines {"image": "photo.png", "prompt": "what is this?"}; "images": [...] for several. Default: made-up ones.',
        show_default=False,
        rich_help_panel=_SAMPLES,
    ),
]
Tokens = Annotated[int | None, Option("--tokens", metavar="N", help="Answer tokens to compare. Default: 8.", rich_help_panel=_SAMPLES)]
Checkpoint = Annotated[
    str, Option("--model", metavar="PATH", help="Where the checkpoint is. Default: where the export found it.", show_default=False)
]
Strict = Annotated[bool, Option("--strict", help="End with 3 where near ties leave a verdict AMBIGUOUS.")]
JsonFile = Annotated[Path | None, Option("--json", metavar="FILE", help="Write every number to a file.")]
PlotFile = Annotated[Path | None, Option("--plot", metavar="FILE", help="Draw the bars as PNG, with sievert[plot].")]

# run
ImageFiles = Annotated[
    list[str],
    Option(
        "--image",
        metavar="FILE",
        help="PNG, JPEG, WEBP, BMP, GIF or TIFF. Repeat it where a prompt has several images, in their order.",
        show_default=False,
    ),
]
SomeImageFiles = Annotated[
    list[str] | None,
    Option(
        "--image",
        metavar="FILE",
        help="PNG, JPEG, WEBP, BMP, GIF or TIFF. Repeat it for several images, or the frames of a video, in their order.",
        show_default=False,
    ),
]
VideoSource = Annotated[
    str,
    Option(
        "--video",
        metavar="DIR|FILE",
        help="A folder of frames (in the order of their names), or an animated GIF or WebP, for a bundle exported with --frames.",
        show_default=False,
    ),
]
FramesPerSecond = Annotated[
    float | None,
    Option("--fps", metavar="N", help="Frames a second of --video. Default: what an animation says, else 2.", show_default=False),
]
Prompts = Annotated[
    list[str],
    Option("--prompt", metavar="TEXT", help="A question; may be repeated: the images are looked at once.", show_default=False),
]
OneVariant = Annotated[str, Option("--variant", metavar="NAME", help="Default: the only pruned one.", show_default=False)]
LowMemory = Annotated[
    bool,
    Option("--low-memory", help="ONNX Runtime on the CPU holds the weights once, not in each graph; the price: docs/bench.md."),
]
Engine = Annotated[str, Option("--engine", metavar="NAME", help="What runs it.")]
Limit = Annotated[
    int | None, Option("--max-new-tokens", metavar="N", help="Default: what the variant has room for.", rich_help_panel=_CHOICE)
]
Temperature = Annotated[float, Option("--temperature", help="0 takes the likeliest token.", rich_help_panel=_CHOICE)]
TopP = Annotated[float, Option("--top-p", help="Draw from the likeliest tokens of this joint probability.", rich_help_panel=_CHOICE)]
Seed = Annotated[int, Option("--seed", help="The same seed gives the same answer.", rich_help_panel=_CHOICE)]
KeptFile = Annotated[Path | None, Option("--show-kept", metavar="FILE", help="Draw which patches were kept, as PNG.")]

# eval
Questions = Annotated[
    str,
    Option(
        "--data",
        metavar="FILE",
        help='Lines {"image": "photo.png", "prompt": "what is this?", "answer": "a cat"}; answer: a text, a list of texts, or none.',
        show_default=False,
        rich_help_panel=_SAMPLES,
    ),
]
FirstLines = Annotated[int | None, Option("--limit", metavar="N", help="Only the first N lines.", rich_help_panel=_SAMPLES)]
OtherVariants = Annotated[
    list[str] | None, Option("--variant", metavar="NAME", help="May be repeated. Default: all. The unpruned one always answers too.")
]
SharedLimit = Annotated[
    int | None, Option("--max-new-tokens", metavar="N", help="Default: what all these variants have room for.", rich_help_panel=_CHOICE)
]
AnswersFolder = Annotated[
    str, Option("--out", metavar="DIR", help="Folder of the answers. Default: BUNDLE-eval, beside the bundle.", show_default=False)
]

# compare-selectors
OnePrompt = Annotated[str, Option("--prompt", metavar="TEXT", help="A question.", show_default=False)]
SomeSelectors = Annotated[
    str,
    Option("--selectors", metavar="A,B,C", help="Which ones. Default: all that fit the model.", show_default=False, rich_help_panel=_CUT),
]
OneKeep = Annotated[
    str,
    Option(
        "--keep", metavar="KEEP", help="22% or 64: one cut for every selector. auto: 22%, or the paper's schedule.", rich_help_panel=_CUT
    ),
]
OneLayer = Annotated[
    str,
    Option(
        "--layer",
        metavar="L",
        help="A layer, or auto: the paper's, scaled; with --keep, a seventh of the depth where the paper cuts several times.",
        rich_help_panel=_CUT,
    ),
]
PictureFile = Annotated[Path, Option("--out", metavar="FILE", help="The picture to write, as PNG.")]

# collect and ranges
CalibrationData = Annotated[
    str,
    Option(
        "--data",
        metavar="FILE|DIR",
        help='Lines {"image": "photo.png", "prompt": "what is this?"} ("images": [...] for several), or a folder with such a .jsonl file.',
        show_default=False,
        rich_help_panel=_DATA,
    ),
]
CalibrationSamples = Annotated[
    int | None, Option("--samples", metavar="N", help="Only the first N lines. Default: 128 at most.", rich_help_panel=_DATA)
]
RandomData = Annotated[bool, Option("--random", help="Made-up pictures and words in place of data.", rich_help_panel=_DATA)]
DecodeSteps = Annotated[
    str,
    Option(
        "--decode-steps",
        metavar="N|LIST",
        help="Tokens of the answer that decode's inputs are stored for: the first N of 1, 2, 4, 8..., or a list (1,5,20).",
        rich_help_panel=_DATA,
    ),
]
CollectedVariant = Annotated[str, Option("--variant", metavar="NAME", help="Whose graphs.")]
CollectionOut = Annotated[
    str, Option("--out", metavar="DIR", help="Folder to make. Default: BUNDLE-calibration, beside the bundle.", show_default=False)
]
CollectionFolder = Annotated[
    str,
    Option("--collection", metavar="DIR", help="What `sievert collect` made. Default: BUNDLE-calibration.", show_default=False),
]
RangedVariant = Annotated[str, Option("--variant", metavar="NAME", help="Default: the one collected from.", show_default=False)]
NarrowDType = Annotated[NarrowDTypeName, Option("--dtype", help="Format to judge for.")]
LoweredFor = Annotated[
    str,
    Option(
        "--engine",
        metavar="NAME",
        help="Measure the graphs as this engine is built from them. Default: as the bundle has them.",
        show_default=False,
    ),
]
Worst = Annotated[int, Option("--worst", metavar="N", min=1, help="Tensors to show.")]

# quantise
QuantisedFrom = Annotated[str, Option("--variant", metavar="NAME", help="Whose graphs.")]
_FORMATS_HELP = "int8, fp8: weights and activations; int4, int8-weights: weights alone; or 16 bit."
NumberFormat = Annotated[
    FormatName | None, Option("--format", help=f"{_FORMATS_HELP} Default: int8, or with --kv float32.", show_default=False)
]
SensedFormat = Annotated[FormatName, Option("--format", help="int8, fp8: weights and activations; int4, int8-weights: weights alone.")]
CacheType = Annotated[str, Option("--kv", metavar="TYPE", help="Keep key and value caches in float16 or bfloat16.", show_default=False)]
QuantisedName = Annotated[
    str, Option("--name", metavar="NAME", help="Default: VARIANT-FORMAT, VARIANT-kv-TYPE or both.", show_default=False)
]
Calibrated = Annotated[CalibrationName, Option("--calibration", help="Scales of activations: of their largest value, or a percentile.")]
Percentile = Annotated[float, Option("--percentile", metavar="P", help="Of the activations' magnitudes, with --calibration percentile.")]
Block = Annotated[int, Option("--block", metavar="N", help="Weights that share a scale in int4: 32 or 128.")]
QuantiseSelector = Annotated[bool, Option("--quantise-selector", help="Also the projections that a selector reads.")]
QuantiseHead = Annotated[bool, Option("--quantise-head", help="Also the product that makes the logits.")]
KeepHigh = Annotated[
    list[str] | None,
    Option("--keep-high", metavar="NAME", help="Weights whose name holds this stay as they are; may be repeated.", show_default=False),
]
KeepWorst = Annotated[
    int, Option("--keep-worst", metavar="N", help="The N layers that lose most in --sensitivity stay as they are.", show_default=False)
]
SensitivityFile = Annotated[
    str, Option("--sensitivity", metavar="FILE", help="What `sievert sensitivity --json` wrote.", show_default=False)
]
SensitivitySamples = Annotated[int, Option("--samples", metavar="N", help="How many of the data are run for each layer.")]
RandomScales = Annotated[bool, Option("--random", help="Take scales from random calibration data all the same.")]

# inspect
Verify = Annotated[bool, Option("--verify", help="Hash every file.")]
Tensors = Annotated[bool, Option("--tensors", help="Name every tensor, and all weights.")]
PlanOf = Annotated[str, Option("--plan", metavar="VARIANT", help="Print only this variant's plan, as YAML.", show_default=False)]

# all
Verbose = Annotated[int, Option("--verbose", "-v", count=True, help="Say more; -vv: what the libraries say too.", show_default=False)]
Debug = Annotated[bool, Option("--debug", help="Show the traceback of an error.")]
TrustRemoteCode = Annotated[
    bool, Option("--trust-remote-code", help="Run Python code that the checkpoint or bundle brings along. Read it first.")
]
