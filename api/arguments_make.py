"""Arguments and options of the commands that make something: export, prune, prune-onnx and build."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from sievert.arguments import SIZES


class DTypeName(StrEnum):
    """Floating point type of a bundle."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class TargetName(StrEnum):
    """What the graphs are written for."""

    onnxruntime = "onnxruntime"
    tensorrt_rtx = "tensorrt-rtx"
    tensorrt = "tensorrt"


_AS_FULL = "Default: as full."

# export
Model = Annotated[str, Argument(metavar="MODEL", help="A checkpoint's folder, or a hub id (owner/name).", show_default=False)]
Out = Annotated[str, Argument(metavar="[OUT]", help="Folder to make. Default: NAME-bundle, here.", show_default=False)]
DType = Annotated[DTypeName, Option("--dtype", help="Floating point type of the graphs.")]
NoPrune = Annotated[bool, Option("--no-prune", help="Make the unpruned variant only.")]
MaxText = Annotated[
    int | None,
    Option(
        "--max-text", metavar="N", help="Tokens of a prompt beside the image's. Default: 128.", rich_help_panel=SIZES, show_default=False
    ),
]
Images = Annotated[
    int | None, Option("--images", metavar="N", help="Images in each prompt. Default: 1.", rich_help_panel=SIZES, show_default=False)
]
Frames = Annotated[
    int,
    Option("--frames", metavar="N", help="Each prompt has a video of N frames in place of images. 0: none.", rich_help_panel=SIZES),
]
ImageSize = Annotated[
    str,
    Option(
        "--image-size",
        metavar="HEIGHTxWIDTH|FILE",
        help="Pixels of the images, or an image of that size, where a model takes several sizes. Default: its own.",
        rich_help_panel=SIZES,
        show_default=False,
    ),
]
SampleImages = Annotated[
    list[str] | None,
    Option(
        "--sample-image",
        metavar="FILE",
        help="An image of the prompts, in place of --image-size; repeat it for several, in place of --images.",
        rich_help_panel=SIZES,
    ),
]
DynamicText = Annotated[
    bool,
    Option(
        "--dynamic-text", help="Prompts cost what they are long: --max-text only limits them. All else stays fixed.", rich_help_panel=SIZES
    ),
]
ShareWeights = Annotated[
    str,
    Option(
        "--share-weights",
        metavar="BUNDLE",
        help="A bundle of the same checkpoint and dtype for another image size: both have one weights file, by a hard link.",
        show_default=False,
    ),
]

# export, prune and inspect
SamplePrompts = Annotated[
    list[str] | None,
    Option(
        "--sample-prompt",
        metavar="TEXT",
        help="A question as they will be: --max-text is what it takes in the model's template, rounded up to a multiple of 16. "
        "May be repeated: the longest counts.",
        rich_help_panel=SIZES,
    ),
]

# prune
MaxTextAsFull = Annotated[
    int | None, Option("--max-text", metavar="N", help=f"Tokens of a prompt beside the image's. {_AS_FULL}", rich_help_panel=SIZES)
]
DynamicTextAsFull = Annotated[
    bool | None,
    Option(
        "--dynamic-text/--static-text",
        help=f"Prompts cost what they are long, or what --max-text says. {_AS_FULL}",
        show_default=False,
        rich_help_panel=SIZES,
    ),
]
MaxNewTokensAsFull = Annotated[
    int | None, Option("--max-new-tokens", metavar="N", help=f"Tokens of an answer. {_AS_FULL}", rich_help_panel=SIZES)
]
BatchAsFull = Annotated[int | None, Option("--batch", metavar="N", help=f"Prompts read at once. {_AS_FULL}", rich_help_panel=SIZES)]
DecodeBatchAsFull = Annotated[
    int | None,
    Option("--decode-batch", metavar="N", help="Answers written at once. Default: as full, or as --batch.", rich_help_panel=SIZES),
]
ImagesAsFull = Annotated[int | None, Option("--images", metavar="N", help=f"Images in each prompt. {_AS_FULL}", rich_help_panel=SIZES)]

# build
Capabilities = Annotated[
    list[str] | None,
    Option("--capability", metavar="SM89", help="GPU generation to build for; may be repeated. Default: the builder's."),
]

# prune-onnx
Prefill = Annotated[Path, Argument(metavar="PREFILL", help="A decoder as ONNX, of any length.", show_default=False)]
Decode = Annotated[
    str, Argument(metavar="[DECODE]", help="The tool's own decode graph: only checked to be the same decoder.", show_default=False)
]
OutFolder = Annotated[str, Option("--out", metavar="DIR", help="Folder to make.", show_default=False)]
VisualTokens = Annotated[
    int, Option("--visual-tokens", metavar="N", min=1, help="Visual tokens of one image.", rich_help_panel=SIZES, show_default=False)
]
Grid = Annotated[
    str,
    Option("--grid", metavar="RxC", help="Rows and columns of an image's patches, if you know.", rich_help_panel=SIZES, show_default=False),
]
TargetOption = Annotated[TargetName, Option("--target", help="What the graphs are written for.")]
Check = Annotated[bool, Option("--check", help="Compare with PREFILL in ONNX Runtime, where every token is kept.")]
