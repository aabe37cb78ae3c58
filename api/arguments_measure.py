"""Arguments and options of the commands that measure plans and engines: tune and bench."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from typer import Option


class MetricName(StrEnum):
    """What a plan has to keep."""

    auto = "auto"
    agreement = "agreement"
    accuracy = "accuracy"


# tune
_GRID, _PARTS, _CHOICE = "What to try", "Which questions", "How to answer"
Target = Annotated[str, Option("--target", metavar="SHARE", help="What has to be kept of the unpruned model's answers.")]
Metric = Annotated[
    MetricName,
    Option("--metric", help="Answers as the unpruned ones, or right answers. auto: accuracy where every line has an answer."),
]
TunedSelectors = Annotated[
    list[str] | None,
    Option("--selector", metavar="NAME", help="May be repeated. Default: all but random and uniform.", rich_help_panel=_GRID),
]
TunedLayers = Annotated[
    list[int] | None,
    Option("--layer", metavar="L", help="May be repeated. Default: some from 0 to the middle.", rich_help_panel=_GRID),
]
TunedKeeps = Annotated[
    list[str] | None,
    Option("--keep", metavar="A,B,C", help="Shares (22%) or counts (64). Default: from 4% to 75%, and between.", rich_help_panel=_GRID),
]
NoOptions = Annotated[bool, Option("--no-options", help="Selectors with their default options only.", rich_help_panel=_GRID)]
Budget = Annotated[
    str, Option("--budget", metavar="SHARE", help="The most FLOPs of prefill, of the unpruned model's.", rich_help_panel=_GRID)
]
SplitShare = Annotated[
    str,
    Option("--split", metavar="SHARE", help="Questions to tune with; the others confirm. No picture is in both.", rich_help_panel=_PARTS),
]
TuningQuestions = Annotated[
    int | None, Option("--questions", metavar="N", help="At most so many to tune with. Default: all of them.", rich_help_panel=_PARTS)
]
ConfirmQuestions = Annotated[
    int | None,
    Option("--confirm-questions", metavar="N", help="At most so many to confirm on. Default: all of them.", rich_help_panel=_PARTS),
]
SplitSeed = Annotated[int, Option("--seed", help="Which questions go where.", rich_help_panel=_PARTS)]
StrictTarget = Annotated[bool, Option("--strict", help="The lower ends of the intervals have to reach the target.")]
TunedLimit = Annotated[
    int | None, Option("--max-new-tokens", metavar="N", help="Default: what the variant full has room for.", rich_help_panel=_CHOICE)
]
TuneOut = Annotated[
    str, Option("--out", metavar="DIR", help="Folder to make. Default: BUNDLE-tune, beside the bundle.", show_default=False)
]
ForceResults = Annotated[bool, Option("--force", help="Replace the results that stand there, and go on from their answers.")]

# bench
BenchEngines = Annotated[
    list[str] | None, Option("--engine", metavar="NAME", help="May be repeated. Default: all of the bundle that run here.")
]
Against = Annotated[
    str,
    Option(
        "--against",
        metavar="VARIANT|BUNDLE",
        help="What times are compared with: a variant, or another bundle of the same model. Default: full.",
        show_default=False,
    ),
]
Rounds = Annotated[int, Option("--rounds", metavar="N", help="Interleaved rounds; 15 or more for intervals that mean something.")]
BenchTokens = Annotated[int, Option("--tokens", metavar="N", help="Tokens decoded in each round.")]
Profiled = Annotated[bool, Option("--profile", help="Also say what each layer, the selector and the head take of prefill.")]
