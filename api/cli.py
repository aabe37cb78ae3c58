"""The ``sievert`` command: its outermost layer, where errors become messages and exit codes.

Exit codes: 0 done (and PASS), 1 a check failed or ``tune`` found no plan, 2 what was given cannot be used, 3 AMBIGUOUS under
``--strict``, 70 a fault of Sievert's own, 130 interrupted.
"""

from __future__ import annotations

import errno
import sys
import traceback
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from sievert import SievertError, cli_ask, cli_bench, cli_calibrate, cli_compare, cli_look, cli_make, cli_onnx, cli_tune
from sievert import arguments as a
from sievert.bundle.remote_code import trust_remote_code
from sievert.console import Screen, configure_output

BAD_INPUT, OWN_FAULT, INTERRUPTED = 2, 70, 130
_EXIT_CODES = "Exit codes: 0 done, and PASS; 1 FAIL; 2 what was given cannot be used; 3 AMBIGUOUS under --strict; 130 interrupted."
_GLOBAL_FLAGS = ("--debug", "-v", "-vv", "--verbose", "--trust-remote-code")


def examples(*lines: str) -> str:
    """An epilog of commands, one per line."""
    return "\n".join(["[bold]Examples[/]", *(f"  [cyan]sievert {line}[/]" for line in lines)])


class _Commands(TyperGroup):
    """Turns exceptions into one message and an exit code, for all commands alike."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Take the global flags wherever they stand: people add ``--debug`` at the end of the line they repeat."""
        end = args.index("--") if "--" in args else len(args)
        flags = [arg for arg in args[:end] if arg in _GLOBAL_FLAGS]
        return super().parse_args(ctx, [*flags, *(arg for place, arg in enumerate(args) if place >= end or arg not in _GLOBAL_FLAGS)])

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        debug = bool(ctx.params.get("debug"))
        screen = Screen()
        try:
            return super().invoke(ctx)
        except SievertError as error:
            if debug:
                traceback.print_exc()
            screen.error(" ".join([str(error), *getattr(error, "__notes__", ())]))
            raise typer.Exit(BAD_INPUT) from error
        except KeyboardInterrupt as error:
            said = "nothing half-written was left behind; what was finished before stays"
            screen.error(" ".join([said, *(f"({note})" for note in getattr(error, "__notes__", ()))]), kind="interrupted")
            raise typer.Exit(INTERRUPTED) from error
        except (typer.Exit, typer.Abort):
            raise
        except Exception as error:
            if _is_click_error(error) or (isinstance(error, OSError) and error.errno == errno.EPIPE):
                raise
            traceback.print_exc()
            screen.error("this is a fault of Sievert's own: please report it with the lines above", kind=type(error).__name__)
            raise typer.Exit(OWN_FAULT) from error


def _is_click_error(error: Exception) -> bool:
    """Usage errors; typer brings its own copy of click in some versions, so their class is known by name."""
    return any(parent.__name__ == "ClickException" for parent in type(error).__mro__)


app = typer.Typer(
    name="sievert",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=examples(
        "export path/to/llava my-bundle --keep 22%",
        "check my-bundle",
        'run my-bundle --image photo.png --prompt "what is this?" --show-kept kept.png',
    )
    + f"\n\n{_EXIT_CODES}",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        import sievert

        Screen().write(f"sievert {sievert.__version__}")
        raise typer.Exit


_Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version.")]


@app.callback()
def start(
    context: typer.Context, verbose: a.Verbose = 0, debug: a.Debug = False, trust: a.TrustRemoteCode = False, version: _Version = False
) -> None:
    """Turn a vision-language model into engines that drop most visual tokens inside the graph, and prove they still agree with PyTorch."""
    del debug, version  # read where exceptions end, and by its callback
    configure_output(verbosity=verbose)
    if trust:
        context.with_resource(trust_remote_code())


app.command(
    epilog=examples(
        "export llava-hf/llava-1.5-7b-hf llava --dtype float16 --layer 4 --keep 22%",
        "export checkpoint my-bundle --keep 22% --engine onnxruntime --engine tensorrt-rtx",
        "export checkpoint my-bundle --layer 4 --keep 50% --layer 8 --keep 22%",
        "export checkpoint my-bundle --selector pyramiddrop",
        "export checkpoint my-bundle --no-prune",
        'export checkpoint my-bundle --sample-image photo.png --sample-prompt "what is this?"',
        "export checkpoint wide-bundle --image-size 448x896 --share-weights my-bundle",
    )
)(cli_make.export)
app.command(
    epilog=examples(
        "prune my-bundle --layer 4 --keep 22% --name iwp-22",
        "prune my-bundle --keep 64 --selector magnitude",
        "prune my-bundle --keep 22% --option strength=4 --name strong",
        "prune my-bundle --plan plan.yaml",
    )
)(cli_make.prune)
app.command(
    "prune-onnx",
    epilog=examples(
        "prune-onnx model.onnx --out pruned --visual-tokens 576 --keep 22% --check",
        "prune-onnx model.onnx --out pruned --visual-tokens 576 --layer 2 --keep 50% --layer 8 --keep 20% --selector fastv",
    ),
)(cli_onnx.prune_onnx)
app.command(
    epilog=examples("build my-bundle --engine tensorrt-rtx", "build my-bundle --variant iwp-22 --engine tensorrt-rtx --capability SM89")
)(cli_make.build)
app.command(
    epilog=examples(
        "check my-bundle",
        "check my-bundle --variant iwp-22 --data questions.jsonl --samples 64 --strict",
        "check my-bundle --model path/to/checkpoint --json report.json",
    )
    + f"\n\n{_EXIT_CODES}"
)(cli_ask.check)
app.command(
    epilog=examples(
        'run my-bundle --image photo.png --prompt "what is this?"',
        'run my-bundle --image photo.png --prompt "what is this?" --prompt "how many are there?" --show-kept kept.png',
        'run my-bundle --variant full --image photo.png --prompt "describe it" --temperature 0.7 --seed 1',
    )
)(cli_ask.run)
app.command(
    "eval",
    epilog=examples(
        "eval my-bundle --data questions.jsonl",
        "eval my-bundle --data questions.jsonl --variant iwp-22 --limit 200 --out results",
    ),
)(cli_compare.evaluate)
app.command(
    epilog=examples(
        "bench my-bundle",
        "bench my-bundle --variant iwp-22 --profile --json bench.json",
        "bench my-bundle --variant iwp-22 --against other-bundle --rounds 31",
    ),
)(cli_bench.bench)
app.command(
    epilog=examples(
        'compare-selectors my-bundle --image photo.png --prompt "what is this?"',
        'compare-selectors my-bundle --image photo.png --prompt "what is this?" --selectors iwp,fastv --layer 4 --keep 11% --out two.png',
    )
)(cli_compare.compare_selectors)
app.command(
    epilog=examples(
        "tune my-bundle --data questions.jsonl --target 99%",
        "tune my-bundle --data questions.jsonl --target 98% --selector iwp --selector dart --layer 4 --keep 11%,22%,35%,50%",
        "tune my-bundle --data questions.jsonl --target 97% --budget 40% --strict",
    )
    + "\n\nExit codes: 0 a plan keeps the target; 1 none does; 2 what was given cannot be used; 130 interrupted."
)(cli_tune.tune)
app.command(
    epilog=examples(
        "collect my-bundle --data questions.jsonl",
        "collect my-bundle --data folder --variant iwp-22 --samples 64 --decode-steps 1,8,32 --out my-data",
    )
)(cli_calibrate.collect)
app.command(
    epilog=examples("ranges my-bundle --collection my-bundle-calibration", "ranges my-bundle --engine tensorrt-rtx --json ranges.json")
)(cli_calibrate.ranges)
app.command(
    epilog=examples(
        "quantise my-bundle --variant iwp-22 --format int8 --collection my-data",
        "quantise my-bundle --variant iwp-22 --format int8 --calibration percentile --name iwp-22-p",
        "quantise my-bundle --format int4 --block 128",
    )
)(cli_calibrate.quantise)
app.command(
    epilog=examples(
        "sensitivity my-bundle --collection my-data",
        "sensitivity my-bundle --collection my-data --format int4 --json worst.json --plot worst.png",
    )
)(cli_calibrate.sensitivity)
app.command(
    epilog=examples(
        "inspect my-bundle",
        "inspect my-bundle --verify",
        "inspect my-bundle --plan iwp-22",
        'inspect my-bundle --sample-prompt "what is this?"',
    )
)(cli_look.inspect)
app.command("list", epilog=examples("list"))(cli_look.list_choices)
app.command(epilog=examples("doctor"))(cli_look.doctor)


def main() -> None:
    """Entry point of the ``sievert`` command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # an answer in characters the terminal has not is shown, not raised about
    app()
