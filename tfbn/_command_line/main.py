"""The command line: its options, its errors, and its exit status."""

import argparse
import importlib
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tfbn._command_line import commands
from tfbn._command_line.files import CommandError
from tfbn._support import tables
from tfbn._support.version import VERSION

EPILOG = """\
examples:
  %(prog)s inspect model.keras
  %(prog)s diagnose model.keras train.npz --steps 50
  %(prog)s diagnose model.keras train.npz --html report.html
  %(prog)s recalibrate model.keras train.npz --output recalibrated.keras
  %(prog)s convert model.keras ours.keras --synchronized
  %(prog)s convert ours.keras stock.keras --to keras
  %(prog)s fuse model.keras fused.keras
  %(prog)s unfuse fused.keras tuned.keras
  %(prog)s fold model.keras folded.keras
  %(prog)s export model.keras served/1

exit status: 0 for success, 1 if diagnose found something, 2 for an error.
"""
_SHARED_OPTIONS = "overwrite|tolerance|inputs|steps|batch_size|upstream|include_frozen|prior"
_IN_PYTHON = re.compile(
    rf"`(?P<name>{_SHARED_OPTIONS})`"
    rf"|\b(?P<argument>{_SHARED_OPTIONS})=(?P<value>float\('inf'\)|\S+?)(?=[.,;:)]*(?:\s|$))"
)
"""How the errors of functions mention arguments that are options here."""


def main(arguments: Sequence[str] | None = None, prog: str = "tfbn") -> int:
    """Runs a command.

    Args:
        arguments: The arguments; by default those of the process.
        prog: How the user called the program.

    Returns:
        The exit status: 0 for success, 1 for findings, 2 for an error.
    """
    options = parser(prog).parse_args(arguments, argparse.Namespace(prog=prog))
    sys.path.insert(0, "")  # --import may name a module in the current directory.
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            for name in options.imports:
                importlib.import_module(name)
            return options.run(options)
    except (CommandError, ImportError, OSError, TypeError, ValueError, RuntimeError) as error:
        _say("error", _IN_PYTHON.sub(_as_option, str(error)) or type(error).__name__)
    except Exception:  # Not foreseen: the traceback helps to report it.
        traceback.print_exc()
    finally:
        sys.path.remove("")
    return commands.ERROR


def parser(prog: str) -> argparse.ArgumentParser:
    """Returns the parser of all commands."""
    top = argparse.ArgumentParser(
        prog=prog,
        description="Tools for the batch normalization layers of a Keras model, Keras's and tfbn's.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"tfbn {VERSION}")
    subparsers = top.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def command(name: str, run: Any, text: str) -> argparse.ArgumentParser:
        sub = subparsers.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        sub.set_defaults(run=run)
        sub.add_argument("model", type=Path, metavar="MODEL.keras", help="a saved Keras model")
        sub.add_argument("--json", action="store_true", help="print JSON")
        sub.add_argument(
            "--html", type=Path, metavar="FILE", help="also write the report to one HTML file"
        )
        sub.add_argument(
            "--import",
            action="append",
            default=[],
            dest="imports",
            metavar="MODULE",
            help="import a module that registers custom classes of the model",
        )
        sub.add_argument(
            "--no-safe-mode",
            action="store_false",
            dest="safe_mode",
            help="load Lambda layers, which can run any code: only for files that you trust",
        )
        return sub

    command("inspect", commands.inspect, "list the batch normalization layers")

    sub = command("diagnose", commands.diagnose, "find out why training and inference disagree")
    _add_data(sub, "a .npz file with arrays x and, for losses, y; or a .npy file with inputs")

    sub = command("recalibrate", commands.recalibrate, "set the moving statistics to those of data")
    _add_data(sub, "a .npz file with an array x, or a .npy file with inputs")
    sub.add_argument(
        "--include-frozen", action="store_true", help="recalibrate frozen layers as well"
    )
    sub.add_argument(
        "--prior",
        type=int,
        default=0,
        metavar="N",
        help="let the present statistics count for N examples, for small samples; default: 0",
    )
    _add_output(sub, "--output", required=True)

    sub = command("convert", commands.convert, "convert the batch normalization layers")
    _add_output(sub, "output")
    sub.add_argument(
        "--to", choices=["tfbn", "keras"], default="tfbn", help="the class; default: tfbn"
    )
    sub.add_argument(
        "--synchronized",
        action=argparse.BooleanOptionalAction,
        help="whether replicas share statistics; default: each layer keeps its setting",
    )

    sub = command("fuse", commands.fuse, "fuse batch normalization with the layers before it")
    _add_output(sub, "output")
    _add_comparison(sub)

    sub = command("unfuse", commands.unfuse, "give the ordinary layers of a fused model back")
    _add_output(sub, "output")

    sub = command("fold", commands.fold, "fold batch normalization into the adjacent layers")
    _add_output(sub, "output")
    _add_comparison(sub)

    sub = command("export", commands.export, "write a SavedModel that TensorFlow alone can serve")
    sub.add_argument("output", type=Path, metavar="DIRECTORY", help="the directory to write")
    sub.add_argument("--overwrite", action="store_true", help="replace an existing SavedModel")
    sub.add_argument("--no-fold", action="store_true", help="do not fold batch normalization")
    _add_comparison(sub)
    return top


def _add_data(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument("data", type=Path, metavar="DATA", help=text)
    sub.add_argument(
        "--upstream",
        choices=["population", "batch"],
        default="population",
        help="whether statistics are exact (population), or computed in one pass (batch); "
        "default: population",
    )
    sub.add_argument("--steps", type=int, metavar="N", help="use only N batches")
    sub.add_argument("--batch-size", type=int, metavar="N", help="default: 32")


def _add_output(sub: argparse.ArgumentParser, name: str, **arguments: Any) -> None:
    sub.add_argument(name, type=Path, metavar="OUTPUT.keras", help="the file to write", **arguments)
    sub.add_argument("--overwrite", action="store_true", help="replace an existing file")


def _add_comparison(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--inputs",
        type=Path,
        metavar="FILE",
        help="compare outputs on a .npy file, or on the array x of a .npz file; default: random",
    )
    sub.add_argument(
        "--tolerance",
        type=float,
        metavar="T",
        help="the largest difference relative to the largest output; default: 1e-4",
    )


def _as_option(match: re.Match[str]) -> str:
    """Translates `overwrite=True` to `--overwrite`, and `steps=0` to `--steps 0`."""
    option = "--" + (match["name"] or match["argument"]).replace("_", "-")
    value = match["value"]
    if value in (None, "True"):
        return option
    if value == "False":
        return f"no {option}"
    return f"{option} {'inf' if 'inf' in value else value.strip(chr(39))}"


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    _say("warning", str(message))


def _say(kind: str, text: str) -> None:
    width = tables.line_width(sys.stderr)
    # Options and paths are not broken, so that they can be copied.
    wrapped = textwrap.fill(
        f"{kind}: {text}", width, break_long_words=False, break_on_hyphens=False
    )
    print(wrapped, file=sys.stderr)
